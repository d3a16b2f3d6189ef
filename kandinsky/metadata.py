"""The settings that made a picture, kept in its PNG file: written, read back, checked.

Under the key `kandinsky` stands JSON with the whole call, from which the picture can be made again; beside it
`parameters`, the text that picture viewers and web UIs read. A stranger's file is checked like any input: its
size, every name, type and range; no path is in it, and nothing it names is opened.
"""

import copy
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from kandinsky.images import MAX_PIXELS
from kandinsky.masks import WIDEST
from kandinsky.request import LONGEST_SIDE

KEY = "kandinsky"
MAX_LENGTH = 2**18
INPUTS = {"image", "mask_image", "hint", "lora"}
SAMPLERS = {"dpm++": "DPM++ 2M"}  # by the name that others know
_BLOCK = 2**16
# arguments that older pictures do not have, and what they were then
_LATER = {"sampler": None, "guidance_interval": [0.0, 1.0], "cache_every": 1}

Check = Callable[[Any], bool]


class SettingsError(ValueError):
    """A PNG whose settings are missing, or not what this package writes."""


def describe(
    pipe: Any, task: str, call: dict[str, Any], index: int, inputs: dict[str, list[Path]], lora_scale: float
) -> dict:
    """All that repeats a call, and which of its pictures this is.

    Args:
        pipe: the `Kandinsky` that made it. task: the name of its method, or "mix".
        call: the method's arguments but for the pictures; `seed` lists every image's.
        inputs: the files of the pictures passed, by argument, and of the LoRAs. lora_scale: theirs.
    """
    folders = {"decoder": pipe.decoder_folder, "prior": pipe.prior_folder}
    return {
        "format": 1,
        "task": task,
        "index": index,
        "call": call,
        "inputs": {name: [_file(path) for path in paths] for name, paths in inputs.items()},
        "lora_scale": lora_scale,
        "checkpoint": {name: folder and _checkpoint(folder) for name, folder in folders.items()},
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "optimisation": "exact" if pipe.is_optimized else None,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        "sampler": sampler_name(pipe, call.get("sampler")),
        "versions": versions(),
    }


def sampler_name(pipe: Any, sampler: str | None) -> str:
    """Of the decoder; None: the checkpoint's scheduler"""
    return SAMPLERS.get(sampler) or type(pipe.scheduler).__name__.removesuffix("Scheduler")


def versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("kandinsky")
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        own = "unknown"
    return {"kandinsky": own, "torch": torch.__version__}


def _file(path: Path) -> dict[str, str]:
    path = Path(path)
    whole = checkpoint_hash(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": path.name, "sha256": whole}


def _checkpoint(folder: Path) -> dict[str, str]:
    return {"name": Path(folder).resolve().name, "hash": checkpoint_hash(folder)}


def checkpoint_hash(folder: Path) -> str:
    """A sha256 over a checkpoint's files: their names, sizes and contents.

    Of a file above 8 MiB 128 blocks of 64 KiB are read, evenly spaced: enough to tell trained weights apart
    in a moment, no proof against forgery.
    """
    digest = hashlib.sha256()
    kinds = (".json", ".safetensors", ".txt")
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in kinds and p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(_BLOCK, size // 128)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def texts(settings: dict, size: tuple[int, int]) -> dict[str, str]:
    """What to keep in the PNG, by key. size: the picture's width and height."""
    return {KEY: json.dumps(settings), "parameters": _parameters(settings, size)}


def _parameters(settings: dict, size: tuple[int, int]) -> str:
    call, decoder = settings["call"], settings["checkpoint"]["decoder"]
    row = settings["index"] // call["num_images_per_prompt"]
    negative = call["negative_prompt"]
    negative = negative[row % len(negative)] if isinstance(negative, list) else negative
    prompts = call["prompt"] or [""]
    prompt = " + ".join(prompts) if settings["task"] == "mix" else prompts[row % len(prompts)]
    fields = {
        "Steps": call["num_inference_steps"],
        "Sampler": settings["sampler"],
        "CFG scale": call["guidance_scale"],
        "Seed": call["seed"][settings["index"] % len(call["seed"])],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": decoder["hash"][:10],
        "Model": decoder["name"],
    }
    if "strength" in call:
        fields["Denoising strength"] = call["strength"]
    last = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), last])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value


def read(path: Path) -> dict:
    """The settings of a PNG that `describe` and `texts` made, every value checked.

    Raises:
        SettingsError: no PNG, no settings in it, or not the names, types and ranges that are written here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(KEY)  # reads what stands before the pixels
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError(f"{path} is not a whole PNG picture ({error})") from None
    if not isinstance(text, str):
        raise SettingsError(f"{path} holds no settings of this package")
    if len(text) > MAX_LENGTH:
        raise SettingsError(f"{path}: {_too_long(len(text))}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the settings in {path} are not JSON ({error})") from None
    if isinstance(settings, dict) and isinstance(settings.get("call"), dict):
        for name, value in _LATER.items():
            settings["call"].setdefault(name, copy.copy(value))
    found = _problem(settings, _FIELDS, "settings") or _problem_across(settings)
    if found:
        raise SettingsError(f"{path}: {found}")
    return settings


def problem(settings: dict) -> str | None:
    """Why `read` would refuse what `describe` made; None where it would not."""
    written = json.dumps(settings)
    if len(written) > MAX_LENGTH:
        return _too_long(len(written))
    settings = json.loads(written)  # tuples are lists there
    return _problem(settings, _FIELDS, "settings") or _problem_across(settings)


def _too_long(length: int) -> str:
    return f"the settings are {length} characters; at most {MAX_LENGTH} are read"


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _text(length: int) -> Check:
    return lambda value: isinstance(value, str) and len(value) <= length


def _many(check: Check, low: int = 1) -> Check:
    return lambda value: isinstance(value, list) and low <= len(value) <= 1000 and all(map(check, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _one_of(*allowed: Any) -> Check:
    return lambda value: any(type(value) is type(a) and value == a for a in allowed)


def _hex(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _device(value: Any) -> bool:
    kind, _, number = value.partition(":") if isinstance(value, str) else ("", "", "")
    return kind in ("cpu", "cuda", "mps", "xpu") and (not number or (number.isdecimal() and len(number) < 3))


_PROMPT, _STEPS = _text(20_000), _whole(1, 1000)
_SIDE = _or_none(_whole(1, LONGEST_SIDE))
_COMMON = {
    "prompt": _or_none(_many(_PROMPT)),
    "negative_prompt": lambda value: value is None or _PROMPT(value) or _many(_PROMPT)(value),
    "num_images_per_prompt": _whole(1, 1000),
    "guidance_scale": _number,
    "num_inference_steps": _STEPS,
    "sampler": _one_of(None, *SAMPLERS),
    "guidance_interval": lambda value: _many(_share)(value) and len(value) == 2 and value[0] <= value[1],
    "cache_every": _STEPS,
    "prior_num_inference_steps": _STEPS,
    "prior_guidance_scale": _number,
    "seed": _many(_whole(0, 2**64 - 1)),
    "height": _SIDE,
    "width": _SIDE,
}
_FLAG = _one_of(True, False)
_PIXELS = _whole(0, WIDEST)
CALLS = {
    "text2img": _COMMON,
    "img2img": _COMMON | {"strength": _share},
    "inpaint": _COMMON
    | {"keep_unmasked": _FLAG, "invert_mask": _FLAG, "grow_mask": _PIXELS, "feather_mask": _PIXELS},
    "mix": _COMMON
    | {
        "prompt": _many(_PROMPT, 0),
        "weights": _many(_number),
        "negative_prior_prompt": _or_none(_PROMPT),
        "frames": _or_none(_whole(2, 1000)),
    },
}
_FILE = {"name": _text(255), "sha256": _hex}
_CHECKPOINT = {"name": _text(255), "hash": _hex}
_FIELDS = {
    "format": _one_of(1),
    "task": _one_of(*CALLS),
    "index": _whole(0, 10**6),
    "call": lambda value: isinstance(value, dict),
    "inputs": lambda value: isinstance(value, dict) and set(value) <= INPUTS,
    "lora_scale": _number,
    "checkpoint": lambda value: isinstance(value, dict),
    "dtype": _one_of("float32", "bfloat16", "float16"),
    "optimisation": _one_of(None, "exact"),
    "device": _device,
    "threads": _whole(1, 1024),
    "sampler": _one_of("DDPM", "DDIM", *SAMPLERS.values()),
    "versions": lambda value: not _problem(value, {"kandinsky": _text(100), "torch": _text(100)}, ""),
}


def _problem(value: Any, fields: dict[str, Check], name: str) -> str | None:
    """What is wrong with an object that must have exactly these fields; None where nothing is."""
    if not isinstance(value, dict):
        return f"{name} is a {type(value).__name__}, not an object"
    for wrong, which in (
        (value.keys() - fields.keys(), "unknown"),
        (fields.keys() - value.keys(), "missing"),
    ):
        if wrong:
            return f"{name}: {which} {', '.join(sorted(repr(key)[:40] for key in wrong)[:8])}"
    bad = [key for key, check in fields.items() if not check(value[key])]
    return f"{name}: {bad[0]} is {str(value[bad[0]])[:60]!r}, which is not allowed" if bad else None


def _problem_across(settings: dict) -> str | None:
    """What the fields' own checks do not see: the task's call, the files and folders, the amount of work."""
    call = settings["call"]
    problem = _problem(call, CALLS[settings["task"]], "call")
    for name, files in settings["inputs"].items():
        if not isinstance(files, list) or not 1 <= len(files) <= 1000:
            return f"inputs: {name} is not a list of files"
        problem = problem or next((p for p in (_problem(f, _FILE, name) for f in files) if p), None)
    checkpoint = settings["checkpoint"]
    problem = problem or _problem(
        checkpoint, dict.fromkeys(("decoder", "prior"), lambda _: True), "checkpoint"
    )
    for name in () if problem else ("decoder", "prior"):
        if checkpoint[name] is not None or name == "decoder":
            problem = problem or _problem(checkpoint[name], _CHECKPOINT, name)
    if problem:
        return problem
    if (call["height"] or 1) * (call["width"] or 1) > MAX_PIXELS:
        return f"{call['width']}×{call['height']} pixels are more than {MAX_PIXELS // 10**6} megapixels"
    count = 1 if call.get("frames") else len(call["seed"])
    return None if settings["index"] < count else f"index is {settings['index']} of {count} pictures"
