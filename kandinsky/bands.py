"""MoVQ's largest maps in bands of rows: the same numbers, without a further map of that size at each turn.

    mean and variance of each group ─ once, over the whole map
    rows r0-1 … r1 ─ norm, SiLU, 3×3 convolution ─ rows r0 … r1-1        band after band

At 2048 px one map takes 2 to 4 GB, and norm, scale, shift and SiLU would each make another. In bands the
norms themselves are not called, and a convolution is called once for each band: hooks on these see that.

Maps of up to `LARGEST` numbers, on a GPU `GPU_FACTOR` times that, go the usual way, which is faster; there
results are overwritten where nobody else sees them (`kandinsky.overwriting`).
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky import movq, overwriting
from kandinsky.packed import wants_gradient

LARGEST = 2**26  # numbers in a map, of the whole batch; a band has about as many as 64 rows of 1024 px
BAND = 2**23
GPU_FACTOR = 4  # on a GPU both are so many times larger, as each band costs launches: 1024 px are one piece


class BandedResnetBlock(movq.ResnetBlock):
    def forward(self, x: Tensor, *zq: Tensor) -> Tensor:
        if is_large(x, self.conv2.out_channels) and not wants_gradient(x, self.conv2.weight):
            return self.banded(x, *zq)
        out = self.conv1(overwriting.activated(self.norm1, x, *zq))
        out = self.conv2(overwriting.activated(self.norm2, out, *zq))
        return torch.add(out, self.conv_shortcut(x), out=overwriting.memory_for(out, self.conv2))

    def banded(self, x: Tensor, *zq: Tensor) -> Tensor:
        out = convolve_normed(self.norm1, self.conv1, x, *zq)
        out = convolve_normed(self.norm2, self.conv2, out, *zq)
        for rows in bands(x.shape[2], x.numel(), x.device):
            out[:, :, rows] += self.conv_shortcut(x[:, :, rows])
        return out


class BandedDecoder(movq.Decoder):
    def read_out(self, x: Tensor, zq: Tensor) -> Tensor:
        if is_large(x) and not wants_gradient(x, self.conv_out.weight):
            return convolve_normed(self.conv_norm_out, self.conv_out, x, zq)
        return self.conv_out(overwriting.activated(self.conv_norm_out, x, zq))


def is_large(x: Tensor, channels: int = 0) -> bool:
    return x.numel() // x.shape[1] * max(x.shape[1], channels) > LARGEST * _times(x.device)


def _times(device: torch.device) -> int:
    return 1 if device.type == "cpu" else GPU_FACTOR


def bands(height: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """The rows of a map of that height and so many numbers, as many at a time as make a band."""
    step = max(1, BAND * _times(device) * height // numbers)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


def order_of(x: Tensor) -> torch.memory_format:
    """NHWC or, where both would do, NCHW."""
    is_nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_nhwc else torch.contiguous_format


def with_halo(x: Tensor, rows: slice) -> tuple[Tensor, int]:
    """Rows with the one before and the one behind, as far as there are any; and where the first one lies."""
    start = max(rows.start - 1, 0)
    return x[:, :, start : rows.stop + 1], start


def convolve_normed(norm: nn.Module, conv: nn.Conv2d, x: Tensor, *zq: Tensor) -> Tensor:
    """conv(F.silu(norm(x, *zq))), conv being 3×3 with padding 1: (b, c, h, w) -> (b, c_out, h, w)"""
    scale, shift = affine(norm, x, *zq)
    shape = (len(x), conv.out_channels, *x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order_of(x))
    for rows in bands(x.shape[2], max(x.numel(), out.numel()), x.device):
        band, start = with_halo(x, rows)
        band = F.silu(applied(band, start, x.shape[2], scale, shift)).to(x.dtype)
        out[:, :, rows] = conv(band)[:, :, rows.start - start : rows.stop - start]
    return out


def affine(norm: nn.Module, x: Tensor, *zq: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm does to this map: times the first, plus the second, (b, c, h/s, w/s) float32 each."""
    group_norm = norm.norm_layer if zq else norm
    groups = x.unflatten(1, (group_norm.num_groups, -1)).unbind(1)
    moments = [torch.var_mean(group.float(), dim=(1, 2, 3), correction=0) for group in groups]
    var, mean = (torch.stack(m, dim=1).repeat_interleave(groups[0].shape[1], 1) for m in zip(*moments))
    scale = group_norm.weight.float() * (var + group_norm.eps).rsqrt()
    shift = group_norm.bias.float() - mean * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]
    if zq:
        y = norm.conv_y(*zq).float()
        scale, shift = scale * y, shift * y + norm.conv_b(*zq).float()
    return scale, shift


def applied(band: Tensor, start: int, height: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift, each spread over its square of pixels, on the rows of a map that begin at `start`."""
    if scale.shape[2:] == (1, 1):
        return torch.addcmul(shift, band, scale)
    rows = torch.arange(start, start + band.shape[2], device=band.device) * scale.shape[2] // height
    scale, shift = (a[:, :, rows, :, None] for a in (scale, shift))
    squares = rearrange(band, "b c h (w s) -> b c h w s", w=scale.shape[3])
    into = torch.empty_like(squares, dtype=scale.dtype)  # else in an order in which the rest is no view
    return rearrange(torch.addcmul(shift, squares, scale, out=into), "b c h w s -> b c h (w s)")
