"""The U-Net's step, and the prior's, as one CUDA graph: its many kernels are launched by one call.

A graph repeats the same kernels on the same memory. So all that changes between steps (the sample, scale and
shift of the U-Net's blocks, the prior's timestep; with a new plan or prompt the keys and values and the
hint's features too) is copied into buffers that stay where they are. It is captured anew when a size changes,
a weight lies elsewhere than before, or `attention` is another function in `kandinsky.unet` or `.prior`. Other
patches inside the blocks it does not notice.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky import prior as priors
from kandinsky import unet as unets
from kandinsky.prior import Prior, PriorCache
from kandinsky.unet import Conditioning, Plan, UNet

WARM_UP = 3  # runs before a capture, in which libraries choose their kernels


class _Graphed(nn.Module):
    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.graph = None
        return super()._apply(fn, recurse)


class GraphedUNet(_Graphed, UNet):
    """A U-Net on a CUDA device whose `step` replays a graph, but where there are hooks or gradients."""

    def step(self, x: Tensor, plan: Plan, index: int) -> Tensor:
        if not can_replay(self, x):
            return super().step(x, plan, index)
        given, graph = self.conditioning(plan, index), vars(self).get("graph")
        if graph is None or not graph.fits(self, x, given, plan):
            self.graph = graph = None  # its memory is free before the next is captured
            self.graph = graph = StepGraph(self, x, given, plan)
        return graph.replay(x, given, plan)


class GraphedPrior(_Graphed, Prior):
    """A prior, likewise."""

    def step(self, x: Tensor, t: Tensor, cache: PriorCache) -> Tensor:
        if not can_replay(self, x):
            return super().step(x, t, cache)
        graph = vars(self).get("graph")
        if graph is None or not graph.fits(self, x, t, cache):
            self.graph = graph = None
            self.graph = graph = PriorGraph(self, x, t, cache)
        return graph.replay(x, t, cache)


def can_replay(network: nn.Module, x: Tensor) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    return x.is_cuda and not torch.is_grad_enabled() and not hooked


class StepGraph:
    """A captured step of the U-Net, and the buffers that it reads."""

    @torch.inference_mode(False)  # the buffers are written to in later calls, whatever mode these run in
    @torch.no_grad()
    def __init__(self, unet: UNet, x: Tensor, given: Conditioning, plan: Plan):
        self.x, self.plan, self.computes = x.clone(), weakref.ref(plan), what_computes(unet)
        self.given = {block: (a.clone(), b.clone()) for block, (a, b) in given.items()}
        self.hint_features = None if plan.hint_features is None else plan.hint_features.clone()
        self.run, self.out = capture(lambda: unet.denoise(self.x, self.given, self.hint_features))

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the network captures its own."""

    def fits(self, unet: UNet, x: Tensor, given: Conditioning, plan: Plan) -> bool:
        if x.shape != self.x.shape or what_computes(unet) != self.computes:
            return False
        hinted = (plan.hint_features is None) == (self.hint_features is None)
        return plan is self.plan() or (hinted and shapes(given) == shapes(self.given))

    def replay(self, x: Tensor, given: Conditioning, plan: Plan) -> Tensor:
        new = [] if plan is self.plan() else [*plan.added]
        if new and plan.hint_features is not None:
            self.hint_features.copy_(plan.hint_features)
        changed = [block for block in given if block in new or block not in plan.added]
        into = [tensor for block in changed for tensor in self.given[block]]
        torch._foreach_copy_([self.x, *into], [x, *(tensor for block in changed for tensor in given[block])])
        self.plan = weakref.ref(plan)
        self.run()
        return self.out.clone()


class PriorGraph:
    """A captured step of the prior, and the buffers that it reads."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, prior: Prior, x: Tensor, t: Tensor, cache: PriorCache):
        self.x, self.t, self.computes = x.clone(), t.clone(), what_computes(prior)
        self.known = PriorCache([(k.clone(), v.clone()) for k, v in cache.keys_values], cache.mask.clone())
        self.copied = weakref.ref(cache.mask), weakref.ref(cache.keys_values[0][0])  # of which prompt
        self.run, self.out = capture(lambda: Prior.step(prior, self.x, self.t, self.known))

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the network captures its own."""

    def fits(self, prior: Prior, x: Tensor, t: Tensor, cache: PriorCache) -> bool:
        alike = cache.mask.shape == self.known.mask.shape and x.shape == self.x.shape
        return alike and t.dtype == self.t.dtype and what_computes(prior) == self.computes

    def replay(self, x: Tensor, t: Tensor, cache: PriorCache) -> Tensor:
        self.t.copy_(t)
        self.x.copy_(x)
        parts = cache.mask, cache.keys_values[0][0]
        if any(part is not copied() for part, copied in zip(parts, self.copied)):
            self.known.mask.copy_(cache.mask)
            into, out_of = (sum(map(list, c.keys_values), []) for c in (self.known, cache))
            torch._foreach_copy_(into, out_of)
            self.copied = tuple(weakref.ref(part) for part in parts)
        self.run()
        return self.out.clone()


def what_computes(network: nn.Module) -> list[Any]:
    """The attention, and where each weight lies."""
    pointers = (parameter.data_ptr() for parameter in network.parameters())
    return [unets.attention, priors.attention, *pointers]


def shapes(given: Conditioning) -> list[tuple[torch.Size, torch.Size]]:
    return [(a.shape, b.shape) for a, b in given.values()]


def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """-> what computes it again, and where the result then lies"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()
    return graph.replay, out
