"""Inpainting masks: white, 1, is repainted and black, 0, is kept.

any form ─ masks → (h, w) ─ resize → (height, width) of 0 and 1 ─ grow → what the caller gets back repainted
                                                                └ keep_latents → what the U-Net is told
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kandinsky import images

MASK = "a PIL picture, or a numpy array or tensor (h, w) in [0, 1]"


def masks(value: Any) -> list[Tensor]:
    """One mask, a list of them, or a batch (b, 1, h, w) -> (h, w) float32 in [0, 1] each."""
    return [mask(item) for item in images.listed(value, "mask_image")]


def mask(value: Any, name: str = "mask_image") -> Tensor:
    """Any form of a mask -> (h, w) float32 in [0, 1], in memory of its own.

    Args:
        value: a PIL picture (its luminance counts, alpha over white), or a numpy array or tensor (h, w),
            (1, h, w) or (h, w, 1) of booleans, floats in [0, 1], or integers 0 and 1; uint8 also up to 255.

    Raises:
        PictureError: a wrong shape, or values outside the range. TypeError: none of these forms.
    """
    if isinstance(value, Image.Image):
        levels = images.picture(value, name)
        return levels[0].clone() if (levels == levels[:1]).all() else _luminance(levels)
    if not isinstance(value, (np.ndarray, Tensor)):
        opened = "; open files with images.open_image" if isinstance(value, (str, Path)) else ""
        raise TypeError(f"{name} is a {type(value).__name__}; needed is {MASK}{opened}")
    x = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach().cpu()
    if x.ndim == 3 and 1 in (x.shape[0], x.shape[2]):
        x = x.squeeze(0 if x.shape[0] == 1 else 2)
    if x.ndim != 2:
        raise images.PictureError(f"{name} has the shape {tuple(value.shape)}; needed is {MASK}")
    if not x.is_floating_point() and x.numel() and 0 <= int(x.min()) and int(x.max()) <= 1:
        x = x.float()
    return images.unit_range(x, name)


def _luminance(x: Tensor) -> Tensor:
    """(3, h, w) -> (h, w), by Pillow's weights and its 256 levels"""
    gray = np.array(images.to_pil(x[None])[0].convert("L"))
    return torch.from_numpy(gray).float() / 255


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """(h, w) -> (height, width) of 0 and 1: Lanczos through 8 bits where the size differs, then ≥ 0.5"""
    if x.shape != (height, width):
        image = Image.fromarray((x * 255).round().to(torch.uint8).numpy())
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        x = torch.from_numpy(np.array(image)).float() / 255
    return (x >= 0.5).float()


def grow(x: Tensor, pixels: int) -> Tensor:
    """Repaints a margin of so many pixels more, in all directions. (1, h, w) of 0 and 1 -> likewise"""
    size = 2 * pixels + 1
    x = F.max_pool2d(x, (size, 1), stride=1, padding=(pixels, 0))
    return F.max_pool2d(x, (1, size), stride=1, padding=(0, pixels))


def feather(x: Tensor, pixels: int) -> Tensor:
    """A ramp inside the repainted region, that wide; outside it stays 0. (1, h, w) of 0 and 1 -> [0, 1]"""
    total, eroded = x, x
    for _ in range(pixels):
        eroded = 1 - grow(1 - eroded, 1)
        total = total + eroded
    return total / (pixels + 1)


def keep_latents(x: Tensor, downscale: int) -> Tensor:
    """What the inpainting U-Net was trained on: 1 where a latent is kept.

    The mask is read at the top left pixel of each block of `downscale`². Each repainted latent makes six of
    its eight neighbours repainted too, all but the top right and the bottom left one: the maximum over the
    2×2 latents that start there and the 2×2 that end there. x: (b, 1, H, W) of 0 and 1 -> (b, 1, h, w)
    """
    x = x[..., ::downscale, ::downscale]
    squares = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2, stride=1)  # (b, 1, h + 1, w + 1)
    return 1 - torch.maximum(squares[..., :-1, :-1], squares[..., 1:, 1:])


def paste(pixels: Tensor, original: Tensor, share: Tensor) -> Tensor:
    """Repainted pixels where `share` is 1, the original to the last bit where it is 0. (b, 3, h, w) each"""
    return share * pixels + (1 - share) * original
