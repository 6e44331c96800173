"""Pictures of every kind become RGB, damaged and huge ones one error, and sizes come as torchvision's."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageSequence

from mmada_jax.data.images import MAX_PIXELS, open_image, resize, to_image

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
    with pytest.raises(ValueError, match=r"pixels have shape \(20, 30, 2\)"):
        to_image(rgb[..., :2])
