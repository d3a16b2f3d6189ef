"""Doubling by nearest neighbour and the 3×3 convolution behind it as one, with four ninths of the work.

An output pixel sees 2×2 pixels of the small map only, so four 2×2 convolutions of it, one for each corner of
the doubled pixels, give what one convolution of the large map does, which is never made.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky import bands, fused, movq, packed, unet
from kandinsky.packed import PackedKernel, Shared, can_pack, wants_gradient


class MergedUpsampling(Shared):
    """Nearest-neighbour doubling and the 3×3 convolution behind it, as one 2×2 convolution.

    Output pixel 2i + p reads rows i - 1 + p and i + p of the small map, p = 0 or 1: for p = 0 the first tap
    falls on the one and the other two on the next; for p = 1 the first two and the last.
    """

    def __init__(self, conv: nn.Conv2d):
        weight = conv.weight.detach().float()
        rows = torch.stack([_first_alone(weight, 2), _last_alone(weight, 2)])
        # (2, 2, c_out, c_in, 2, 2): rows, then columns
        kernels = torch.stack([_first_alone(rows, 4), _last_alone(rows, 4)], dim=1)
        self.weight = kernels.flatten(0, 2).to(conv.weight.dtype)
        self.bias = None if conv.bias is None else conv.bias.detach().repeat(4)
        self.out_channels, self.packed = conv.out_channels, None
        if can_pack(conv.weight):
            self.packed = PackedKernel(self.weight, (1, 1), (1, 1), (1, 1))
            self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """(b, c_in, h, w) -> (b, c_out, 2h, 2w)"""
        b, _, h, w = x.shape
        shape = (b, self.out_channels, 2 * h, 2 * w)
        doubled = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=bands.order_of(x))
        for rows in bands.bands(h, doubled.numel(), x.device):
            band, start = bands.with_halo(x, rows)
            parts = self._convolve(band).unflatten(1, (2, 2, -1))  # (b, 2, 2, c, band's rows + 1, w + 1)
            out, first = doubled[:, :, 2 * rows.start : 2 * rows.stop], rows.start - start
            for p in (0, 1):
                for q in (0, 1):
                    part = parts[:, p, q, :, first + p :, q : q + w]
                    out[:, :, p::2, q::2] = part[:, :, : rows.stop - rows.start]
        return doubled

    def _convolve(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.conv2d(x, self.weight, self.bias, padding=1)
        return self.packed(x, self.bias)


def _first_alone(taps: Tensor, dim: int) -> Tensor:
    first, second, third = taps.unbind(dim)
    return torch.stack([first, second + third], dim)


def _last_alone(taps: Tensor, dim: int) -> Tensor:
    first, second, third = taps.unbind(dim)
    return torch.stack([first + second, third], dim)


class Merged:
    """A block whose `merged` stands for an upsampling and the convolution behind it."""

    MADE = ("merged",)  # what `restore` takes away

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Casts and moves the convolution's own weight, and merges anew."""
        order = None if self.merged.weight is None else bands.order_of(self.merged.weight)
        super()._apply(fn, recurse)
        self.merged = MergedUpsampling(conv_of(self))
        if order is not None and self.merged.weight is not None:
            self.merged.weight = self.merged.weight.to(memory_format=order)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(packed.NO_NEW_WEIGHTS)


class MergedUpResnetBlock(Merged, unet.ResnetBlock):
    """The U-Net's block that doubles the map."""

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        if wants_gradient(x, self.conv1.weight):
            return super().forward(x, modulation)
        scale, shift = (m[:, :, None, None] for m in modulation)
        out = self.merged(F.silu(self.norm1(x)))
        out = self.norm2(out) * (1 + scale) + shift
        return self.conv_shortcut(self.resize(x)) + self.conv2(F.silu(out))


class FusedMergedUpResnetBlock(Merged, fused.FusedResnetBlock):
    """Both in one; out of a merged block by `fuse_norms`."""

    def resized(self, x: Tensor) -> Tensor:
        return super().resized(x) if wants_gradient(x, self.conv1.weight) else self.merged(x)


class MergedUpsample(Merged, movq.Upsample):
    """MoVQ's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if wants_gradient(x, self.conv.weight) else self.merged(x)


def conv_of(block: nn.Module) -> nn.Conv2d:
    """The convolution behind a block's upsampling."""
    return block.conv if isinstance(block, movq.Upsample) else block.conv1
