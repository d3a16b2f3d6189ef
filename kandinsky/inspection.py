"""Looking into a running network, and changing what passes through it, by the names its weights have.

    with record(pipe.unet, "mid_block.*") as seen:  # seen["mid_block.attentions.0"]: a tensor for each call
        pipe.text2img("a red cat")

    with edit(pipe.unet, {"encoder_hid_proj": torch.zeros_like}):  # the decoder without its image tokens
        pipe.text2img("a red cat")

Built on PyTorch's own hooks, which are gone after the block, also after an exception. A run in which nothing
is changed gives the same bits as one that is not looked at. In an optimized network too (a compiled one runs
uncompiled meanwhile: hooks of your own inside its blocks would not be called); but there the
convolution that a merged upsampling stands for is not called, nor on CUDA norm1 and norm2 of the U-Net's
residual blocks; MoVQ's attention has no map, and its spatial norms' conv_y and conv_b give maps of the
latent's size.
"""

import difflib
import fnmatch
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky import encoders, movq, prior, unet
from kandinsky.optimize import ChunkedAttention, uncalled

Change = Callable[[Any], Any]


def module_names(model: nn.Module, pattern: str) -> list[str]:
    """The submodules whose names match, in the order of the network; `*` stands for any part of a name.

    Raises:
        ValueError: none does, and the message names the three nearest; or all that do are not in use, or only
            hold others.
    """
    names = [name for name, _ in model.named_modules() if name]
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if found:
        modules = [model.get_submodule(name) for name in found]
        if uncalled(model).issuperset(modules):
            why = "is not called in an optimized network; kandinsky.optimize.restore(network) first"
            raise ValueError(f"{pattern} {why}")
        if all(type(module).forward is nn.Module.forward for module in modules):
            kind = type(modules[0]).__name__
            raise ValueError(f"{pattern} is a {kind}, which only holds others: {pattern}.*")
        return found
    nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    raise ValueError(
        f"{type(model).__name__} has no module called {pattern!r}; nearest are {', '.join(nearest)}"
    )


class Record(dict):
    """Name of a module -> what it gave (or took) in each call, oldest first, on the CPU.

    dropped: how many values the limit kept out: from the first that does not fit on, all.
    """

    def __init__(self, names: Iterable[str], limit: int):
        super().__init__((name, []) for name in names)
        self.dropped, self._room = 0, limit

    def add(self, name: str, make: Callable[[], Any], size: int | None = None) -> None:
        """Keeps what `make` gives, of `size` bytes; None: what it turns out to have."""
        if not self.dropped and (size or 0) <= self._room:
            value = make()
            size = _num_bytes(value) if size is None else size
            if size <= self._room:
                self._room -= size
                self[name].append(value)
                return
        self.dropped += 1


@contextmanager
def record(
    model: nn.Module,
    patterns: str | list[str],
    inputs: bool = False,
    keep: Callable[[Tensor], Any] | None = None,
    limit: int = 2**28,
) -> Iterator[Record]:
    """Collects what modules compute while the block runs.

    Args:
        model: a network, or any part of one.
        patterns: names of modules; `*` stands for any part.
        inputs: their first arguments in place of their results.
        keep: is done to each tensor, and its result kept; None: a copy on the CPU.
        limit: bytes kept at most; what comes later is counted in `dropped`.

    Raises:
        ValueError: a pattern that no module matches; before anything runs.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = dict.fromkeys(name for pattern in patterns for name in module_names(model, pattern))
    seen = Record(names, limit)

    def note(name: str, value: Any) -> None:
        value = _first_tensor(value)
        if value is None:
            return
        if keep is None:
            seen.add(name, lambda: value.detach().to("cpu", copy=True), value.nbytes)
        else:
            seen.add(name, lambda: keep(value))

    with _hooks(model) as hooks:
        for name in names:
            hooks.append(_hook(model.get_submodule(name), partial(note, name), inputs))
        yield seen


@contextmanager
def edit(model: nn.Module, changes: Mapping[str, Change], inputs: bool = False) -> Iterator[None]:
    """Changes what modules compute while the block runs.

    Args:
        changes: name of a module (`*` stands for any part) -> a function from its result, as the module gives
            it, to another of the same form. Several for one module are done in their order.
        inputs: the functions are from the tuple of its arguments to another.

    Raises:
        ValueError: a name that no module matches; before anything runs.
    """
    pairs = [(name, change) for pattern, change in changes.items() for name in module_names(model, pattern)]
    with _hooks(model) as hooks:
        for name, change in pairs:
            hooks.append(_hook(model.get_submodule(name), change, inputs))
        yield


def _hook(module: nn.Module, do: Change, inputs: bool) -> Any:
    """`do` gets what the module gives, or is given; what it returns, if anything, takes the place of that."""
    if inputs:
        return module.register_forward_pre_hook(lambda module, args: do(args))
    return module.register_forward_hook(lambda module, args, out: do(out))


@contextmanager
def _hooks(model: nn.Module) -> Iterator[list]:
    """A list whose hooks are removed at the end. Compiled blocks call none, so they run plain meanwhile."""
    hooks: list = []
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _first_tensor(value: Any) -> Tensor | None:
    """Of a module's result or arguments: the tensor itself, or the first within."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((found for found in map(_first_tensor, value) if found is not None), None)
    return None


def _num_bytes(value: Any) -> int:
    """That stay in memory with it; of a tensor all that it is a part of."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    parts = value.values() if isinstance(value, Mapping) else value
    own = sys.getsizeof(value)
    return own + sum(map(_num_bytes, parts)) if isinstance(value, (Mapping, tuple, list)) else own


def attention_weights(q: Tensor, k: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """As `layers.attention` weighs values: (b, n, c), (b, m, c) -> (b, heads, n, m), rows sum to one"""
    b, n, c = q.shape
    q, k = (x.float().unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k))
    scores = q @ k.mT / (c // num_heads) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


def _attends(module: nn.Module) -> bool:
    """Whether it calls `layers.attention`: MoVQ's chunked form does not."""
    known = any(hasattr(module, name) for name in ("to_q", "q_proj", "query"))
    return known and not isinstance(module, ChunkedAttention)


@contextmanager
def attention_maps(
    model: nn.Module,
    patterns: str | list[str],
    keep: Callable[[Tensor], Any] | None = None,
    limit: int = 2**28,
) -> Iterator[Record]:
    """Collects where attention looks: for each matching module with an attention of its own, and each call,
    (b, heads, n, m) float32 on the CPU, rows summing to one.

    In the U-Net the first 32 of the m are the image tokens, the others the map's positions, row by row; the
    2.2 decoder sees no words. In the prior n are the tokens of that call, the last the read-out.
    keep: is done to each map, and its result kept in its place.

    Raises:
        ValueError: a pattern that no attention module matches.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = dict.fromkeys(name for pattern in patterns for name in module_names(model, pattern))
    names = [name for name in names if _attends(model.get_submodule(name))]
    if not names:
        what = "has an attention whose map can be seen (MoVQ's has none while it is optimized)"
        raise ValueError(f"no module called {', '.join(patterns)} of {type(model).__name__} {what}")
    seen, inside = Record(names, limit), threading.local()

    def stack() -> list[str]:
        """The modules that this thread is in; others may run networks that nobody looks at."""
        return vars(inside).setdefault("names", [])

    def look(q: Tensor, k: Tensor, num_heads: int, mask: Tensor | None) -> None:
        if stack() and keep is not None:
            seen.add(stack()[-1], lambda: keep(attention_weights(q, k, num_heads, mask).detach()))
        elif stack():
            size = 4 * q.shape[0] * num_heads * q.shape[1] * k.shape[1]
            seen.add(stack()[-1], lambda: attention_weights(q, k, num_heads, mask).detach().cpu(), size)

    with _hooks(model) as hooks, _watching(look):
        for name in names:
            module = model.get_submodule(name)
            hooks.append(
                module.register_forward_pre_hook(lambda module, args, name=name: stack().append(name))
            )
            hooks.append(
                module.register_forward_hook(
                    lambda module, args, out: stack().pop() and None, always_call=True
                )
            )
        yield seen


_opening = threading.Lock()
_looking: list[Callable] = []  # what each `attention_maps` that is open, in any thread, does at a call
_unwatched: dict[ModuleType, Callable] = {}  # by module that calls it, the attention without that


def _watched(original: Callable) -> Callable:
    def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
        for look in tuple(_looking):
            look(q, k, num_heads, mask)
        return original(q, k, v, num_heads, mask)

    return attention


@contextmanager
def _watching(look: Callable[[Tensor, Tensor, int, Tensor | None], None]) -> Iterator[None]:
    """`look` sees what `layers.attention` gets, wherever that is called."""
    with _opening:
        if not _looking:
            for module in (encoders, movq, prior, unet):
                _unwatched[module], module.attention = module.attention, _watched(module.attention)
        _looking.append(look)
    try:
        yield
    finally:
        with _opening:
            _looking.remove(look)
            if not _looking:
                for module, original in _unwatched.items():
                    module.attention = original
