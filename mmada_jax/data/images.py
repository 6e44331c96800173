"""Pictures in any form, read and resized to the pixels that an image tokenizer takes.

A picture is a file (its path or its bytes), an image of Pillow's in any mode, or an array. The number of
pixels has a limit at every step.
"""

import io
import os
from typing import Any, Literal

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from mmada_jax import files

# The largest number of pixels of a picture, also between two steps of resizing. Larger pictures are refused
# before they are decoded. MAX_BYTES is the largest size of a file in bytes.
MAX_PIXELS = 40_000_000
MAX_BYTES = 64 << 20

# The first bytes of a file, and its reader. `Image.open` isn't used: it knows more formats, one of which
# runs programs, and it has its own limit for large pictures.
_READERS = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}

# A file: its bytes or its path.
File = bytes | bytearray | memoryview | str | os.PathLike
Resize = Literal["crop", "squash", "pad"]


def open_image(data: File) -> Image.Image:
    """Decodes a JPEG, PNG, WebP, GIF or BMP file into an RGB image. `data` is the file's bytes or path.

    An animation gives its first frame. Transparent pixels become white. Values of 16 bits give their
    upper 8 bits. A rotation in EXIF isn't applied. Raises ValueError for anything else (a folder, a pipe,
    a pointer of git LFS), for a damaged file, and for more than MAX_PIXELS pixels, which the header
    tells. Raises OSError if there is no file.
    """
    image, name = _read_header(data)
    try:
        return _rgb(image)
    except Exception as error:  # decoders of damaged files raise nearly everything
        raise ValueError(f"{name} can't be decoded: {error}") from error


def check_image(data: File) -> None:
    """Raises ValueError for a file that `open_image` refuses because of its header."""
    _read_header(data)


def resize(image: Image.Image, size: tuple[int, int] | int, how: Resize = "crop") -> np.ndarray:
    """Pixels uint8 [I, J, 3] of an RGB image, resized to `size` (rows, columns; or one number for both).

    `crop` scales the image until it just covers `size`, and takes the middle, as torchvision's Resize and
    CenterCrop do. `squash` scales each side by its own factor. `pad` adds white margins until the image has
    the proportions of `size`, and scales it. Scaling is bicubic and antialiased. Raises ValueError if the
    image would have more than MAX_PIXELS pixels between two steps, because it is very long.
    """
    I, J = (size, size) if isinstance(size, int) else size
    columns, rows = image.size
    if how == "crop":
        # For a square target T the shorter side becomes T, and the longer side int(T * long / short).
        tall = rows * J >= columns * I
        between = (int(J * rows / columns), J) if tall else (I, int(I * columns / rows))
        _check(image, between)
        image = image.resize(between[::-1], Image.Resampling.BICUBIC)
        top, left = round((between[0] - I) / 2), round((between[1] - J) / 2)
        image = image.crop((left, top, left + J, top + I))
    elif how == "pad":
        between = (max(rows, -(-columns * I // J)), max(columns, -(-rows * J // I)))
        _check(image, between)
        canvas = Image.new("RGB", between[::-1], "white")
        canvas.paste(image, ((between[1] - columns) // 2, (between[0] - rows) // 2))
        image = canvas.resize((J, I), Image.Resampling.BICUBIC)
    elif how == "squash":
        image = image.resize((J, I), Image.Resampling.BICUBIC)
    else:
        raise ValueError(f"unknown way to resize {how!r}; known: crop, squash, pad")
    return np.asarray(image)


def to_image(picture: Any) -> Image.Image:
    """A picture in any form as an RGB image. The image equals the result of `open_image` for its file.

    `open_image` opens a path or bytes. Images of Pillow's may have every mode. Arrays have the shape [I,
    J], or [I, J, C] with the channels grey, grey and alpha, RGB, or RGBA. Their values are integers from
    0 to 255, uint16 (the upper 8 bits count), bool, or floats in [-1, 1]. Raises ValueError for anything
    else.
    """
    if _is_image(picture) and not isinstance(picture, Image.Image):
        return open_image(picture)
    if isinstance(picture, Image.Image):
        _check_size(*picture.size, "the image")
        try:
            return _rgb(picture)
        except Exception as error:  # the image may be an open file, whose decoder raises nearly everything
            raise ValueError(f"the image of mode {picture.mode} can't be read: {error}") from error
    pixels = _array(picture)
    if pixels.dtype.kind == "f":
        pixels = np.clip(np.round((pixels.astype(np.float32) + 1) * 127.5), 0, 255)
    elif pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        pixels = pixels >> 8
    elif pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    elif pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"an image has {pixels.dtype} pixels from {pixels.min()} to {pixels.max()}; integers go from "
            "0 to 255, uint16 to 65535"
        )
    pixels = pixels.astype(np.uint8)
    return _rgb(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def to_pixels(picture: Any, size: tuple[int, int], channels: int, how: Resize = "crop") -> np.ndarray:
    """The pixels float32 [I, J, C] in [-1, 1] of a picture in any form, as in training. I and J are `size`.

    `resize` resizes a picture of another size. An array of floats of this size keeps its values if it has C
    channels or one. Raises ValueError if `picture` is no picture, and OSError for a path without a file.
    """
    if not _is_image(picture):
        pixels = _array(picture)
        exact = pixels.shape[:2] == tuple(size) and pixels.shape[2] in (1, channels)
        if pixels.dtype.kind == "f" and exact:
            return np.repeat(pixels.astype(np.float32), channels // pixels.shape[2], axis=2)
    return to_bytes(picture, size, channels, how).astype(np.float32) / np.float32(127.5) - 1


def to_bytes(picture: Any, size: tuple[int, int], channels: int, how: Resize = "crop") -> np.ndarray:
    """The same as uint8 [I, J, C]: grey for one channel, RGB for three."""
    pixels = resize(to_image(picture), size, how)
    if channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    return pixels.reshape(*size, channels)


def png_of(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def shrunk(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image that is an enlargement of `size` (rows, columns) by a whole number, at that size; any other
    as it is."""
    rows, columns = size
    scale = image.width // columns
    if scale > 1 and image.size == (scale * columns, scale * rows):
        return image.resize((columns, rows), Image.Resampling.BOX)
    return image


def to_mask(mask: Any) -> np.ndarray:
    """A mask in any form as bool [I, J]. The size isn't changed.

    A mask is a picture in any form, or an array [I, J] of floats from 0 to 1. White and transparent
    pixels of a picture are True. If no value is above 1, as in arrays of bool, 1 is white. Raises
    ValueError for anything else.
    """
    if not _is_image(mask):
        values = np.asarray(mask)
        values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
        if values.ndim == 2 and values.size and values.dtype.kind in "biuf":
            least, most = values.min(), values.max()
            if least >= 0 and most <= 1:
                return values >= 0.5
            if values.dtype.kind == "f":
                raise ValueError(f"a mask has floats from {least} to {most}; they go from 0 to 1")
    mask_IJ = np.asarray(to_image(mask).convert("L"))
    return mask_IJ >= (128 if mask_IJ.max() > 1 else 1)


def fit_mask(mask: Any, picture: Any, size: tuple[int, int], how: Resize = "crop") -> np.ndarray:
    """The mask of a picture as bool [I, J], resized to `size` as `to_pixels` resizes the picture.

    The mask has the proportions of the picture, but may have another size. Raises ValueError if the
    proportions differ.
    """
    mask_IJ, (rows, columns) = to_mask(mask), shape_of(picture)
    if mask_IJ.shape[0] * columns != mask_IJ.shape[1] * rows:
        raise ValueError(
            f"a mask has {' x '.join(map(str, mask_IJ.shape))} pixels (rows, columns), its image {rows} x "
            f"{columns}; masks have the proportions of their images"
        )
    if mask_IJ.shape == tuple(size):
        return mask_IJ
    return resize(to_image(mask_IJ), size, how)[..., 0] >= 128


def shape_of(picture: Any) -> tuple[int, int]:
    """The numbers of rows and columns of a picture in any form. Of a file only the header is read."""
    if isinstance(picture, Image.Image):
        return picture.size[::-1]
    return _read_header(picture)[0].size[::-1] if _is_image(picture) else _array(picture).shape[:2]


def _is_image(picture: Any) -> bool:
    return isinstance(picture, File | Image.Image)


def _read_header(data: File) -> tuple[Image.Image, str]:
    """The image of a file, whose pixels aren't decoded yet, and its name for errors."""
    if isinstance(data, str | os.PathLike):
        name, data = os.fspath(data), files.read_bytes(data, MAX_BYTES)
    else:
        name, data = "the image", bytes(data)
        files.refuse_pointer(data, name)
    reader = next((reader for magic, reader in _READERS.items() if data.startswith(magic)), None)
    if reader is None:
        raise ValueError(f"{name}: cannot identify image file; JPEG, PNG, WebP, GIF and BMP are known")
    try:
        image = reader(io.BytesIO(data))
        size = image.size
    except Exception as error:
        raise ValueError(f"{name} can't be decoded: {error}") from error
    _check_size(*size, name)
    return image, name


def _check_size(columns: int, rows: int, name: str) -> None:
    if not columns * rows:
        raise ValueError(f"{name} has {columns}x{rows} pixels, which is none")
    if columns * rows > MAX_PIXELS:
        raise ValueError(f"{name} has {columns}x{rows} pixels; the limit is {MAX_PIXELS}")


def _array(picture: Any) -> np.ndarray:
    """An array of numbers as [I, J, C] with 1 to 4 channels C. Raises ValueError for anything else."""
    if not hasattr(picture, "__array__") and not isinstance(picture, list | tuple):
        raise ValueError(
            f"{type(picture).__name__} is no picture; give a path, bytes, an image of Pillow's or an array"
        )
    pixels = np.asarray(picture)
    if pixels.dtype.name == "bfloat16":  # NumPy doesn't count this type among the floats
        pixels = pixels.astype(np.float32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype.kind not in "biuf" or pixels.ndim != 3 or not pixels.size or pixels.shape[2] > 4:
        raise ValueError(
            f"pixels have shape {np.shape(picture)} of {pixels.dtype}; [I, J] or [I, J, C] make an image, "
            "with 1 to 4 channels"
        )
    _check_size(pixels.shape[1], pixels.shape[0], "an image")
    if pixels.dtype.kind == "f" and not np.abs(pixels).max() <= 1.5:  # decoders overshoot a little
        raise ValueError(
            f"an image has {pixels.dtype} pixels from {pixels.min()} to {pixels.max()}; give uint8 from 0 "
            "to 255 or floats from -1 to 1"
        )
    return pixels


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        image = _bytes_of_floats(image)
    if image.mode.startswith("I"):
        return _upper_bits(image)
    if image.mode == "La":  # grey multiplied by alpha: Pillow converts it to no other mode than LA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values go from {values.min()} to {values.max()}, 16 bits from 0 to 65535")
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _bytes_of_floats(image: Image.Image) -> Image.Image:
    # Pillow reads floats as shades from 0 to 255. A largest value of 1 shows that another scale was meant.
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 255) or 0 < values.max() <= 1:
        raise ValueError(
            f"its values go from {values.min()} to {values.max()}; as an image they go to 255, as an array "
            "from -1 to 1"
        )
    return image.convert("L")


def _check(image: Image.Image, between: tuple[int, int]) -> None:
    if between[0] * between[1] > MAX_PIXELS:
        raise ValueError(
            f"the image of {image.width}x{image.height} pixels is too long: it would become one of "
            f"{between[1]}x{between[0]} on the way to its size; the limit is {MAX_PIXELS} pixels"
        )
