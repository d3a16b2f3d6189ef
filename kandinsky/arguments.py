"""Where the user's input enters: every check is here, made once, before any weight is read where possible.

Each function gives the value in the form that the rest of the package works with, or raises a ValueError or
TypeError of one line: what was given, what is allowed, what to do.
"""

import functools
import inspect
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What users of diffusers bring, and what it is called here.
_DIFFUSERS_NAMES = {
    "generator": "seed=, an int or one per image",
    "image_embeds": "embeds=ImageEmbeds(image_embeds, negative_image_embeds)",
    "negative_image_embeds": "embeds=ImageEmbeds(image_embeds, negative_image_embeds)",
    "callback": "on_step=, called with a Step after each step",
    "callback_steps": "on_step=, called with a Step after each step",
    "callback_on_step_end": "on_step=, called with a Step after each step",
    "callback_on_step_end_tensor_inputs": "on_step=, called with a Step after each step",
    "prior_callback_on_step_end": "embed(on_step=), then embeds=",
    "return_dict": "what is returned: a list of images, a tensor or ImageEmbeds, never a dict",
    "torch_dtype": "dtype=",
    "subfolder": "the network's own folder, as FOLDER/unet",
    "variant": "dtype=: the official files exist in one form only, and are cast when read",
    "prior_latents": "embed(latents=), then embeds=",
    "num_steps": "num_inference_steps=",
    "steps": "num_inference_steps=",
}

_OUT_OF_MEMORY = (
    "out of memory; in this order try: keep_loaded=False (--low-memory), dtype=torch.bfloat16 "
    "(--dtype bfloat16), for pictures beyond 512 px optimize() (--optimize), fewer images per call, "
    "a smaller height and width, another device"
)
# what devices say that have no class of error for it: the CPU, MPS, CUDA's libraries
_SAYS_NO_MEMORY = re.compile("DefaultCPUAllocator|out of memory|_ALLOC_FAILED|can't allocate memory")


def with_argument_help(method: Callable) -> Callable:
    """Foreign arguments, as users of diffusers bring them, get a message that helps."""

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        known_names(method, kwargs)
        return method(*args, **kwargs)

    return checked


def known_names(method: Callable, names: Iterable[str]) -> None:
    """Raises where one is no argument of the method, and says what to use."""
    parameters = inspect.signature(method).parameters
    known = [name for name in parameters if name not in ("self", "cls")]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in names:
        if name not in known and not takes_any:
            ours = _DIFFUSERS_NAMES.get(name, f"one of {', '.join(known)}")
            raise TypeError(f"{method.__name__}() has no argument {name!r}; use {ours}")


def public(method: Callable) -> Callable:
    """For the pipeline's methods: the same, and of running out of memory what to try."""
    helped = with_argument_help(method)

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return helped(*args, **kwargs)
        except RuntimeError as error:
            if lacks_memory(error):
                raise MemoryError(f"{_OUT_OF_MEMORY} ({str(error).splitlines()[0]})") from error
            raise

    return checked


def lacks_memory(error: RuntimeError) -> bool:
    """Whether it says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_SAYS_NO_MEMORY.search(str(error)))


def folder(path: Any, what: str) -> Path:
    """An existing local folder; hub ids get a message about downloading."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{what} is {type(path).__name__}; a path to a folder is needed")
    if Path(path).is_dir():
        return Path(path)
    text = str(path)
    if is_hub_id(path):
        model = "2.1" if re.search("2[-.]1", text) else "2.2"
        raise ValueError(
            f"{what}: {text!r} looks like a hub id and is no local folder; nothing is downloaded here: run "
            f"`python scripts/download_weights.py {model}` and pass the folder it fills"
        )
    raise ValueError(f"{what}: no folder at {text!r}")


def writable(place: Path, path: Path | None = None) -> Path:
    """A folder to write to, which may still have to be made. path: what is to be written, if not the folder

    Raises:
        OSError: it, or the nearest folder around it that there is, cannot be written to.
    """
    nearest = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    try:
        with TemporaryFile(dir=nearest):
            return place
    except OSError:
        said = f"{path or place} cannot be written: {nearest} is not a folder that can be written to"
        raise OSError(said) from None


def is_hub_id(path: Any) -> bool:
    """Whether it looks like a repository's name, and not like a path."""
    text = str(path)
    return text.count("/") == 1 and "kandinsky" in text.lower() and not Path(text).parent.is_dir()


def device(value: Any) -> torch.device:
    """A device that can be used on this machine."""
    try:
        chosen = torch.device(value)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {shown(value)} cannot be used here: {reason[:200]}") from None
    if chosen.type == "meta":
        raise ValueError("device 'meta' holds no numbers; use 'cpu', 'cuda' or 'mps'")
    return chosen


def index_of(chosen: torch.device) -> int:
    """Which device of its kind: without a number, the one that CUDA takes then, or the first."""
    if chosen.index is None and chosen.type == "cuda":
        return torch.cuda.current_device()
    return chosen.index or 0


def dtype(value: Any) -> torch.dtype:
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(value, torch.dtype) or value not in allowed:
        raise ValueError(f"dtype is {shown(value)}; allowed are {', '.join(map(str, allowed))}")
    return value


def instance(value: Any, name: str, classes: tuple[type, ...]) -> Any:
    """A value of one of the classes."""
    if not isinstance(value, classes):
        needed = " or ".join(c.__name__ for c in classes)
        raise TypeError(f"{name} is a {type(value).__name__}; a {needed} is needed")
    return value


def prompts(value: Any, name: str = "prompt") -> list[str]:
    """A string or a list of strings -> a list of at least one string."""
    if isinstance(value, str):
        return [text(value, name)]
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        return [text(v, name) for v in value]
    if hasattr(value, "image_embeds"):
        raise TypeError(f"{name} is an {type(value).__name__}, which the tasks take as embeds=")
    given = f"a {type(value).__name__}"
    if isinstance(value, (list, tuple)):
        others = [type(v).__name__ for v in value if not isinstance(v, str)]
        given = f"{given} with a {others[0]} in it" if others else f"an empty {type(value).__name__}"
    raise TypeError(f"{name} is {given}; a string or a list of strings is needed")


def text(value: Any, name: str) -> str:
    """One string. Lone surrogates, which Python makes of a command line's bytes that are not UTF-8, are
    refused."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}; one string is needed")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(
            f"{name} is {value!r}, which is no text: it has bytes that are not UTF-8, or half a character"
        )
    return value


def negative_prompts(value: Any, count: int) -> list[str] | None:
    """None, or one negative prompt for each prompt; a single one goes with all."""
    if value is None:
        return None
    listed = prompts(value, "negative_prompt")
    if len(listed) not in (1, count):
        raise ValueError(f"{len(listed)} negative prompts for {count} prompts; give one, or as many")
    return listed * count if len(listed) == 1 else listed


def shown(value: Any) -> str:
    """Its repr for a message: in one line, and of a tensor or a picture's levels no more than the start."""
    line = " ".join(repr(value).split())
    return line if len(line) <= 80 else f"{line[:80]}…"


def whole(value: Any, name: str, low: int = 1, high: int | None = None) -> int:
    """An int in low..high."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {shown(value)} of type {type(value).__name__}; an int is needed")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} is {value}; allowed is {low} {'and more' if high is None else f'to {high}'}"
        )
    return int(value)


def number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite real number in low..high."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {shown(value)} of type {type(value).__name__}; a number is needed")
    try:
        as_float = float(value)
    except OverflowError:  # an int that no float reaches
        as_float = math.inf
    if not math.isfinite(as_float):
        raise ValueError(f"{name} is {as_float}; a finite number is needed")
    if not low <= as_float <= high:
        raise ValueError(
            f"{name} is {value}; allowed is {low} {'and more' if high == math.inf else f'to {high}'}"
        )
    return as_float


def share(value: Any, name: str) -> float:
    """A number in [0, 1]."""
    return number(value, name, 0, 1)


def interval(value: Any, name: str) -> tuple[float, float]:
    """Two numbers in [0, 1], the first not above the second."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} is {shown(value)}; two numbers, (start, stop), are needed")
    start, stop = (share(x, name) for x in value)
    if start > stop:
        raise ValueError(f"{name} is {tuple(value)}; it starts after it stops")
    return start, stop


def batch(**counts: int) -> int:
    """How many rows lists of such lengths make: all are equal, but one alone goes with all of the others."""
    count = max(counts.values())
    if any(n not in (1, count) for n in counts.values()):
        given = ", ".join(f"{n} {name}" for name, n in counts.items())
        raise ValueError(f"{given}: lists must be of equal length; one alone goes with all")
    return count


def flag(value: Any, name: str) -> bool:
    """True or False, or a number or numpy's bool that equals one of them."""
    if not isinstance(value, (bool, Integral, np.bool_)) or value not in (0, 1):
        raise TypeError(f"{name} is {shown(value)}; True or False is needed")
    return bool(value)


def is_false(value: Any) -> bool:
    """Whether a function of a Step said that it is enough: False, also numpy's or a tensor's."""
    if isinstance(value, Tensor):
        return value.dtype == torch.bool and value.numel() == 1 and not value
    return isinstance(value, (bool, np.bool_)) and not value


def function(value: Any, name: str) -> Callable | None:
    """What can be called, or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} is a {type(value).__name__}; a function of a Step is needed")
    return value


def output_type(value: Any, allowed: tuple[str, ...]) -> str:
    """One of those allowed; "np", which diffusers has, is told how to be made."""
    if isinstance(value, str) and value == "np":
        raise ValueError(
            "output_type is 'np'; use 'pt', (b, 3, h, w): .permute(0, 2, 3, 1).cpu().numpy() makes it "
            'diffusers\' "np"'
        )
    return choice(value, "output_type", allowed)


def choice(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """One of the strings allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {shown(value)}; allowed are {', '.join(map(repr, allowed))}")
    return value


def seeds(value: Any, count: int) -> list[int]:
    """One seed per image: an int counts up from image to image, a list is taken as it is, None is drawn.

    Drawn from the operating system, so that no global random state is touched.
    """
    if value is None:
        value = secrets.randbelow(2**32)
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{len(value)} seeds for {count} images; give one int, or one seed per image")
        return [whole(seed, "seed", 0, 2**64 - 1) for seed in value]
    first = whole(value, "seed", 0, 2**64 - count)
    return [first + i for i in range(count)]


def noise(value: Any, shapes: tuple[tuple[int, ...], ...]) -> Tensor | None:
    """`latents`: noise of one of the shapes, as float32 in memory of its own; None stays None."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        needed = " or ".join(map(str, shapes))
        raise TypeError(f"latents is a {type(value).__name__}; a tensor of {needed} is needed")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"latents is {tuple(value.shape)}; needs {' or '.join(map(str, shapes))}")
    if not value.is_floating_point() or not value.isfinite().all():
        raise ValueError("latents must be floating point and finite")
    return value.detach().to(torch.float32, copy=True)


def embeddings(value: Any, dim: int, name: str) -> Tensor:
    """(b, d) CLIP embeddings of a checkpoint whose width is dim."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; a tensor of (b, {dim}) is needed")
    if value.ndim != 2 or value.shape[1] != dim or not len(value):
        raise ValueError(f"{name} is {tuple(value.shape)}; this checkpoint needs (b, {dim})")
    if not value.is_floating_point() or not value.isfinite().all():
        raise ValueError(f"{name} must be floating point and finite")
    return value.detach().float()
