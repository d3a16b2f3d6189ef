"""Pickled checkpoints made into safetensors with the published names.

Two kinds are read: `.bin` files, whose names are the published ones already (controlnet-depth's main branch,
old fine-tunes), and what the authors' own code saves (prior, decoder and MoVQ of Kandinsky 2.1), whose names
are translated by the rules below. Either way the result must be, name by name and shape by shape, a network
of this package. The pickle is opened with `weights_only=True`: it can run no code.
"""

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from kandinsky.checkpoint import (
    FLOATS,
    CheckpointError,
    check_tensors,
    read_json,
    remove_pieces,
    skeleton,
    write_json,
    write_safetensors,
)
from kandinsky.config import MoVQConfig, PriorConfig, UNetConfig, read_config
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.unet import NUM_IMAGE_TOKENS, NUM_IMAGE_TOKENS_BESIDE_TEXT, UNet

Tensors = dict[str, Tensor]
Rules = list[tuple[str, str | Callable[[re.Match], str]]]

PUBLISHED_PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
HEAD_DIM = 64  # of every head in the released prior and decoder
NETWORKS = (Prior, UNet, MoVQ, CLIPTextEncoder, CLIPImageEncoder, MultilingualCLIP)

# Attention with all heads in one matrix: the rows of a head stand together, and in them those of each part.
SPLITS = {"qkv": ("to_q", "to_k", "to_v"), "encoder_kv": ("add_k_proj", "add_v_proj")}

PRIOR_RULES: Rules = [
    (r"^model\.", ""),
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^clip_img_proj\.", "proj_in."),
    (r"^text_emb_proj\.", "embedding_proj."),
    (r"^text_enc_proj\.", "encoder_hidden_states_proj."),
    (r"^prd_emb$", "prd_embedding"),
    (r"^final_ln\.", "norm_out."),
    (r"^out_proj\.", "proj_to_clip_embeddings."),
    (r"^transformer\.resblocks\.", "transformer_blocks."),
    (r"\.attn\.c_qkv\.", ".attn1.qkv."),
    (r"\.attn\.c_proj\.", ".attn1.to_out.0."),
    (r"\.mlp\.c_fc\.", ".ff.net.0.proj."),
    (r"\.mlp\.c_proj\.", ".ff.net.2."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm3."),
]
PRIOR_BUFFERS = ("causal_mask", "cf_token", "cf_mask")  # constants that some versions of the code saved

UNET_RULES: Rules = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^ln_model_n\.", "add_embedding.text_norm."),
    (r"^proj_n\.", "add_embedding.text_proj."),
    (r"^img_layer\.", "add_embedding.image_proj."),
    (r"^clip_to_seq\.", "encoder_hid_proj.image_embeds."),
    (r"^to_model_dim_n\.", "encoder_hid_proj.text_proj."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.proj_out\.", ".to_out.0."),
]

MOVQ_RULES: Rules = [
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.(norm_layer|conv_y|conv_b)\.", r"\1.spatial_norm.\2."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"\.proj_out\.", ".to_out.0."),
]


def convert(
    path: Path,
    out: Path | None = None,
    clip_stats: Path | None = None,
    overwrite: bool = False,
    head_dim: int = HEAD_DIM,
) -> Path:
    """Writes a pickled network as safetensors, with its `config.json`; returns the file's path.

    Args:
        path: the pickle.
        out: the folder to write into; None: the pickle's own where it has a published name, else a new one
            beside it, named like it. A `config.json` in it, or else beside a pickle with published names,
            says which network this is; without one, the tensors do.
        clip_stats: the authors' mean and deviation of CLIP embeddings, which their prior's file lacks.

    Raises:
        CheckpointError: the file is no plain pickle of tensors, or not such a network; tensors are listed.
    """
    path = Path(path)
    tensors = read_pickle(path)
    is_original = original_rules(tensors) is not None
    tensors = published(tensors, clip_stats, head_dim)
    folder = Path(out) if out else path.parent if path.name in PUBLISHED_PICKLES else path.with_suffix("")
    if folder == path:
        raise CheckpointError(f"{path} has no suffix to make a folder's name of; give --out FOLDER")

    configs = [folder / "config.json"] + ([] if is_original else [path.parent / "config.json"])
    source = next((config for config in configs if config.exists()), None)
    config = read_json(source) if source else infer_config(tensors, head_dim)
    network = _network(config, str(source))
    _check(tensors, network, read_config(network.config_class, config, str(source)), path)

    target = folder / network.weights_name
    index = target.with_name(f"{target.name}.index.json")
    there = next((path for path in (target, index) if path.exists()), None)
    if there and not overwrite:
        raise CheckpointError(f"{there} is there already; give --overwrite, or another folder with --out")
    write_safetensors(tensors, target)
    remove_pieces(folder, target.name)
    if source != configs[0]:
        write_json(config, configs[0])
    return target


def read_pickle(path: Path) -> Tensors:
    """The tensors of a pickled state dict by name, read from the file when they are used."""
    content = _load(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        held = "an empty dictionary" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {held}; a dictionary of tensors is needed")
    odd = [str(n) for n, value in content.items() if not (isinstance(n, str) and isinstance(value, Tensor))]
    if odd:
        raise CheckpointError(f"{path} holds more than tensors: {', '.join(odd[:8])}")
    return content


def original_rules(tensors: Tensors) -> Rules | None:
    """How the authors' names become the published ones; None where they are the published ones already."""
    if "model.prd_emb" in tensors:
        return PRIOR_RULES
    if "input_blocks.0.0.weight" in tensors:
        return [*_unet_place_rules(tensors), *UNET_RULES]
    if "decoder.mid.attn_1.q.weight" in tensors:
        return [_movq_up_rule(tensors), *MOVQ_RULES]
    return None


def published(tensors: Tensors, clip_stats: Path | None = None, head_dim: int = HEAD_DIM) -> Tensors:
    """The same tensors under the published names."""
    rules = original_rules(tensors)
    if rules is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in PRIOR_BUFFERS}
        tensors = dict(_translate(tensors, rules, head_dim))
    if rules is PRIOR_RULES:
        tensors |= {} if clip_stats is None else read_clip_stats(clip_stats)
        if "clip_mean" not in tensors:
            raise CheckpointError(
                "this prior lacks clip_mean and clip_std; give ViT-L-14_stats.th as --clip-stats"
            )
    return {name: tensor for name, tensor in tensors.items() if not _is_stale(name, tensor)}


def read_clip_stats(path: Path) -> Tensors:
    """The authors' pair (mean, deviation), (d,) each, as the prior's tensors."""
    stats = _load(path)
    if not (
        isinstance(stats, (tuple, list)) and len(stats) == 2 and all(isinstance(s, Tensor) for s in stats)
    ):
        raise CheckpointError(f"{path} does not hold a pair of tensors, mean and deviation")
    return {"clip_mean": stats[0].reshape(1, -1), "clip_std": stats[1].reshape(1, -1)}


def infer_config(tensors: Tensors, head_dim: int = HEAD_DIM) -> dict[str, Any]:
    """The `config.json` that names and shapes stand for; what they do not tell has the released value."""
    try:
        if "prd_embedding" in tensors:
            return _prior_config(tensors, head_dim)
        if "quantize.embedding.weight" in tensors:
            return _movq_config(tensors)
        if "conv_norm_out.weight" in tensors:
            return _unet_config(tensors, head_dim)
    except KeyError as error:
        raise CheckpointError(f"a network without {error} among its tensors is none of Kandinsky's") from None
    except IndexError:
        raise CheckpointError("a tensor has fewer dimensions than in any known network") from None
    some = ", ".join(list(tensors)[:4])
    raise CheckpointError(f"tensors like {some} are of no known network; put its config.json beside the file")


def _load(path: Path) -> Any:
    if not Path(path).is_file():
        raise CheckpointError(f"no such file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, before the error that refuses them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged or hostile pickle may raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else type(error).__name__
        raise CheckpointError(
            f"{path} is no plain pickle of tensors, and was not loaded ({reason})"
        ) from None


def _translate(tensors: Tensors, rules: Rules, head_dim: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        is_linear = last in SPLITS or re.search(r"attentions\.\d+\.to_(q|k|v|out\.0)$", module)
        if kind == "weight" and is_linear and tensor.ndim:
            tensor = tensor.flatten(1)  # a 1×1 convolution is a linear layer
        if last not in SPLITS:
            yield name, tensor
            continue
        if not tensor.ndim or tensor.shape[0] % (len(SPLITS[last]) * head_dim):
            raise CheckpointError(f"{name} {tuple(tensor.shape)} does not divide into heads of {head_dim}")
        parts = rearrange(
            tensor, "(heads parts d) ... -> parts (heads d) ...", parts=len(SPLITS[last]), d=head_dim
        )
        for part, rows in zip(SPLITS[last], parts):
            yield f"{parent}.{part}.{kind}", rows.clone()


def _unet_place_rules(tensors: Tensors) -> Rules:
    """`input_blocks.n`, `output_blocks.n` count through all levels: which level and block n is."""
    blocks = _count(tensors, r"output_blocks\.(\d+)\.")
    ups = {n for n in tensors if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", n)}
    per_level = max(blocks // (len(ups) + 1), 1)  # residual blocks of a level on the way up, upsampler apart

    def down(match: re.Match) -> str:
        level, block = divmod(int(match[1]) - 1, per_level)
        if match[2] == "1":
            return f"down_blocks.{level}.attentions.{block}."
        is_downsampler = block == per_level - 1
        return f"down_blocks.{level}." + ("downsamplers.0." if is_downsampler else f"resnets.{block}.")

    def up(match: re.Match) -> str:
        level, block = divmod(int(match[1]), per_level)
        is_resnet = f"output_blocks.{match[1]}.{match[2]}.in_layers.0.weight" in tensors
        kind = (
            f"attentions.{block}."
            if not is_resnet
            else f"resnets.{block}."
            if match[2] == "0"
            else "upsamplers.0."
        )
        return f"up_blocks.{level}.{kind}"

    return [(r"^input_blocks\.([1-9]\d*)\.([01])\.", down), (r"^output_blocks\.(\d+)\.([012])\.", up)]


def _movq_up_rule(tensors: Tensors) -> tuple[str, Callable[[re.Match], str]]:
    """The authors' `up` counts levels from the finest, the published `up_blocks` from the coarsest."""
    last = _count(tensors, r"decoder\.up\.(\d+)\.") - 1
    return r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{last - int(match[1])}."


def _is_stale(name: str, tensor: Tensor) -> bool:
    return name.endswith(".position_ids") and not tensor.is_floating_point()


def _count(tensors: Tensors, pattern: str) -> int:
    return 1 + max((int(match[1]) for match in map(re.compile(pattern).match, tensors) if match), default=-1)


def _prior_config(tensors: Tensors, head_dim: int) -> dict[str, Any]:
    width, embedding_dim = tensors["proj_in.weight"].shape
    layers = _count(tensors, r"transformer_blocks\.(\d+)\.")
    num_embeddings = tensors["positional_embedding"].shape[1] - 4
    return PriorConfig(width // head_dim, head_dim, layers, embedding_dim, num_embeddings).published()


def _movq_config(tensors: Tensors) -> dict[str, Any]:
    levels = range(_count(tensors, r"encoder\.down_blocks\.(\d+)\."))
    channels = (tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels)
    return MoVQConfig(
        block_out_channels=tuple(channels),
        layers_per_block=_count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        latent_channels=tensors["quant_conv.weight"].shape[0],
        num_vq_embeddings=tensors["quantize.embedding.weight"].shape[0],
    ).published()


def _unet_config(tensors: Tensors, head_dim: int) -> dict[str, Any]:
    levels = range(_count(tensors, r"down_blocks\.(\d+)\."))
    channels = (tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels)
    text_proj = tensors.get("encoder_hid_proj.text_proj.weight")
    num_image_tokens = NUM_IMAGE_TOKENS if text_proj is None else NUM_IMAGE_TOKENS_BESIDE_TEXT
    width, embedding_dim = tensors["encoder_hid_proj.image_embeds.weight"].shape
    return UNetConfig(
        in_channels=tensors["conv_in.weight"].shape[1],
        out_channels=tensors["conv_out.weight"].shape[0],
        block_out_channels=tuple(channels),
        layers_per_block=_count(tensors, r"down_blocks\.0\.resnets\.(\d+)\."),
        head_dim=head_dim,
        context_dim=width // num_image_tokens,
        embedding_dim=embedding_dim if text_proj is None else text_proj.shape[1],
        text=text_proj is not None,
        hint="add_embedding.input_hint_block.0.weight" in tensors,
    ).published()


def _check(tensors: Tensors, network: type, config: Any, path: Path) -> None:
    with skeleton():
        expected = network(config).state_dict()
    found = {n: (tuple(t.shape), FLOATS.get(t.dtype, str(t.dtype))) for n, t in tensors.items()}
    check_tensors(expected, found, f"{path} is not the network it looks like")


def _network(config: dict[str, Any], source: str) -> Any:
    for network in NETWORKS:
        key, *names = network.config_class.IDENTITY
        if config.get(key) in names:
            return network
    named = config.get("_class_name") or config.get("model_type")
    known = ", ".join(network.config_class.IDENTITY[1] for network in NETWORKS)
    raise CheckpointError(f"{source} is of {named!r}; known are {known}")
