"""Linear and convolution weights in the order that oneDNN's kernels read them, for the CPU.

PyTorch lays a weight out anew at each call; a packed layer does it once, a convolution again for maps that
ask for another order. The prior's large linear layers, which see few rows at a time, are packed as 1×1
convolutions. The packed weight takes the plain one's place in memory: `layer.weight` keeps its shape, dtype
and device but holds NaN, and is made again for saving, casting, and wherever a gradient is asked for. The
operators are PyTorch's own, those that its compiler emits, but private: `available` tells whether they are
there.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NO_NEW_WEIGHTS = "an optimized network takes no new weights; kandinsky.optimize.restore(network) first"
PACKABLE = (torch.float32, torch.bfloat16)  # oneDNN has no float16 kernels on most CPUs


def available() -> bool:
    """Whether this PyTorch has the operators, and oneDNN."""
    needed = (
        "_reorder_linear_weight",
        "_linear_pointwise",
        "_convolution_pointwise",
        "_is_mkldnn_bf16_supported",
    )
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in needed)
    return (
        has_operators
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and torch.backends.mkldnn.is_available()
    )


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has kernels for a weight of this kind."""
    if weight.device.type != "cpu" or weight.dtype not in PACKABLE or not available():
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Shared:
    """What is derived from a weight, so that copies of a layer share it; its tensors are never written to."""

    def __deepcopy__(self, memo: dict) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("an optimized network cannot be pickled; kandinsky.optimize.restore(network) first")


class PackedWeight(Shared):
    """A linear layer's weight in oneDNN's order."""

    def __init__(self, weight: Tensor):
        """weight: (c_out, c_in)"""
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(weight)

    def plain(self) -> Tensor:
        """To the last bit what was packed."""
        return self.tensor.to_dense()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.tensor, bias, "none", [], "")


class PackedForFewRows(Shared):
    """A linear layer's weight as that of a 1×1 convolution, whose pixels are the rows.

    A product of few rows takes as long as its weight takes to come from memory. With AVX2, in float32, a
    convolution reads it up to half as fast again as a linear layer: 2048 × 8192 numbers in 4.7 ms for 6.3,
    with 6 rows in a map of one line and 8 columns. The order that oneDNN asks for depends on the maps, but of
    large weights not on how many of them there are, of one of the `WIDTHS`. Where it does all the same, a
    narrower map is taken.
    """

    WIDTHS = (32, 16, 8, 4)
    WHERE = ((0, 0), (1, 1), (1, 1), 1)  # padding, stride, dilation, groups
    SMALLEST = 2**20  # numbers in a weight
    MOST_THREADS = 8  # with more the order does depend on the width

    def __init__(self, weight: Tensor):
        """weight: (c_out, c_in)"""
        kernel = weight[:, :, None, None]
        self.tensor = packed_for((1, weight.shape[1], 1, min(self.WIDTHS)), kernel, self.WHERE)
        self.order = order_of(self.tensor)

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        """Whether it is known to be faster, and orders can be told apart."""
        is_large = weight.dtype == torch.float32 and weight.numel() >= cls.SMALLEST
        has_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
        few_threads = torch.get_num_threads() <= cls.MOST_THREADS
        return is_large and has_avx2 and few_threads and can_tell_orders()

    def plain(self) -> Tensor:
        """To the last bit what was packed."""
        return self.tensor.to_dense().flatten(1)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        width = self.width(len(rows))
        if width is None:
            return F.linear(x, self.plain(), bias)
        maps = F.pad(rows, (0, 0, 0, -len(rows) % width)).unflatten(0, (-1, 1, width)).permute(0, 3, 1, 2)
        out = torch.ops.mkldnn._convolution_pointwise(maps, self.tensor, bias, *self.WHERE, "none", [], "")
        return out.permute(0, 2, 3, 1).flatten(0, 2)[: len(rows)].view(*x.shape[:-1], -1)

    def width(self, num_rows: int) -> int | None:
        """Of the widest map that reads this order and is not half empty."""
        for width in self.WIDTHS:
            if width < 2 * num_rows or width == min(self.WIDTHS):
                maps = (-(-num_rows // width), self.tensor.shape[1], 1, width)
                if order_for(maps, self.tensor, self.WHERE) == self.order:
                    return width
        return None


def can_tell_orders() -> bool:
    """Whether this PyTorch names the order that a packed weight is in."""
    return hasattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md")


def packed_for(maps: tuple[int, ...], kernel: Tensor, where: tuple) -> Tensor:
    """A convolution's weight in the order that is best for maps of this shape.

    where: padding, stride, dilation and groups
    """
    return torch._C._nn.mkldnn_reorder_conv2d_weight(kernel.to_mkldnn(), *where, maps)


def order_of(packed: Tensor) -> bytes:
    """The name of a packed weight's order."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


def order_for(maps: tuple[int, ...], packed: Tensor, where: tuple) -> bytes:
    """The name of the order that is best for maps of this shape, for a weight like this."""
    return _order_for(maps, packed.shape, packed.dtype, where, torch.get_num_threads())


@lru_cache(maxsize=4096)
def _order_for(
    maps: tuple[int, ...], kernel: tuple[int, ...], dtype: torch.dtype, where: tuple, num_threads: int
) -> bytes:
    """num_threads: of this thread, on which it depends"""
    return order_of(packed_for(maps, torch.empty(kernel, dtype=dtype, device="cpu"), where))


class Placeholder(nn.Parameter):
    """Stands where a packed weight was: its shape and dtype, and one number, NaN."""

    def __new__(cls, weight: Tensor) -> "Placeholder":
        nothing = torch.full((1,), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        return super().__new__(cls, nothing, weight.requires_grad)

    def __deepcopy__(self, memo: dict) -> "Placeholder":
        return memo.setdefault(id(self), Placeholder(self))


class PackedKernel(Shared):
    """A convolution's weight, in the order that is best for the map that it met last.

    The order depends on batch, height and width. In one made for others a call can take ten times as long
    as with the plain weight: oneDNN then lays it out anew each time, and slowly. So a weight is packed when
    it is first called, and again for maps that ask for another order.
    """

    def __init__(self, weight: Tensor, stride: Any, padding: Any, dilation: Any):
        """weight: (c_out, c_in, k, k), which it keeps"""
        self.where = (tuple(padding), tuple(stride), tuple(dilation), 1)
        # the shape of the maps that it is packed for, none yet
        self.current: tuple[torch.Size | None, Tensor] = (None, weight)

    def __deepcopy__(self, memo: dict) -> "PackedKernel":
        """Shares the tensor until the copy meets other maps."""
        other = object.__new__(type(self))
        other.where, other.current = self.where, self.current
        return memo.setdefault(id(self), other)

    @property
    def dtype(self) -> torch.dtype:
        return self.current[1].dtype

    def plain(self) -> Tensor:
        """To the last bit what was packed; not to be written to."""
        return self.current[1].to_dense()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        shape, tensor = self.current
        if shape != x.shape:
            known = shape is not None and can_tell_orders()
            if not known or order_for(x.shape, tensor, self.where) != order_of(tensor):
                tensor = packed_for(x.shape, self.plain(), self.where)
            self.current = (x.shape, tensor)
        bias = None if bias is None else bias.detach()
        return torch.ops.mkldnn._convolution_pointwise(x, tensor, bias, *self.where, "none", [], "")


def wants_gradient(x: Tensor, weight: Tensor) -> bool:
    """The packed operators have no backward pass; where one may come, the plain ones run."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


class Packed:
    """What the two packed layers share."""

    packed: PackedWeight | PackedForFewRows | PackedKernel

    def unpack(self) -> None:
        """Makes it the plain layer that it was."""
        self.weight = nn.Parameter(self.packed.plain().clone(), requires_grad=self.weight.requires_grad)
        del self.packed
        self.__class__ = next(plain for plain, other in WITH_PACKED.items() if isinstance(self, other))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.packed.plain()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(NO_NEW_WEIGHTS)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Casts and moves the weight itself; it is packed again where that is possible."""
        sees_few_rows = isinstance(self.packed, PackedForFewRows)
        self.unpack()
        self._apply(fn, recurse)
        pack(self, sees_few_rows)
        return self


class PackedLinear(Packed, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if wants_gradient(x, self.weight):
            return F.linear(x, self.packed.plain(), self.bias)
        return self.packed(x, None if self.bias is None else self.bias.detach())


class PackedConv2d(Packed, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if wants_gradient(x, self.weight):
            where = (self.stride, self.padding, self.dilation)
            return F.conv2d(x, self.packed.plain(), self.bias, *where)
        return self.packed(x, self.bias)


WITH_PACKED = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


@torch.no_grad()
def pack(layer: nn.Module, sees_few_rows: bool = False) -> bool:
    """Packs a plain Linear or Conv2d of one group on the CPU, in place; whether it was one."""
    if type(layer) not in WITH_PACKED or not can_pack(layer.weight):
        return False
    weight = layer.weight
    if type(layer) is nn.Conv2d:
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return False
        # a copy: until it is called it would keep the weights' whole file mapped
        packed = PackedKernel(weight.detach().clone(), layer.stride, layer.padding, layer.dilation)
    else:
        form = PackedForFewRows if sees_few_rows and PackedForFewRows.fits(weight) else PackedWeight
        packed = form(weight.detach().contiguous())
    layer.weight = Placeholder(weight)
    layer.__class__, layer.packed = WITH_PACKED[type(layer)], packed
    return True
