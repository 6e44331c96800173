"""Picture files -> RGB pixels of the size that a tokenizer takes, and never more than a limit of them."""

import io
import pathlib
from typing import Literal

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

# A picture of more pixels than this is refused before it is decoded, and so is one that would have
# more on its way to its size.
MAX_PIXELS = 40_000_000

# By the first bytes of a file. `Image.open` knows many formats more, one of which runs programs, and
# warns of large pictures or refuses them by a limit of its own.
_READERS = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}

Resize = Literal["crop", "squash", "pad"]


def open_image(data: bytes | str | pathlib.Path) -> Image.Image:
    """Decodes a JPEG, PNG, WebP, GIF or BMP, its bytes or its path, into an RGB image.

    Of an animation the first frame; what is transparent becomes white; of 16 bits the upper 8. It
    stays as it is stored: a rotation in EXIF isn't applied. Raises ValueError for anything else,
    damaged files, and more than MAX_PIXELS (from the header alone).
    """
    image, name = _read_header(data)
    try:
        return _rgb(image)
    except Exception as error:  # decoders of damaged files raise nearly everything
        raise ValueError(f"{name} can't be decoded: {error}") from error


def check_image(data: bytes | str | pathlib.Path) -> None:
    """Raises ValueError for what `open_image` refuses by the header of a file."""
    _read_header(data)


def resize(image: Image.Image, size: tuple[int, int] | int, how: Resize = "crop") -> np.ndarray:
    """An RGB image -> pixels uint8 [I, J, 3] of `size` (rows, columns; or one number for both).

    `crop`: the side that is shorter for its target is brought to it, and the middle of the other is
    taken, as torchvision's Resize and CenterCrop do. `squash`: both sides at once. `pad`: white
    margins to the proportions of `size` first. All of it bicubic and antialiased. Raises ValueError
    if a picture is so long that it would have more than MAX_PIXELS on the way.
    """
    I, J = (size, size) if isinstance(size, int) else size
    columns, rows = image.size
    if how == "crop":
        # Of a square target: the shorter side becomes it, the longer int(target * long / short).
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


def to_image(pixels: np.ndarray) -> Image.Image:
    """Pixels [I, J, C] or [I, J], of 1 or 3 channels, uint8 or floats in [-1, 1] -> an RGB image."""
    if pixels.dtype != np.uint8:
        pixels = np.clip(np.round((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise ValueError(f"pixels have shape {pixels.shape}; [I, J, 3], [I, J, 1] or [I, J] make an image")
    return Image.fromarray(pixels).convert("RGB")


def _read_header(data: bytes | str | pathlib.Path) -> tuple[Image.Image, str]:
    """The image, its pixels not decoded yet, and what to call it."""
    name = "the image" if isinstance(data, bytes) else str(data)
    data = data if isinstance(data, bytes) else pathlib.Path(data).read_bytes()
    reader = next((reader for magic, reader in _READERS.items() if data.startswith(magic)), None)
    if reader is None:
        raise ValueError(f"{name}: cannot identify image file; JPEG, PNG, WebP, GIF and BMP are known")
    try:
        image = reader(io.BytesIO(data))
        size = image.size
    except Exception as error:
        raise ValueError(f"{name} can't be decoded: {error}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{name} has {size[0]}x{size[1]} pixels; the limit is {MAX_PIXELS}")
    return image, name


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _check(image: Image.Image, between: tuple[int, int]) -> None:
    if between[0] * between[1] > MAX_PIXELS:
        raise ValueError(
            f"the image of {image.width}x{image.height} pixels is too long: it would become one of "
            f"{between[1]}x{between[0]} on the way to its size; the limit is {MAX_PIXELS} pixels"
        )
