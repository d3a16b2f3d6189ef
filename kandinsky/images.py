"""Between pictures and tensors: any picture in, sizes, CLIP's preprocessing, the way out to PIL and files.

Inside the package a picture is a float32 tensor (3, h, w) in [0, 1], in memory of its own: nothing here
changes what the caller passed.
"""

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from kandinsky import arguments
from kandinsky.checkpoint import atomic_file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow reads seventy more, and most of its security holes lie there
MAX_PIXELS = 64_000_000
LONGEST_SIDES = {"WEBP": 16383, "JPEG": 65500}  # pixels, of what these formats can hold
LONGEST_NAME = 240  # bytes of a file's name, of the 255 that systems allow: a number may be added
PICTURE = "a PIL picture, a numpy array (h, w, 3) or a tensor (3, h, w)"

# What Pillow raises for files that are cut short or garbage.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class PictureError(ValueError):
    """A picture that cannot be used: what was given, what is allowed."""


def open_image(path: str | Path) -> Image.Image:
    """Reads a PNG, JPEG or WEBP file of at most 64 megapixels, turned as its EXIF data says.

    Raises:
        ValueError: another format, a broken file, or too large a picture. FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with warnings.catch_warnings():  # ours is the lower limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            _check_size(image, str(path))
            image.load()
            return _turned(image, str(path))
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG, JPEG or WEBP picture") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path} is larger than {MAX_PIXELS // 10**6} megapixels") from None
    except PictureError:
        raise
    except _BROKEN as error:
        raise PictureError(f"{path} is a broken picture ({error})") from None


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}×{image.height} pixels"
        raise PictureError(f"{name} is {size}; at most {MAX_PIXELS // 10**6} megapixels are read")
    if not image.width or not image.height:
        raise PictureError(f"{name} is {image.width}×{image.height} pixels; at least 1×1 is needed")


def _turned(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN as error:
        raise PictureError(f"{name} has broken EXIF data ({error})") from None


def pictures(value: Any, name: str = "image") -> list[Tensor]:
    """One picture, a list of them, or a batch (b, 3, h, w) -> (3, h, w) float32 in [0, 1] each."""
    return [picture(item, name) for item in listed(value, name)]


def hints(value: Any, name: str = "hint") -> list[Tensor]:
    """As `pictures`, of one channel or three -> (3, h, w) float32 in [0, 1] each."""
    return [picture(_three_channels(item), name) for item in listed(value, name)]


def listed(value: Any, name: str) -> list:
    """The items of a list or a 4-D batch; one picture alone makes a list of one."""
    is_batch = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 4
    items = list(value) if is_batch or isinstance(value, (list, tuple)) else [value]
    if not items:
        raise PictureError(f"{name} is an empty list; at least one picture is needed")
    return items


def _three_channels(value: Any) -> Any:
    if isinstance(value, Tensor) and (value.ndim == 2 or value.shape[:-2] == (1,)):
        return value.expand(3, *value.shape[-2:])
    if isinstance(value, np.ndarray) and (value.ndim == 2 or value.shape[2:] == (1,)):
        return np.broadcast_to(value.reshape(*value.shape[:2], 1), (*value.shape[:2], 3))
    return value


def picture(value: Any, name: str = "image") -> Tensor:
    """Any form of a picture -> (3, h, w) float32 in [0, 1]; the same picture gives the same tensor.

    Args:
        value: a PIL picture in any mode (alpha lies over white, EXIF turns it, 16 bits are kept), a numpy
            array (h, w, 3) of uint8 or of floats in [0, 1], or a tensor (3, h, w) likewise.

    Raises:
        PictureError: a wrong size, or values outside the range. TypeError: none of these forms.
    """
    if isinstance(value, Image.Image):
        return _from_pil(value, name)
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3:
        x = torch.from_numpy(np.array(value)).permute(2, 0, 1)
    elif isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] == 3:
        x = value.detach().cpu()
    elif isinstance(value, (np.ndarray, Tensor)):
        raise PictureError(f"{name} has the shape {tuple(value.shape)}; needed is {PICTURE}")
    else:
        opened = "; open files with images.open_image" if isinstance(value, (str, Path)) else ""
        raise TypeError(f"{name} is a {type(value).__name__}; needed is {PICTURE}{opened}")
    return unit_range(x, name)


def unit_range(x: Tensor, name: str) -> Tensor:
    """uint8 levels, or floats in [0, 1] -> contiguous float32 in [0, 1] in memory of its own"""
    if not x.numel():
        raise PictureError(f"{name} has the shape {tuple(x.shape)}; at least one pixel is needed")
    if x.dtype == torch.uint8:
        return (x.float() / 255).contiguous()
    if not x.is_floating_point():
        raise TypeError(f"{name} holds {x.dtype}; needed are uint8 levels, or floats in [0, 1]")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):  # also where they are NaN
        hint = "; (x + 1) / 2 brings [-1, 1] there" if -1 <= low < 0 and high <= 1 else ""
        raise PictureError(f"{name} has values from {low:.4g} to {high:.4g}; needed is [0, 1]{hint}")
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _from_pil(image: Image.Image, name: str) -> Tensor:
    _check_size(image, name)
    image = _turned(image, name)
    if image.mode.startswith("I"):  # one channel of 16 bits; "I" is how some of Pillow's readers hold it
        levels = np.asarray(image).astype(np.float32)
        if levels.min() < 0 or levels.max() > 65535:
            raise PictureError(f"{name} has 32-bit levels up to {levels.max():.0f}; at most 65535 is known")
        return torch.from_numpy(levels / 65535).expand(3, -1, -1).contiguous()
    try:
        image = _over_white(image)
    except ValueError:
        raise PictureError(f"{name} has the mode {image.mode}, whose colours are unknown here") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).contiguous()


def _over_white(image: Image.Image) -> Image.Image:
    """Any mode of 8 bits a channel -> RGB"""
    if image.mode == "F":
        raise ValueError("floats have no fixed white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """(3, h, w) -> (3, height, width), bicubic as Pillow does it after its own quick reduction.

    Only another size goes through 8 bits.
    """
    if x.shape[-2:] == (height, width):
        return x
    image = to_pil(x[None])[0].resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).contiguous()


def pad_to(x: Tensor, height: int, width: int, mode: str = "replicate") -> Tensor:
    """The inverse of `crop_to`: (c, h, w) in the middle of (c, height, width); "constant" pads with 0"""
    top, left = (height - x.shape[-2]) // 2, (width - x.shape[-1]) // 2
    return F.pad(x, (left, width - x.shape[-1] - left, top, height - x.shape[-2] - top), mode)


def expand_canvas(
    image: Any, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """For outpainting: the picture on a larger canvas, and the mask of what is new, to pass to `inpaint`.

    Args:
        image: any form of a picture.
        left, top, right, bottom: pixels to add, 0 or more; they are filled with the picture's edge.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, value in sides.items():
        arguments.whole(value, name, 0)
    x = picture(image)
    height, width = x.shape[-2] + top + bottom, x.shape[-1] + left + right
    if height * width > MAX_PIXELS:
        raise PictureError(f"the canvas would be {width}×{height}; at most {MAX_PIXELS // 10**6} megapixels")
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, (left, top, left + x.shape[-1], top + x.shape[-2]))
    return to_pil(F.pad(x, (left, right, top, bottom), mode="replicate")[None])[0], mask


def clip_pixels(image: Image.Image, size: int = 224) -> Tensor:
    """What CLIP's image tower reads: shortest edge to `size`, centre crop, normalised colours.

    image: a picture of any size -> (3, size, size) float32
    """
    image = image.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    new_size = (size, long) if width <= height else (long, size)
    image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (new_size[0] - size) // 2, (new_size[1] - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def to_unit_range(pixels: Tensor) -> Tensor:
    """MoVQ's output, about [-1, 1] -> [0, 1], clamped"""
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def crop_to(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of a map. (…, H, W) -> (…, height, width)"""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in [0, 1] -> RGB pictures, rounded to the nearest of 256 levels"""
    levels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]


def check_suffix(path: Path, suffixes: dict[str, str] = SUFFIXES) -> str:
    """The format that a file name asks for; another suffix is a ValueError."""
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise ValueError(
            f"{path}: cannot write {suffix or 'a file without suffix'}; use {', '.join(suffixes)}"
        )
    return suffixes[suffix]


def check_writable(path: Path, suffixes: dict[str, str] = SUFFIXES) -> None:
    """Raises now what writing a file would raise after the work is done. suffixes: formats, by suffix"""
    path = Path(path)
    check_suffix(path, suffixes)
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise OSError(f"{path} cannot be written: its name is longer than {LONGEST_NAME} bytes")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the file's name too")
    arguments.writable(path.parent, path)


def fitting_name(path: Path, size: tuple[int, int], instead: str = ".png") -> Path:
    """The name, or where its format has no pictures of that size one with another suffix, with a warning."""
    file_format = check_suffix(path, SUFFIXES | ANIMATIONS)
    longest = LONGEST_SIDES.get(file_format)
    if longest is None or max(size) <= longest:
        return path
    wide = f"a {file_format} has up to {longest} pixels a side, this picture {size[0]}×{size[1]}"
    warnings.warn(f"{wide}; it is written as {instead}", stacklevel=2)
    return path.with_suffix(instead)


def save_image(
    image: Image.Image, path: Path, overwrite: bool = False, texts: dict[str, str] | None = None
) -> None:
    """Writes a picture, atomically; the suffix names the format. An existing file is a FileExistsError.

    texts: kept in the file by key, where it is a PNG; see `metadata.texts`.
    """
    path, file_format = Path(path), check_suffix(path)
    settings = {"format": file_format}
    if texts and file_format == "PNG":
        settings["pnginfo"] = PngInfo()
        for key, text in texts.items():
            settings["pnginfo"].add_text(key, text)
    with atomic_file(path, overwrite) as temporary:
        image.save(temporary, **settings)


def save_animation(
    frames: list[Image.Image], path: Path, overwrite: bool = False, seconds: float = 0.2
) -> None:
    """Writes frames that follow each other there and back, as GIF or WebP by the suffix, atomically."""
    path, file_format = Path(path), check_suffix(path, ANIMATIONS)
    frames = frames + frames[-2:0:-1]
    settings = {"save_all": True, "append_images": frames[1:], "duration": round(1000 * seconds), "loop": 0}
    with atomic_file(path, overwrite) as temporary:
        frames[0].save(temporary, format=file_format, **settings)


def grid(frames: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, row by row."""
    width, height = frames[0].size
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(frames)), height * rows), "white")
    for i, frame in enumerate(frames):
        sheet.paste(frame, (width * (i % columns), height * (i // columns)))
    return sheet
