"""Pictures of every kind become RGB, damaged and huge ones one error, and sizes come as torchvision's."""

import io
import os
import struct
import zlib

import ml_dtypes
import numpy as np
import pytest
from PIL import Image, ImageSequence

from mmada_jax.data.images import (
    MAX_BYTES,
    MAX_PIXELS,
    check_image,
    fit_mask,
    open_image,
    resize,
    to_image,
    to_mask,
    to_pixels,
)

ROWS, COLUMNS = 20, 30


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS, 3), np.uint8)


# ---- Opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_files_come_back_from_bytes_and_from_a_path(rgb, format, tmp_path):
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(rgb), format, **options)
    (tmp_path / "picture").write_bytes(data)
    for opened in (
        open_image(data),
        open_image(tmp_path / "picture"),
        open_image(str(tmp_path / "picture")),
    ):
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), rgb)


def test_jpeg_is_what_pillow_decodes(rgb):
    for mode in ("RGB", "L", "CMYK"):
        data = encode(Image.fromarray(rgb).convert(mode), "JPEG", quality=95)
        with Image.open(io.BytesIO(data)) as plain:
            np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(plain.convert("RGB")))


def test_grey_palettes_and_16_bits(rgb):
    grey = rgb[..., 0]
    out = np.asarray(open_image(encode(Image.fromarray(grey))))
    np.testing.assert_array_equal(out, np.repeat(grey[..., None], 3, -1))
    deep = grey.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(np.asarray(open_image(encode(Image.fromarray(deep)))), out)
    palette = Image.fromarray(rgb).quantize(16)
    np.testing.assert_array_equal(
        np.asarray(open_image(encode(palette))), np.asarray(palette.convert("RGB"))
    )
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(np.asarray(open_image(encode(bits))))) == {0, 255}


def test_what_is_transparent_becomes_white(rgb):
    alpha = np.zeros((ROWS, COLUMNS, 1), np.uint8)
    alpha[:, : COLUMNS // 2] = 255
    out = np.asarray(open_image(encode(Image.fromarray(np.concatenate([rgb, alpha], -1)))))
    np.testing.assert_array_equal(out[:, : COLUMNS // 2], rgb[:, : COLUMNS // 2])
    assert (out[:, COLUMNS // 2 :] == 255).all()
    # A palette with transparency, of which Pillow warns where it is converted straight to RGB.
    palette = Image.fromarray(rgb).quantize(4)
    out = np.asarray(open_image(encode(palette, transparency=bytes([0, 255, 255, 255]))))
    hidden = np.asarray(palette) == 0
    assert hidden.any() and (out[hidden] == 255).all()
    np.testing.assert_array_equal(out[~hidden], np.asarray(palette.convert("RGB"))[~hidden])


def test_of_an_animation_the_first_frame(rgb):
    frames = [Image.fromarray(rgb).quantize(64), Image.fromarray(255 - rgb).quantize(64)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as gif:
        first, second = (frame.convert("RGB") for frame in ImageSequence.Iterator(gif))
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(first))
    assert (np.asarray(second) != np.asarray(first)).any()


def test_a_rotation_in_exif_is_not_applied(rgb):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(rgb), "JPEG", exif=exif)
    assert open_image(data).size == (COLUMNS, ROWS)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_cut_off_anywhere_is_one_error(rgb, format):
    data = encode(Image.fromarray(rgb), format)
    for end in np.linspace(0, len(data) - 40, 40).astype(int):
        with pytest.raises(ValueError, match=r"can't be decoded: .|cannot identify image file"):
            open_image(data[:end])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_flipped_bytes_are_a_picture_or_one_error(rgb, format):
    rng, data, errors = np.random.default_rng(0), encode(Image.fromarray(rgb), format), 0
    for _ in range(100):
        damaged = bytearray(data)
        for i in rng.integers(0, len(data), 6):
            damaged[i] = rng.integers(256)
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except ValueError:
            errors += 1
    assert errors


def test_what_is_no_known_format(tmp_path):
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match=r"page.eps: cannot identify image file; JPEG, PNG"):
        open_image(tmp_path / "page.eps")
    with pytest.raises(ValueError, match="the image: cannot identify"):
        open_image(b"")
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize(("columns", "rows"), [(20_000, 20_000), (20_000, 2001)])
@pytest.mark.filterwarnings("error")
def test_a_bomb_is_refused_from_its_header(columns, rows):
    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    # Nothing but a header: decoding it would be another error.
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=f"has {columns}x{rows} pixels; the limit is {MAX_PIXELS}"):
        open_image(data)


def test_a_picture_of_the_limit_is_not_refused():
    assert open_image(encode(Image.new("1", (8000, 5000)))).size == (8000, 5000)


# ---- Sizes -----------------------------------------------------------------------------------------


def torchvision(image, size):
    """torchvision.transforms.functional.resize (bicubic, antialiased) and center_crop, transcribed."""
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = size, int(size * long / short)
    w, h = (new_short, new_long) if w <= h else (new_long, new_short)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    top, left = round((h - size) / 2.0), round((w - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("shape", [(37, 61), (61, 37), (32, 32), (16, 16), (9, 100), (33, 32), (500, 333)])
@pytest.mark.parametrize("size", [16, 33])
def test_crop_is_torchvisions(shape, size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8))
    np.testing.assert_array_equal(resize(image, size), torchvision(image, size))
    np.testing.assert_array_equal(resize(image, size, "crop"), resize(image, (size, size), "crop"))


@pytest.mark.parametrize("how", ["crop", "squash", "pad"])
def test_any_shape_comes_to_any_size(how):
    rng = np.random.default_rng(2)
    for _ in range(60):
        I, J, rows, columns = rng.integers(1, 70, 4)
        out = resize(Image.new("RGB", (int(columns), int(rows)), "red"), (int(I), int(J)), how)
        assert out.shape == (I, J, 3) and out.dtype == np.uint8
        if how != "pad":  # nothing is made up, and no edge is lost beyond the picture
            assert (out == [255, 0, 0]).all()


def test_squash_keeps_all_and_crop_the_middle():
    pixels = np.zeros((8, 32, 3), np.uint8)
    pixels[:, 12:20] = 255
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(resize(image, 8, "crop"), 255)
    squashed = resize(image, 8, "squash")
    assert squashed[:, 0].max() < 40 and squashed[:, 3:5].min() > 200
    np.testing.assert_array_equal(squashed, np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_pad_puts_the_picture_in_the_middle_of_white(shape):
    out = resize(Image.new("RGB", shape[::-1]), 32, "pad")
    dark = (out < 128).all(-1)
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    assert (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) == shape
    assert rows[0] == 31 - rows[-1] and columns[0] == 31 - columns[-1]
    assert (out[0, 0] == 255).all()


def test_a_picture_that_would_grow_without_bound():
    long = Image.new("RGB", (20_000, 10))
    for how in ("crop", "pad"):
        with pytest.raises(ValueError, match=r"20000x10 pixels is too long: .* the limit is"):
            resize(long, 512, how)
    assert resize(long, 16, "squash").shape == (16, 16, 3)
    with pytest.raises(ValueError, match="unknown way to resize 'stretch'; known: crop, squash, pad"):
        resize(long, 16, "stretch")


# ---- Pixels ----------------------------------------------------------------------------------------


def test_pixels_become_images(rgb):
    np.testing.assert_array_equal(np.asarray(to_image(rgb)), rgb)
    np.testing.assert_array_equal(np.asarray(to_image(rgb.astype(np.float32) / 127.5 - 1)), rgb)
    grey = np.repeat(rgb[..., :1], 3, -1)
    for pixels in (rgb[..., :1], rgb[..., 0]):
        np.testing.assert_array_equal(np.asarray(to_image(pixels)), grey)
    with pytest.raises(ValueError, match=r"pixels have shape \(20, 30, 3, 1\) of uint8"):
        to_image(rgb[..., None])


MODES = (
    "1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "LA", "La", "PA", "I", "F",
    "I;16", "I;16B",
)  # fmt: skip


def pillow(mode, rgb):
    """An image of any of Pillow's modes with shades, and alpha where the mode has it."""
    picture = Image.fromarray(rgb)
    alpha = Image.fromarray(rgb[..., 0])
    if mode == "La":
        return pillow("LA", rgb).convert("La")
    if mode in ("I", "I;16", "I;16B"):
        deep = rgb[..., 0].astype({"I": np.int32, "I;16": "<u2", "I;16B": ">u2"}[mode]) * 256 + 77
        return Image.fromarray(deep)
    if mode in ("RGBA", "RGBa", "LA"):
        whole = picture.convert("L" if mode == "LA" else "RGB")
        whole.putalpha(alpha)
        return whole.convert(mode)
    if mode == "PA":
        picture = picture.quantize(8)
        picture.putalpha(alpha)
        return picture
    if mode == "LAB":
        return Image.frombytes("LAB", picture.size, rgb.tobytes())
    return picture.quantize(8) if mode == "P" else picture.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_is_the_picture_that_its_file_is(rgb, mode, tmp_path):
    picture = pillow(mode, rgb)
    assert picture.mode == mode or mode.startswith("I;16")
    # The modes that no file has are saved as those that hold the same.
    as_file = {"RGBX": "RGB", "RGBa": "RGBA", "La": "LA", "PA": "RGBA", "YCbCr": "RGB", "HSV": "RGB",
               "LAB": "RGB", "F": "L"}  # fmt: skip
    saved = picture.convert(as_file[mode]) if mode in as_file else picture
    saved = pillow("I;16", rgb) if mode == "I" else saved
    file = encode(saved, "JPEG" if mode == "CMYK" else "PNG")
    if mode == "CMYK":
        with Image.open(io.BytesIO(file)) as opened:
            picture = opened.copy()
        assert picture.mode == "CMYK"
    want = np.asarray(open_image(file))
    assert want.std() > 1  # a picture with something in it
    got = to_image(picture)
    assert got.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(got), want)
    # In every form, and as a model takes it.
    (tmp_path / "picture").write_bytes(file)
    forms = (picture, file, bytearray(file), tmp_path / "picture", str(tmp_path / "picture"), want)
    for form in forms:
        np.testing.assert_array_equal(np.asarray(to_image(form)), want)
        pixels = to_pixels(form, (ROWS, COLUMNS), 3)
        np.testing.assert_array_equal(pixels, want.astype(np.float32) / np.float32(127.5) - 1)
        small = to_pixels(form, (8, 8), 3)
        np.testing.assert_array_equal(small, resize(open_image(file), 8) / np.float32(127.5) - 1)
        assert to_pixels(form, (8, 8), 1).shape == (8, 8, 1)


def test_what_is_transparent_is_white_in_every_form():
    clear = np.zeros((4, 4), np.uint8)
    hidden = {
        "RGBA": Image.new("RGBA", (4, 4), (0, 0, 0, 0)),
        "LA": Image.new("LA", (4, 4), (0, 0)),
        "an array of RGBA": np.stack([clear] * 4, -1),
        "an array of grey and alpha": np.stack([clear] * 2, -1),
    }
    for mode, colour in {"1": 0, "L": 7, "P": 0, "RGB": (1, 2, 3), "I;16": 40000}.items():
        file = encode(Image.new(mode, (4, 4), colour), transparency=colour)
        hidden[f"{mode}, a file"] = file
        with Image.open(io.BytesIO(file)) as opened:
            hidden[f"{mode}, opened"] = opened.copy()
    for name, picture in hidden.items():
        assert (np.asarray(to_image(picture)) == 255).all(), name
    half = np.stack([clear] * 3 + [clear + 128], -1)
    assert (np.asarray(to_image(half)) == 127).all()


def test_arrays_in_every_form(rgb):
    for pixels in (rgb, rgb.astype(np.int64), rgb.astype(np.uint16) * 256 + 9, rgb.tolist(),
                   (rgb.astype(np.uint16) * 256 + 9).astype(">u2")):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(to_image(pixels)), rgb)
    rounded = to_image((rgb.astype(np.float32) / 127.5 - 1).astype(ml_dtypes.bfloat16))
    np.testing.assert_allclose(np.asarray(rounded, int), rgb, atol=1)
    bits = rgb[..., 0] > 127
    np.testing.assert_array_equal(np.asarray(to_image(bits))[..., 1], bits * 255)
    exact = np.linspace(-1, 1, ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
    for channels in (1, 3):
        pixels = to_pixels(exact, (ROWS, COLUMNS), channels)
        np.testing.assert_array_equal(pixels, np.repeat(exact[..., None], channels, 2))
        small = to_pixels(exact, (8, 8), channels)
        assert small.shape == (8, 8, channels) and small.dtype == np.float32
    for wrong in (None, 7, "", b"", object(), ["a.png"], np.zeros((3, 20, 30)), np.zeros((0, 4, 3)),
                  rgb.astype(np.float32), rgb.astype(int) - 1, rgb * 2j, np.full((4, 4), np.nan),
                  Image.new("RGB", (0, 4)), Image.fromarray(rgb[..., 0].astype(np.float32) / 255),
                  Image.new("I", (4, 4), 65536), Image.new("F", (4, 4), -1)):  # fmt: skip
        with pytest.raises((ValueError, OSError)) as caught:
            to_pixels(wrong, (8, 8), 3)
        assert type(caught.value) in (ValueError, FileNotFoundError), repr(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) > 20


def test_what_would_block_or_is_no_picture_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "long.png").write_bytes(b"")
    os.truncate(tmp_path / "long.png", MAX_BYTES + 1)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    (tmp_path / "pointer.png").write_bytes(pointer)
    cases = {
        "pipe.png is a pipe": tmp_path / "pipe.png",
        f"{tmp_path} is a folder": tmp_path,
        "/dev/zero is a device": "/dev/zero",
        "long.png has .* bytes; the limit is": tmp_path / "long.png",
        "pointer.png is a pointer of git LFS .*git lfs pull": tmp_path / "pointer.png",
        "the image is a pointer of git LFS .*git lfs pull": pointer,
    }
    for message, picture in cases.items():
        for read in (open_image, check_image, to_image, to_mask, lambda p: to_pixels(p, (8, 8), 3)):
            with pytest.raises(ValueError, match=message):
                read(picture)


# ---- Masks -----------------------------------------------------------------------------------------


def test_masks_in_every_form(tmp_path):
    mask = np.zeros((8, 16), bool)
    mask[2:5, 8:] = True
    white = mask.astype(np.uint8) * 255
    (tmp_path / "mask.png").write_bytes(encode(Image.fromarray(white)))
    forms = [
        mask,
        mask.tolist(),
        mask[..., None],
        mask.astype(int),
        mask.astype(np.uint8),
        white,
        white.astype(int),
    ]
    forms += [
        mask * np.float32(0.6),
        np.stack([white] * 3, -1),
        tmp_path / "mask.png",
        encode(Image.fromarray(white)),
    ]
    forms += [Image.fromarray(white).convert(mode) for mode in ("1", "L", "RGB", "RGBA", "LA", "P")]
    forms += [Image.fromarray(mask.astype(np.uint8)), mask.astype(np.uint16), white.astype(np.uint16) * 257]
    for form in forms:
        np.testing.assert_array_equal(to_mask(form), mask)
        np.testing.assert_array_equal(fit_mask(form, np.zeros((8, 16)), (8, 16)), mask)
    # Of a picture of another size, brought to that of a model together with it.
    large = np.kron(mask, np.ones((4, 4), bool))
    picture = Image.fromarray(large.astype(np.uint8) * 255)
    for how in ("crop", "squash"):
        shades = to_pixels(picture, (8, 8), 1, how)[..., 0]
        np.testing.assert_array_equal(fit_mask(large, picture, (8, 8), how), shades >= 0)
        np.testing.assert_array_equal(fit_mask(mask, picture, (8, 8), how).sum() > 0, True)
    assert not to_mask(np.zeros((4, 4), np.uint8)).any() and to_mask(np.ones((4, 4), np.uint8)).all()
    for wrong in (
        mask * 2.0,
        -mask.astype(float),
        mask - np.nan,
        -mask.astype(int),
        mask[0],
        None,
        "none.png",
    ):
        with pytest.raises((ValueError, FileNotFoundError)):
            to_mask(wrong)
    with pytest.raises(
        ValueError, match=r"a mask has 8 x 16 pixels .*, its image 8 x 15; masks have the prop"
    ):
        fit_mask(mask, Image.new("1", (15, 8)), (8, 8))
