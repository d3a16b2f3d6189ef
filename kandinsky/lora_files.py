"""LoRA files: every layout that Kandinsky's LoRAs come in, read by one rule, and the one that is written.

Each changed layer has two tensors, down (r, in) and up (out, r), and its weight becomes
W + alpha / r · up @ down. What differs is how the two are called and where alpha stands:

    down_blocks.1.attentions.0.processor.to_q_lora.down.weight      diffusers' old scripts; alpha = r
    …processor.add_k_proj_lora.down.weight                          the authors' and older ones; alpha = r
    down_blocks.1.attentions.0.to_q.lora_A.weight                   peft's names; alpha in the file's header
    unet.down_blocks.1.attentions.0.to_q.lora.down.weight           Stable Diffusion's scripts; either alpha
    base_model.model.down_blocks.1.attentions.0.to_q.lora_A.weight  peft's own; alpha in adapter_config.json

A file may mix them, so each key is read by itself, and the network it belongs to is told by the key too. What
is not understood to the last key is refused: a LoRA that is loaded in part draws a picture that looks right.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kandinsky import arguments
from kandinsky.checkpoint import CheckpointError, is_pickle, open_safetensors, read_json, write_safetensors

FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
HEADER_KEY = "lora_adapter_metadata"  # of the header of peft's layout: its config as JSON
HEADS = {  # the top-level modules of either network that hold layers
    "prior": """transformer_blocks encoder_hidden_states_proj embedding_proj proj_in proj_to_clip_embeddings
    time_embedding""".split(),
    "unet": """down_blocks mid_block up_blocks conv_in conv_out add_embedding encoder_hid_proj
    time_embedding""".split(),
}

_PREFIX = re.compile(r"(base_model\.model\.|unet\.)*")
_KEY = re.compile(r"(?P<module>.+?)(?:[._]lora\.(?P<old>down|up)|\.lora_(?P<new>A|B))\.weight")
_HALVES = {"down": "down", "A": "down", "up": "up", "B": "up"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# peft's config: what is modelled, what must have a value of these, what changes no number once trained. All
# else must be null, false or empty.
_MODELLED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
_ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (True, False, None),
    # the other ways to begin change the base's weights too
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_HARMLESS = set(
    """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
    exclude_modules lora_dropout layers_to_transform layers_pattern megatron_core qalora_group_size eva_config
    ensure_weight_tying runtime_config""".split()
)


class Factors(NamedTuple):
    """The change of one layer: W + alpha / rank · up @ down, float32."""

    down: Tensor  # (r, in), or (r, in, kh, kw) of a convolution
    up: Tensor  # (out, r), or (out, r, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


def read_lora(path: str | Path) -> dict[str, dict[str, Factors]]:
    """Reads a LoRA file, or the one in a folder.

    Returns:
        By network ("prior", "unet"), by the layer's name in it.

    Raises:
        CheckpointError: the file is a pickle, of a layout that is not read (kohya, DoRA), or not understood
            to the last key; the message names file and keys.
    """
    path = lora_file(path)
    file = open_safetensors(path)
    places = _places(list(file.keys()), path)
    config, source = _peft_config(file.metadata() or {}, list(file.keys()), path)
    layers = {}
    for name, halves in places.items():
        down, up = (_read(file, halves[half], path) for half in ("down", "up"))
        if down.ndim < 2 or up.ndim < 2 or not len(down) or up.shape[1] != len(down):
            raise CheckpointError(f"{path}: {name} has down {tuple(down.shape)} and up {tuple(up.shape)}")
        layers[name] = Factors(down, up, _alpha(config, name, len(down), source))
    return _by_network(layers, path)


def write_lora(layers: dict[str, Factors], path: str | Path) -> None:
    """Writes peft's layout with its config in the header, as diffusers' `save_lora_adapter` does."""
    if Path(path).suffix in _PICKLES:
        raise ValueError(f"{path}: the file is no pickle; give it the suffix .safetensors")
    tensors = {}
    for name, factors in layers.items():
        tensors |= {f"{name}.lora_A.weight": factors.down, f"{name}.lora_B.weight": factors.up}
    first = next(iter(layers.values()))
    ranks = {f"^{re.escape(n)}": f.rank for n, f in layers.items() if f.rank != first.rank}
    alphas = {f"^{re.escape(n)}": f.alpha for n, f in layers.items() if f.alpha != first.alpha}
    config = {"peft_type": "LORA", "r": first.rank, "lora_alpha": first.alpha, "target_modules": list(layers)}
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas, "bias": "none"}
    config |= {"use_rslora": False, "use_dora": False, "lora_bias": False}
    write_safetensors(tensors, Path(path), {HEADER_KEY: json.dumps(config, indent=2, sort_keys=True)})


def lora_file(path: str | Path) -> Path:
    """The safetensors file that a path means; pickles are refused by name."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path is {type(path).__name__}; a LoRA file or folder is needed")
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).exists()]
        found = found or sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            raise CheckpointError(f"{path} holds {', '.join(f.name for f in found)}; pass one of them")
        pickles = sorted(f for f in path.iterdir() if f.suffix in _PICKLES)
        if not found and not pickles:
            raise CheckpointError(f"{path} holds no safetensors file")
        path = found[0] if found else pickles[0]
    if path.is_file() and (path.suffix in _PICKLES or is_pickle(path)):
        convert = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)"
        raise CheckpointError(
            f"{path} is a pickle, which is never loaded here; `{convert}` makes one that is"
        )
    return path


def listed(problems: list[str]) -> str:
    """The first few, and how many more."""
    return "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")


def _read(file: Any, key: str, path: Path) -> Tensor:
    """One tensor in float32, in memory of its own."""
    tensor = file.get_tensor(key)
    if not tensor.is_floating_point() or not tensor.float().isfinite().all():
        raise CheckpointError(f"{path}: {key} must be floating point and finite")
    return tensor.to(torch.float32, copy=True)


def _places(keys: list[str], path: Path) -> dict[str, dict[str, str]]:
    """By layer, the file's keys of its two halves; layers and halves in their plain names."""
    _check_kind(keys, path)
    places, problems = {}, []
    for key in sorted(keys):
        match = _KEY.fullmatch(key[_PREFIX.match(key).end() :])
        if match is None:
            problems.append(f"unknown key {key}")
            continue
        name = match["module"].replace(".processor.", ".")
        name = f"{name}.0" if name.endswith(".to_out") else name
        halves = places.setdefault(name, {})
        half = _HALVES[match["old"] or match["new"]]
        if half in halves:
            problems.append(f"{key} says the same as {halves[half]}")
        halves[half] = key
    problems += [f"unpaired key {next(iter(h.values()))}" for h in places.values() if len(h) == 1]
    if problems:
        raise CheckpointError(f"{path}: {listed(problems)}")
    return places


def _check_kind(keys: list[str], path: Path) -> None:
    """Refuses by name what is known but not read."""
    if not keys:
        raise CheckpointError(f"{path} holds no tensors")
    for key in keys:
        kind = None
        if re.match(r"lora_(unet|te|prior)", key) or re.search(r"\.lora_(down|up)\.weight$", key):
            kind = "a kohya file"
        elif "lora_magnitude_vector" in key:
            kind = "a DoRA (use_dora)"
        elif re.search(r"\.lora_[AB](\.\w+)?\.bias$", key):
            kind = "a LoRA with biases (lora_bias)"
        if kind:
            raise CheckpointError(f"{path} is {kind}, which is not read here ({key})")


def _peft_config(header: dict[str, str], keys: list[str], path: Path) -> tuple[dict | None, str]:
    """peft's config from the header or from the file beside, and what to call it; None: alpha = rank."""
    if HEADER_KEY in header:
        source = f"{path}: {HEADER_KEY}"
        try:
            config = json.loads(header[HEADER_KEY])
        except (json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{source} is not JSON ({error})") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{source} holds a JSON {type(config).__name__}; an object is needed")
        config = {name.removeprefix("unet."): value for name, value in config.items()}
    elif any(key.startswith("base_model.model.") for key in keys):
        source = str(path.with_name("adapter_config.json"))
        config = read_json(Path(source))
    else:
        return None, str(path)
    _check_config(config, source)
    return config, source


def _check_config(config: dict[str, Any], source: str) -> None:
    for name, value in config.items():
        if name in _ALLOWED and value not in _ALLOWED[name]:
            allowed = " or ".join(map(repr, _ALLOWED[name]))
            raise CheckpointError(f"{source}: {name} is {value!r}; only {allowed} can be read")
        if value and name not in _ALLOWED and name not in _MODELLED | _HARMLESS:
            raise CheckpointError(f"{source}: {name} is {value!r}, which is not modelled here")
    missing = {"r", "lora_alpha"} - config.keys()
    if missing:
        raise CheckpointError(f"{source} lacks {', '.join(sorted(missing))}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{source}: {name} is {config[name]!r}; an object is needed")


def _alpha(config: dict[str, Any] | None, name: str, rank: int, source: str) -> float:
    """A layer's alpha, such that the change is alpha / rank · up @ down."""
    if config is None:
        return float(rank)
    wanted = _by_pattern(config, "rank_pattern", name, "r", source)
    if wanted != rank:
        raise CheckpointError(f"{source}: {name} has rank {wanted:g} there and {rank} in its tensors")
    alpha = _by_pattern(config, "alpha_pattern", name, "lora_alpha", source)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _by_pattern(config: dict[str, Any], patterns: str, name: str, default: str, source: str) -> float:
    """As in peft: the first pattern that matches the end of the layer's name, from a dot on."""
    value = config[default]
    for pattern, own in (config.get(patterns) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error:
            raise CheckpointError(f"{source}: {patterns} has {pattern!r}, which is no pattern") from None
        if matches:
            value = own
            break
    try:
        return arguments.number(value, default)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None


def _by_network(layers: dict[str, Factors], path: Path) -> dict[str, dict[str, Factors]]:
    owners = {n: [net for net, heads in HEADS.items() if n.split(".")[0] in heads] for n in layers}
    strangers = [name for name, found in owners.items() if not found]
    if strangers:
        raise CheckpointError(f"{path}: neither prior nor decoder has {listed(strangers)}")
    sure = {found[0] for found in owners.values() if len(found) == 1}
    out = {}
    for name, factors in layers.items():
        found = sure if len(owners[name]) > 1 else owners[name]
        if len(found) != 1:
            raise CheckpointError(
                f"{path}: {name} is a layer of prior and decoder; its keys do not say of which"
            )
        out.setdefault(next(iter(found)), {})[name] = factors
    return out
