"""`scheduler_config.json`: read into a scheduler of `kandinsky.schedulers`, and written from one."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky.checkpoint import CheckpointError, read_json
from kandinsky.schedulers import DDIMScheduler, DDPMScheduler, Scheduler, UnCLIPScheduler

DECODER_SCHEDULERS = (DDPMScheduler, DDIMScheduler)
PRIOR_SCHEDULERS = (UnCLIPScheduler,)


@dataclass(frozen=True)
class Layout:
    """A scheduler's file."""

    # name: (constructor argument, what diffusers takes where it is missing)
    fields: dict[str, tuple[str, Any]]
    fixed: dict[str, str]  # the one value that is modelled
    ignored: tuple[str, ...] = ()


_DECODER_FIELDS = {
    "num_train_timesteps": ("num_train_steps", 1000),
    "beta_start": ("beta_start", 0.0001),
    "beta_end": ("beta_end", 0.02),
    "clip_sample": ("clip_sample", True),
    "clip_sample_range": ("clip_sample_range", 1.0),
    "thresholding": ("thresholding", False),
    "dynamic_thresholding_ratio": ("dynamic_thresholding_ratio", 0.995),
    "sample_max_value": ("sample_max_value", 1.0),
    "steps_offset": ("steps_offset", 0),
}
_DECODER_FIXED = {"beta_schedule": "linear", "prediction_type": "epsilon", "timestep_spacing": "leading"}
LAYOUTS = {
    DDPMScheduler: Layout(
        _DECODER_FIELDS | {"variance_type": ("variance_type", "fixed_small")},
        _DECODER_FIXED,
        ignored=("set_alpha_to_one",),  # the official 2.2 files carry it; DDPM has no use for it
    ),
    DDIMScheduler: Layout(
        _DECODER_FIELDS | {"set_alpha_to_one": ("set_alpha_to_one", True)},
        _DECODER_FIXED,
        ignored=("variance_type",),  # DDPM's; diffusers' DDIM keeps it when made from DDPM's config
    ),
    UnCLIPScheduler: Layout(
        {
            "num_train_timesteps": ("num_train_steps", 1000),
            "clip_sample": ("clip_sample", True),
            "clip_sample_range": ("clip_sample_range", 1.0),
        },
        {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "sample",
            "variance_type": "fixed_small_log",
        },
    ),
}

# Allowed values, both ends included
_RANGES = {
    "num_train_timesteps": (1, 10**6),
    "beta_start": (1e-9, 0.999),
    "beta_end": (1e-9, 0.999),
    "clip_sample_range": (1e-9, math.inf),
    "dynamic_thresholding_ratio": (1e-9, 1.0),
    "sample_max_value": (1.0, math.inf),
    "steps_offset": (0, 999),
}


def from_config(
    published: dict[str, Any],
    source: str = "scheduler_config.json",
    allowed: tuple[type, ...] = DECODER_SCHEDULERS + PRIOR_SCHEDULERS,
) -> Scheduler:
    """Builds the scheduler that a published file names.

    A field the file lacks has diffusers' default, which is not always ours. Raises a CheckpointError for
    another class, or a value that is not modelled here.
    """
    name, names = published.get("_class_name"), [c.__name__ for c in allowed]
    if name not in names:
        raise CheckpointError(f"{source}: _class_name is {name!r}; allowed are {', '.join(names)}")
    scheduler_class = allowed[names.index(name)]
    layout = LAYOUTS[scheduler_class]
    for name, value in published.items():
        wanted = layout.fixed.get(name)
        known = name.startswith("_") or name in layout.fields or name in layout.ignored
        if known or value == wanted or (wanted is None and value is False):
            continue
        raise CheckpointError(f"{source}: {name} is {value!r}; only {wanted or 'null or false'} is supported")
    if scheduler_class is UnCLIPScheduler and "prediction_type" not in published:
        raise CheckpointError(
            f"{source} lacks prediction_type, which then means 'epsilon'; only sample is supported"
        )
    values = {}
    for name, (argument, default) in layout.fields.items():
        value = published.get(name, default)
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise CheckpointError(f"{source}: {name} is {value!r}; a {type(default).__name__} is needed")
        low, high = _RANGES.get(name, (None, None))
        if low is not None and not low <= value <= high:
            raise CheckpointError(f"{source}: {name} is {value}; allowed is {low} to {high}")
        values[argument] = value
    try:
        return scheduler_class(**values)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def to_config(scheduler: Scheduler) -> dict[str, Any]:
    """The published file's fields for a scheduler; diffusers' class of that name loads them."""
    layout = LAYOUTS[type(scheduler)]
    names = {name: getattr(scheduler, argument) for name, (argument, _) in layout.fields.items()}
    return {"_class_name": type(scheduler).__name__, **names, **layout.fixed}


def load_scheduler(
    folder: str | Path, allowed: tuple[type, ...] = DECODER_SCHEDULERS + PRIOR_SCHEDULERS
) -> Scheduler:
    """Reads `scheduler_config.json` in a folder; a missing or wrong file is a CheckpointError."""
    path = Path(folder) / "scheduler_config.json"
    return from_config(read_json(path), str(path), allowed)
