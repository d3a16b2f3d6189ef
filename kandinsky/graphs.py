"""A step of the U-Net or the prior, or MoVQ's decoding, as one CUDA graph: many kernels launched by one call.

A graph repeats the same kernels on the same memory. So what it reads is copied into buffers that stay where
they are: what changes at each call (the sample, scale and shift of the U-Net's blocks, the prior's timestep),
and what a whole loop keeps (keys and values, the hint's features) when these are other tensors than before.
It is captured anew when a size changes, a weight lies elsewhere than before, or `attention` is another
function in `kandinsky.unet`, `.prior` or `.movq`. It does not notice what is written into a plan or a cache
in place, nor what else is changed inside the blocks: `restore` the network for that.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from kandinsky import movq as movqs
from kandinsky import prior as priors
from kandinsky import unet as unets
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior, PriorCache
from kandinsky.unet import Conditioning, Plan, UNet

WARM_UP = 3  # runs before a capture, in which libraries choose their kernels


class _Graphed(nn.Module):
    """A network whose `graph` is replayed on a CUDA device, but where there are hooks or gradients."""

    MADE = ("graph", "decoded")  # what `restore` takes away

    def replayed(
        self, rests_on: list, compute: Callable[..., Tensor], changing: list[Tensor], kept: list[Tensor]
    ) -> Tensor:
        """compute(*changing, *kept), of which `kept` are the same tensors in most calls."""
        graph = vars(self).get("graph")
        if graph is None or not graph.fits(rests_on, changing, kept):
            self.graph = graph = None  # its memory is free before the next is captured
            self.graph = graph = Graph(rests_on, compute, changing, kept)
        return graph.replay(changing, kept)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.graph = None
        return super()._apply(fn, recurse)


class GraphedUNet(_Graphed, UNet):
    def step(self, x: Tensor, plan: Plan, index: int) -> Tensor:
        rests_on = dependencies(self, x)
        if rests_on is None:
            return super().step(x, plan, index)
        given = self.conditioning(plan, index)
        changing = {block: pair for block, pair in given.items() if block not in plan.added}
        hints = [] if plan.hint_features is None else [plan.hint_features]
        blocks, hinted = [*changing, *plan.added], bool(hints)

        def compute(x: Tensor, *rest: Tensor) -> Tensor:
            given = dict(zip(blocks, zip(rest[::2], rest[1::2])))
            return self.denoise(x, given, rest[-1] if hinted else None)

        kept = [*chain(*plan.added.values()), *hints]
        return self.replayed(rests_on, compute, [x, *chain(*changing.values())], kept)

    def _modulations(self, temb: Tensor) -> Conditioning:
        """In memory of their own: only such a list is copied by one kernel."""
        made = super()._modulations(temb)
        return {block: (scale.contiguous(), shift.contiguous()) for block, (scale, shift) in made.items()}


class GraphedPrior(_Graphed, Prior):
    def step(self, x: Tensor, t: Tensor, cache: PriorCache) -> Tensor:
        rests_on = dependencies(self, x)
        if rests_on is None:
            return super().step(x, t, cache)

        def compute(x: Tensor, t: Tensor, mask: Tensor, *rest: Tensor) -> Tensor:
            return Prior.step(self, x, t, PriorCache(list(zip(rest[::2], rest[1::2])), mask))

        return self.replayed(rests_on, compute, [x, t], [cache.mask, *chain(*cache.keys_values)])


class GraphedMoVQ(_Graphed, MoVQ):
    """From the second decoding of a size on: a single picture is not worth a capture."""

    def decode(self, latents: Tensor) -> Tensor:
        rests_on = dependencies(self, latents)
        again, self.decoded = vars(self).get("decoded") == latents.shape, latents.shape
        if rests_on is None or not again:
            return super().decode(latents)
        return self.replayed(rests_on, lambda z: MoVQ.decode(self, z), [latents], [])


class Graph:
    """What was captured, and the buffers that it reads."""

    @torch.inference_mode(False)  # the buffers are written to in later calls, whatever mode these run in
    @torch.no_grad()
    def __init__(
        self, rests_on: list, compute: Callable[..., Tensor], changing: list[Tensor], kept: list[Tensor]
    ):
        self.changing, self.kept = ([tensor.clone() for tensor in given] for given in (changing, kept))
        self.copied, self.rests_on = [TensorWeakRef(tensor) for tensor in kept], rests_on
        with torch.cuda.device_of(self.changing[0]):
            self.run, self.out = capture(lambda: compute(*self.changing, *self.kept))

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the network captures its own."""

    def fits(self, rests_on: list, changing: list[Tensor], kept: list[Tensor]) -> bool:
        given, buffers = changing + kept, self.changing + self.kept
        return rests_on == self.rests_on and [*map(form, given)] == [*map(form, buffers)]

    def replay(self, changing: list[Tensor], kept: list[Tensor]) -> Tensor:
        copy_all(self.changing, changing)
        if any(tensor is not copied() for tensor, copied in zip(kept, self.copied)):
            copy_all(self.kept, kept)
            self.copied = [TensorWeakRef(tensor) for tensor in kept]
        self.run()
        return self.out.clone()


def dependencies(network: nn.Module, x: Tensor) -> list[Any] | None:
    """What a graph rests on: the attention, and where each weight lies. None where a graph does not do: on a
    CPU, with gradients or hooks."""
    if not x.is_cuda or torch.is_grad_enabled():
        return None
    pointers, modules = [], [network]
    # asked at each step, where `network.modules()` and `parameters()` take five times as long; the list grows
    for module in modules:
        if module is None:
            continue
        of = vars(module)
        if of["_forward_hooks"] or of["_forward_pre_hooks"]:
            return None
        for weight in of["_parameters"].values():
            if weight is not None:
                pointers.append(weight.data_ptr())
        modules += of["_modules"].values()
    return [unets.attention, priors.attention, movqs.attention, *pointers]


def form(x: Tensor) -> tuple[torch.Size, torch.dtype]:
    return x.shape, x.dtype


def copy_all(into: list[Tensor], out_of: list[Tensor]) -> None:
    """The tensors of one dtype in one call."""
    for dtype in {tensor.dtype for tensor in into}:
        pairs = [pair for pair in zip(into, out_of) if pair[0].dtype == dtype]
        torch._foreach_copy_(*map(list, zip(*pairs)))


def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """-> what computes it again, and where the result then lies"""
    stream = torch.cuda.Stream()  # of the current device; a capture's own default one is of the first used
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = compute()
    return graph.replay, out
