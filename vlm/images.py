"""Any picture that a person or a shard hands in, as 8-bit RGB.

Knows file formats, colour modes, orientation and how large is absurd. Knows nothing of models, tensors or networks: an
address is not fetched.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vlm.errors import UsageError
from vlm.image_structure import whole_size

MAX_PIXELS = 64_000_000
ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

# Named here and not left to Image.open: a format outside the list is never tried, and the limit of pixels is ours
# alone, where Image.open would warn at one size and raise at another.
_READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
}
_EXTENSIONS = {magic[:2]: name for magic, name in zip(_READERS, ("jpg", "png", "webp"), strict=True)}


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Open and convert to RGB: upright by its EXIF, transparency on white, 16 bits scaled to 8, one frame.

    `source` is a path, an encoded JPEG, PNG or WebP, a Pillow image, or an (H, W, 3) uint8 array. The size is judged by
    the header before a pixel is decoded. Raises UsageError naming the image (`name`, else its path) and the mend.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "the array")
    if isinstance(source, Image.Image):
        return _decoded(source, name or "the image", max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), name or "the image", max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"an image can not be a {type(source).__name__}; give a path, bytes, PIL image or uint8 array")
    path = Path(source)
    try:
        with open(path, "rb") as file:
            return _from_file(file, name or str(path), max_pixels)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such image file; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: can not be opened ({reason}); give a readable image file") from None


def extension_of(data: bytes) -> str:
    """`jpg`, `png` or `webp` by the first bytes of an encoded picture that `open_image` or `check_image` took."""
    return _EXTENSIONS[data[:2]]


def check_image(data: bytes, *, max_pixels: int = MAX_PIXELS, name: str = "the image") -> None:
    """Raise UsageError as `open_image` does, without decoding where the file's own structure tells that it is whole.

    A PNG carries a checksum of every chunk; in a JPEG a cut or a foreign piece shows as a marker that has no business
    there, and what does not show is no error to a decoder either. A file that is odd in any way is decoded.
    """
    size = whole_size(data)
    if size is None or size[0] * size[1] > max_pixels:
        open_image(data, max_pixels=max_pixels, name=name)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
        raise UsageError(f"{name}: shape {array.shape} of {array.dtype}; give (H, W, 3) of uint8, 0 to 255")
    return Image.fromarray(np.ascontiguousarray(array))


def _from_file(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    head = file.read(12)
    file.seek(0)
    if not head:
        raise UsageError(f"{name}: an empty file; replace it")
    reader = next((reader for magic, reader in _READERS.items() if head.startswith(magic)), None)
    if reader is None or (reader is WebPImageFile and head[8:] != b"WEBP"):
        raise UsageError(f"{name}: not a JPEG, PNG or WebP file; convert it to one of these")
    # Pillow raises a dozen kinds of exception at hostile or damaged files, and the kinds change with its version.
    try:
        image = reader(file)
    except Exception as error:
        raise UsageError(f"{name}: its header can not be read ({_reason(error)}); replace the file") from None
    return _decoded(image, name, max_pixels)


def _decoded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise UsageError(f"{name}: {width}×{height} pixels, the limit is {max_pixels}; make it smaller")
    if width * height == 0:
        raise UsageError(f"{name}: {width}×{height} pixels; give an image that has some")
    try:
        image.load()
    except Exception as error:
        raise UsageError(f"{name}: damaged or truncated ({_reason(error)}); replace the file") from None
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about orientation, and the pixels are good
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_to_8_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow's own conversion would clip at 255. Transparency is not kept at this depth."""
    values = np.asarray(image).astype(np.float32) / (1.0 if image.mode == "F" else 257.0)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
