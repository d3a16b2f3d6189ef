"""3×3 convolutions with a quarter of the multiplications: Winograd's, F(4×4, 3×3) of arXiv:1509.09308.

    tiles of 6×6 inputs ─ B·Bᵀ → 36 matrices (tiles, c_in) ─ each times a (c_in, c_out) → 36 × (tiles, c_out)
                                                            ─ A·Aᵀ → tiles of 4×4 outputs

The products are of polynomials, evaluated at 0, ±1, ±2 and infinity. The weight takes 36 numbers for each 9,
so only layers that meet large maps use it. For float32 on the CPU; half precision would lose too much, 3e-2.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky.packed import PackedConv2d, Shared, wants_gradient

NARROWEST = 192  # input channels: at 128, moving the tiles costs more than the multiplications saved
WIDEST = 768  # output channels: wider layers have the largest weights and meet the smallest maps
FEWEST_TILES = 32  # with fewer, reading the larger weight costs more than the multiplications saved
MOST_TILES = 192  # at a time, 21 MB of 768 channels: beyond 32 MiB the system clears new memory at each call

_INPUT = [
    [4.0, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_KERNEL = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_OUTPUT = [[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def _both_ways(matrix: list[list[float]]) -> Tensor:
    """A transform along one axis -> the one along rows and columns, in float64"""
    one = torch.tensor(matrix, dtype=torch.float64, device="cpu")
    return torch.kron(one, one)


TO_TILES, TO_KERNELS, TO_OUTPUTS = map(_both_ways, (_INPUT, _KERNEL, _OUTPUT))


def transform_kernel(weight: Tensor) -> Tensor:
    """(c_out, c_in, 3, 3) -> (36, c_in, c_out)"""
    taps = rearrange(weight.detach().double(), "o i h w -> (h w) (i o)")
    return (TO_KERNELS @ taps).float().unflatten(1, (weight.shape[1], weight.shape[0]))


class Kernel(Shared):
    """A convolution's weight, transformed."""

    def __init__(self, weight: Tensor):
        self.tensor = transform_kernel(weight)


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """With padding 1; kernel: from `transform_kernel`. (b, c_in, h, w) -> (b, c_out, h, w)"""
    b, _, h, w = x.shape
    rows, columns = -(-h // 4), -(-w // 4)
    x = x.permute(0, 2, 3, 1)  # (b, h, w, c_in)
    out = x.new_empty(b, rows, 4, columns, 4, kernel.shape[2])
    band = max(1, MOST_TILES // (b * columns))  # rows of tiles
    for first in range(0, rows, band):
        last = min(first + band, rows)
        above, below = 1 if first == 0 else 0, max(4 * last + 1 - h, 0)
        inputs = x[:, max(4 * first - 1, 0) : 4 * last + 1]
        inputs = F.pad(inputs, (0, 0, 1, 4 * columns + 1 - w, above, below))
        torch.add(_convolve_tiles(inputs, kernel), 0 if bias is None else bias, out=out[:, first:last])
    out = rearrange(out, "b y i x j o -> b (y i) (x j) o")
    return out[:, :h, :w].permute(0, 3, 1, 2)


def _convolve_tiles(x: Tensor, kernel: Tensor) -> Tensor:
    """(b, 4·rows + 2, 4·columns + 2, c_in) -> (b, rows, 4, columns, 4, c_out)"""
    tiles = x.unfold(1, 6, 4).unfold(2, 6, 4)  # (b, rows, columns, c_in, 6, 6)
    b, rows, columns = tiles.shape[:3]
    tiles = rearrange(tiles, "b y x c i j -> (b y x) (i j) c")
    tiles = torch.bmm(TO_TILES.float().expand(len(tiles), -1, -1), tiles)
    products = torch.bmm(tiles.transpose(0, 1), kernel)  # (36, tiles, c_out)
    out = TO_OUTPUTS.float() @ products.flatten(1)
    return rearrange(out, "(i j) (b y x o) -> b y i x j o", i=4, b=b, y=rows, x=columns)


class WinogradConv2d(PackedConv2d):
    """A packed convolution that is computed this way where the map is large enough."""

    def forward(self, x: Tensor) -> Tensor:
        if wants_gradient(x, self.weight) or x.shape[0] * x.shape[2] * x.shape[3] < 16 * FEWEST_TILES:
            return super().forward(x)
        return convolve(x, self.kernel.tensor, None if self.bias is None else self.bias.detach())

    def unpack(self) -> None:
        del self.kernel
        super().unpack()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if fits(self):
            use(self)
        return self


def fits(layer: nn.Module) -> bool:
    """Whether a packed layer can be computed this way, and gains."""
    return (
        type(layer) is PackedConv2d
        and layer.packed.dtype == torch.float32
        and (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        == ((3, 3), (1, 1), (1, 1), (1, 1))
        and NARROWEST <= layer.in_channels
        and layer.out_channels <= WIDEST
    )


@torch.no_grad()
def use(layer: PackedConv2d) -> None:
    layer.kernel, layer.__class__ = Kernel(layer.packed.plain()), WinogradConv2d
