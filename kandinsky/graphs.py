"""A step of the U-Net or the prior, or MoVQ's decoding, as one CUDA graph: many kernels launched by one call.

A graph repeats the same kernels on the same memory. So what it reads is copied into buffers that stay where
they are: what changes at each call (the sample, scale and shift of the U-Net's blocks, the prior's timestep),
and what a whole loop keeps (keys and values, the hint's features) when these are other tensors than before.
It is captured anew when a size changes, a weight lies elsewhere than before, or `attention` is another
function in `kandinsky.unet`, `.prior` or `.movq`. It does not notice what is written into a plan or a cache
in place, nor what else is changed inside the blocks: `restore` the network for that.

What a graph gives is compared once with what it was captured from. Where it differs, or nothing can be
captured (a changed block that asks the GPU for a number, no memory), the network goes on without, and a
warning says why.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules
from torch.utils.weak import TensorWeakRef

from kandinsky import movq as movqs
from kandinsky import prior as priors
from kandinsky import unet as unets
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior, PriorCache
from kandinsky.unet import Conditioning, Plan, UNet

WARM_UP = 3  # runs before a capture, in which libraries choose their kernels
LARGEST_DECODING = 2**15  # numbers in the latents: two pictures of 512 px
MOST_FAILURES = 8  # of a network, after which nothing further is tried

capturing = Lock()


class NoGraph(RuntimeError):
    """Nothing could be captured, or a replay computes something else."""


class Graphs(list):
    """A list that is empty in a copy of the network, which has to capture its own."""

    def __reduce__(self) -> tuple:
        return Graphs, ()


class _Graphed(nn.Module):
    """A network whose `graphs` are replayed on a CUDA device, but where there are hooks or gradients."""

    MADE = ("graphs", "failed", "decoded")  # what `restore` takes away

    def replayed(
        self, rests_on: list, compute: Callable[..., Tensor], changing: list[Tensor], kept: list[Tensor]
    ) -> Tensor:
        """compute(*changing, *kept), of which `kept` are the same tensors in most calls."""
        asked = [rests_on, *map(form, (*changing, *kept))]
        graphs = vars(self).setdefault("graphs", Graphs())
        graph = next((graph for graph in graphs if graph.asked == asked), None)
        failed = vars(self).setdefault("failed", Graphs())
        if graph is None and asked not in failed and len(failed) < MOST_FAILURES:
            graph = self._captured(asked, compute, changing, kept)
        return compute(*changing, *kept) if graph is None else graph.replay(changing, kept)

    def _captured(self, asked: list, *given: Any) -> "Graph | None":
        """Beside one that differs in its rows alone: with guidance in a part of the loop both take turns. The
        memory of others is free before."""
        rests_on, (shape, _) = asked[:2]
        self.graphs[:] = [g for g in self.graphs if g.asked[0] == rests_on and g.asked[1][0][1:] == shape[1:]]
        del self.graphs[:-1]
        try:
            graph = Graph(asked, *given)
            self.graphs.append(graph)
            return graph
        except FloatingPointError:
            return None  # the run ends with one, or its next input is better
        except NoGraph as error:
            reason = str(error)
        # not in the `except`, where what has failed would keep its memory
        self.failed.append(asked)
        warnings.warn(f"{type(self).__name__[7:]} runs without a graph: {reason}", stacklevel=2)
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        for made in self.MADE:
            vars(self).pop(made, None)
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
    def prefill(self, text_embeds: Tensor, text_states: Tensor, text_mask: Tensor) -> PriorCache:
        """As long for every prompt, so that one graph does for all; what is added is masked."""
        cache = super().prefill(text_embeds, text_states, text_mask)
        if dependencies(self, text_embeds) is None:
            return cache
        missing = self.config.num_embeddings + 1 - cache.mask.shape[1]
        longer = [tuple(F.pad(x, (0, 0, 0, missing)) for x in pair) for pair in cache.keys_values]
        return PriorCache(longer, F.pad(cache.mask, (0, missing)))

    def step(self, x: Tensor, t: Tensor, cache: PriorCache) -> Tensor:
        rests_on = dependencies(self, x)
        if rests_on is None:
            return super().step(x, t, cache)

        def compute(x: Tensor, t: Tensor, mask: Tensor, *rest: Tensor) -> Tensor:
            return Prior.step(self, x, t, PriorCache(list(zip(rest[::2], rest[1::2])), mask))

        return self.replayed(rests_on, compute, [x, t], [cache.mask, *chain(*cache.keys_values)])


class GraphedMoVQ(_Graphed, MoVQ):
    """From the second decoding of a size on, be it of the same batch, which comes in groups: a single picture
    is not worth a capture. Large ones take longer than the launches of their kernels, and would keep the
    memory of a decoding."""

    def decode(self, latents: Tensor) -> Tensor:
        rests_on = dependencies(self, latents)
        # of one size, as those of another take its graph's place; in any numbers of rows
        decoded = {shape for shape in vars(self).get("decoded", ()) if shape[1:] == latents.shape[1:]}
        again, self.decoded = latents.shape in decoded, decoded | {latents.shape}
        if latents.numel() > LARGEST_DECODING:
            vars(self).pop("graphs", None)
            return super().decode(latents)
        known = any(graph.asked[1] == form(latents) for graph in vars(self).get("graphs", ()))
        if rests_on is None or not (again or known):
            return super().decode(latents)
        return self.replayed(rests_on, lambda z: MoVQ.decode(self, z), [latents], [])


class Graph:
    """What was captured, and the buffers that it reads. asked: what it rests on, and each input's form."""

    @torch.inference_mode(False)  # the buffers are written to in later calls, whatever mode these run in
    @torch.no_grad()
    def __init__(
        self, asked: list, compute: Callable[..., Tensor], changing: list[Tensor], kept: list[Tensor]
    ):
        self.asked, self.copied = asked, [TensorWeakRef(tensor) for tensor in kept]
        self.replaying = Lock()  # the buffers are one for all threads, which share a stream
        try:
            self.changing, self.kept = ([tensor.clone() for tensor in given] for given in (changing, kept))
            with torch.cuda.device_of(self.changing[0]):
                self.run, self.out, expected = capture(lambda: compute(*self.changing, *self.kept))
                self.run()
        except RuntimeError as error:  # no memory, mostly
            raise NoGraph(one_line(error)) from error
        if not expected.isfinite().all():
            raise FloatingPointError("nothing to compare a graph with")
        if not alike(self.out, expected):
            raise NoGraph("a replay gave something else than what was captured")

    def replay(self, changing: list[Tensor], kept: list[Tensor]) -> Tensor:
        with self.replaying:
            copy_all(self.changing, changing)
            if any(tensor is not copied() for tensor, copied in zip(kept, self.copied)):
                copy_all(self.kept, kept)
                self.copied = [TensorWeakRef(tensor) for tensor in kept]
            self.run()
            return self.out.clone()


def dependencies(network: nn.Module, x: Tensor) -> list[Any] | None:
    """What a graph rests on: the attention, and where each weight lies. None where a graph does not do: on a
    CPU, with gradients or hooks, where PyTorch casts the weights for a while, or someone else captures."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return None
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return None
    if torch.cuda.is_current_stream_capturing():
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
        merged = of.get("merged")  # a block's own kernels, which are no parameter and made anew by `_apply`
        if merged is not None and merged.weight is not None:
            pointers.append(merged.weight.data_ptr())
        modules += of["_modules"].values()
    return [unets.attention, priors.attention, movqs.attention, *pointers]


def form(x: Tensor) -> tuple[torch.Size, torch.dtype]:
    return x.shape, x.dtype


def copy_all(into: list[Tensor], out_of: list[Tensor]) -> None:
    """The tensors of one dtype in one call."""
    for dtype in {tensor.dtype for tensor in into}:
        pairs = [pair for pair in zip(into, out_of) if pair[0].dtype == dtype]
        torch._foreach_copy_(*map(list, zip(*pairs)))


def alike(x: Tensor, y: Tensor) -> bool:
    """Up to what other sums leave in half precision."""
    x, y = x.double(), y.double()
    return bool((x - y).norm() <= 0.02 * y.norm())


@cache
def side_stream(device: int) -> torch.cuda.Stream:
    """The one to capture on: cuBLAS keeps memory for every stream."""
    return torch.cuda.Stream(device)


def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor, Tensor]:
    """-> what computes it again, where the result then lies, and the result"""
    before, stream = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
    with capturing:  # the side stream is one for all threads
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                expected = compute()
        before.wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                out = compute()
        except Exception as error:  # of many kinds, and the same is computed without
            clean_up(stream, pool)
            torch.cuda.set_stream(before)  # a capture that fails stays on its own
            raise NoGraph(one_line(error.__context__ or error)) from error
    return graph.replay, out, expected


def clean_up(stream: torch.cuda.Stream, pool: Any) -> None:
    """What most versions of PyTorch leave behind when a capture fails: memory still comes from its pool, and
    stays there, and CUDA's own random numbers wait for its end, until another capture ends."""
    with suppress(Exception):  # where there is nothing to do, the first line says so
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros(1, device=stream.device)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
