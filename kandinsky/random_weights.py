"""The published layout with random weights: every file a checkpoint needs, at its released size.

For those who want to run, time and check the whole path without 20 GB of downloads. The weights are drawn at
scales that keep activations finite, and go straight to disk piece by piece. All that is not weights comes
from the code's own defaults and means what the official files mean; the vocabulary is a small one of our own.
A tensor's values depend on the seed, the network and the tensor's name alone, so all decoders share a MoVQ.
"""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from kandinsky.checkpoint import (
    CheckpointError,
    atomic_file,
    read_json,
    skeleton,
    write_json,
)
from kandinsky.config import (
    HINT_UNET,
    INPAINT_UNET,
    TEXT_INPAINT_UNET,
    TEXT_UNET,
    CLIPImageConfig,
    CLIPTextConfig,
    MoVQConfig,
    MultilingualConfig,
    PriorConfig,
    UNetConfig,
)
from kandinsky.download import check_space, store_zero_image_embeds
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.prompts import END
from kandinsky.repository import DECODER_INDEX, PRIOR_INDEX, preprocessor
from kandinsky.scheduler_files import to_config
from kandinsky.schedulers import DDIMScheduler, DDPMScheduler, Scheduler, UnCLIPScheduler
from kandinsky.unet import UNet
from kandinsky.vocabulary import write_vocabulary

PIECE = 2**22  # numbers drawn and written at a time
RECORD = "random.json"  # says of a folder that its weights were drawn here, and how
BYTES = {torch.int64: 8, torch.float32: 4, torch.float16: 2}
NAMES = {torch.int64: "I64", torch.float32: "F32", torch.float16: "F16"}
MERGES = (("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("a", "n"))

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Size:
    """The networks of a checkpoint. decoder_text_encoder: 2.1's second text tower."""

    unet: UNetConfig = UNetConfig()
    inpaint: UNetConfig = INPAINT_UNET
    hint: UNetConfig = HINT_UNET
    movq: MoVQConfig = MoVQConfig()
    prior: PriorConfig = PriorConfig()
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    image_encoder: CLIPImageConfig = CLIPImageConfig()
    decoder_text_encoder: MultilingualConfig | None = None


def _small() -> Size:
    """Runs in a second; no norm group has one channel, attention has several heads, f = 4."""
    sizes = {"block_out_channels": (32, 48, 64), "layers_per_block": 2, "head_dim": 8, "context_dim": 24}
    unet = UNetConfig(**sizes, embedding_dim=32, norm_num_groups=8, sample_size=8)
    return Size(
        unet,
        inpaint=replace(unet, in_channels=9),
        hint=replace(unet, in_channels=8, hint=True),
        movq=MoVQConfig((64, 64, 96), layers_per_block=1, num_vq_embeddings=20, norm_num_groups=16),
        prior=PriorConfig(num_heads=3, head_dim=16, num_layers=3, embedding_dim=32),
        text_encoder=CLIPTextConfig(
            vocab_size=519, width=32, num_layers=3, num_heads=4, mlp_width=48, projection_dim=32
        ),
        image_encoder=CLIPImageConfig(
            24, 8, width=40, num_layers=2, num_heads=4, mlp_width=48, projection_dim=32
        ),
    )


def _small_2_1() -> Size:
    size = _small()
    unet = replace(size.unet, context_dim=32, embedding_dim=48, text=True)
    return replace(
        size,
        unet=unet,
        inpaint=replace(unet, in_channels=9),
        text_encoder=replace(size.text_encoder, quick_gelu=True),
        image_encoder=replace(size.image_encoder, quick_gelu=True),
        decoder_text_encoder=MultilingualConfig(
            300, 130, width=48, num_layers=3, num_heads=4, mlp_width=96, projection_dim=32
        ),
    )


@dataclass(frozen=True)
class Repository:
    """Where a part is published. unet: the field of Size with its U-Net; a prior has none."""

    folder: str
    pipeline: str
    schedulers: dict[str, Scheduler]  # by subfolder, the first in `model_index.json`
    unet: str | None = None


SIZES = {"released": Size(), "small": _small()}
SIZES_2_1 = {
    "released": Size(
        TEXT_UNET,
        TEXT_INPAINT_UNET,
        prior=PriorConfig(embedding_dim=768),
        text_encoder=CLIPTextConfig(49408, 77, 768, 12, 12, 3072, 768, True),
        image_encoder=CLIPImageConfig(224, 14, 1024, 24, 16, 4096, 768, True),
        decoder_text_encoder=MultilingualConfig(),
    ),
    "small": _small_2_1(),
}
_PRIOR = {"scheduler": UnCLIPScheduler()}
_DDPM, _UNCLIPPED = {"scheduler": DDPMScheduler()}, {"scheduler": DDPMScheduler(clip_sample=False)}
_DDIM = {"scheduler": DDIMScheduler()}
_LEARNED = DDPMScheduler(
    clip_sample=False,
    clip_sample_range=2.0,
    thresholding=True,
    sample_max_value=2.0,
    steps_offset=0,
    variance_type="learned_range",
)
REPOSITORIES = {
    "prior": Repository("kandinsky-2-2-prior", "KandinskyV22PriorPipeline", _PRIOR),
    "decoder": Repository("kandinsky-2-2-decoder", "KandinskyV22Pipeline", _DDPM, "unet"),
    "inpaint": Repository(
        "kandinsky-2-2-decoder-inpaint", "KandinskyV22InpaintPipeline", _UNCLIPPED, "inpaint"
    ),
    "controlnet-depth": Repository(
        "kandinsky-2-2-controlnet-depth", "KandinskyV22ControlnetPipeline", _DDPM, "hint"
    ),
}
REPOSITORIES_2_1 = {
    "prior": Repository("kandinsky-2-1-prior", "KandinskyPriorPipeline", _PRIOR),
    "decoder": Repository("kandinsky-2-1", "KandinskyPipeline", _DDIM | {"ddpm_scheduler": _LEARNED}, "unet"),
    # published under the name of the pipeline that it is not for
    "inpaint": Repository("kandinsky-2-1-inpaint", "KandinskyPipeline", _DDIM, "inpaint"),
}
MODELS = {"2.2": (REPOSITORIES, SIZES), "2.1": (REPOSITORIES_2_1, SIZES_2_1)}


def make(
    out: Path,
    size: str = "released",
    parts: tuple[str, ...] = ("prior", "decoder"),
    seed: int = 0,
    say: Callable[[str], Any] = print,
    model: str = "2.2",
) -> list[Path]:
    """Writes whole repositories in the published layout into `out`; returns their folders.

    What an earlier call with the same size and seed finished is kept, also after it was killed.

    Args:
        size: "released" or "small".
        parts: of "prior", "decoder", "inpaint" and, of 2.2 alone, "controlnet-depth".
        model: "2.2" or "2.1".

    Raises:
        ValueError: the model has no such part.
        CheckpointError: a folder is there that was not made here, or with another size or seed.
        OSError: no space; said before anything is written.
    """
    out, record = Path(out), {"size": size, "seed": seed}
    repositories, sizes = MODELS[model]
    for part in parts:
        if part not in repositories:
            raise ValueError(f"{model} has no {part}; it has {', '.join(repositories)}")
    folders = {part: out / repositories[part].folder for part in parts}
    for folder in folders.values():
        _check_free(folder, record)
    out.mkdir(parents=True, exist_ok=True)
    networks = [
        (folders[part] / name, network, config)
        for part in parts
        for name, network, config in networks_of(repositories[part], sizes[size])
    ]
    needed = sum(
        file_size(layout(network, config))
        for folder, network, config in networks
        if not (folder / network.weights_name).exists()
    )
    check_space(out, needed)
    for part, folder in folders.items():
        write_json(record, folder / RECORD)
        for leftover in folder.rglob(".*.safetensors"):  # of a run that was killed
            leftover.unlink()
        write_small_files(folder, repositories[part], sizes[size])
    for folder, network, config in networks:
        write_network(folder, network, config, seed, say)
    if "prior" in folders:
        store_zero_image_embeds(folders["prior"], say)
    return list(folders.values())


def layout(network: type, config: Any) -> Layout:
    """Shape and dtype of every tensor in the official file, in the file's order."""
    with skeleton():
        model = network(config)
    # 2.2's image tower is published in half precision; 2.1's, which has another activation, is not
    is_half = network is CLIPImageEncoder and not config.quick_gelu
    dtype = torch.float16 if is_half else torch.float32
    found: Layout = {name: (tuple(t.shape), dtype) for name, t in model.state_dict().items()}
    if network is CLIPTextEncoder:  # old transformers saved these, and the official files have them
        found["text_model.embeddings.position_ids"] = ((1, config.max_positions), torch.int64)
    if network is MultilingualCLIP:
        found["transformer.embeddings.position_ids"] = ((1, config.max_positions), torch.int64)
    if network is CLIPImageEncoder:
        positions = found["vision_model.embeddings.position_embedding.weight"][0][0]
        found["vision_model.embeddings.position_ids"] = ((1, positions), torch.int64)
    return dict(sorted(found.items(), key=lambda item: (-BYTES[item[1][1]], item[0])))


def file_header(tensors: Layout) -> bytes:
    """The start of a safetensors file, up to its first tensor."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in tensors.items():
        end = start + _count(shape) * BYTES[dtype]
        fields[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_size(tensors: Layout) -> int:
    """Bytes of the safetensors file with these tensors."""
    return len(file_header(tensors)) + sum(_count(shape) * BYTES[dtype] for shape, dtype in tensors.values())


def scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a tensor's values: norm weights near one, matrices by fan-in."""
    if len(shape) == 1:
        return (1.0 if name.endswith("weight") else 0.0), 0.3
    return 0.0, _count(shape[1:]) ** -0.5 if len(shape) in (2, 4) else 0.3


def draw(kind: str, name: str, shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """The values of the tensor `name` of the network `kind`, as flat float32 pieces."""
    generator = torch.Generator().manual_seed(crc32(f"{seed} {kind} {name}".encode()))
    mean, std = scale(name, shape)
    for start in range(0, _count(shape), PIECE):
        yield torch.randn(min(PIECE, _count(shape) - start), generator=generator).mul_(std).add_(mean)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fills a network in memory with the values that `write_network` would write."""
    for name, tensor in model.state_dict().items():
        pieces = draw(type(model).__name__, name, tuple(tensor.shape), seed)
        for piece, values in zip(tensor.reshape(-1).split(PIECE), pieces):
            piece.copy_(values)
    return model.eval()


def write_network(folder: Path, network: type, config: Any, seed: int, say: Callable[[str], Any]) -> None:
    """Weights, then config, of one network; a file that is there in full is kept."""
    path, tensors = folder / network.weights_name, layout(network, config)
    if path.exists() and path.stat().st_size == file_size(tensors):
        say(f"{path}: is there already")
    else:
        say(f"{path}: {file_size(tensors):,} bytes")
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            file.write(file_header(tensors))
            for name, (shape, dtype) in tensors.items():
                whole = [torch.arange(_count(shape))] if dtype is torch.int64 else None
                for piece in whole or draw(network.__name__, name, shape, seed):
                    file.write(piece.to(dtype).numpy().data)
    write_json(config.published() | _version(config), folder / "config.json")


def write_tokenizer(folder: Path, vocab_size: int = 519, pad: str = END) -> Path:
    """A byte-level CLIP tokenizer with a few merges; the two special tokens have the highest ids."""
    write_vocabulary(MERGES, folder, vocab_size, pad)
    return folder


def write_multilingual_tokenizer(folder: Path) -> Path:
    """An XLM-RoBERTa tokenizer of a few pieces and every letter of three scripts."""
    from transformers import XLMRobertaTokenizer

    letters = [chr(c) for c in (*range(97, 123), *range(0x430, 0x450), *range(0x3042, 0x3060))]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁cat", "▁кот", *letters, "<mask>"]
    scores = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    XLMRobertaTokenizer(vocab=scores).save_pretrained(folder)
    return folder


def networks_of(repository: Repository, size: Size) -> list[tuple[str, type, Any]]:
    """Subfolder, class and config of each network."""
    if repository.unet is None:
        towers = [("text_encoder", CLIPTextEncoder), ("image_encoder", CLIPImageEncoder)]
        return [(name, network, getattr(size, name)) for name, network in [("prior", Prior), *towers]]
    found = [("unet", UNet, getattr(size, repository.unet)), ("movq", MoVQ, size.movq)]
    if size.decoder_text_encoder is not None:
        found.append(("text_encoder", MultilingualCLIP, size.decoder_text_encoder))
    return found


def write_small_files(folder: Path, repository: Repository, size: Size) -> None:
    """All but networks: index, schedulers, tokenizer, preprocessing."""
    for name, scheduler in repository.schedulers.items():
        write_json(to_config(scheduler), folder / name / "scheduler_config.json")
    index = {**(PRIOR_INDEX if repository.unet is None else DECODER_INDEX)}
    is_2_1 = size.decoder_text_encoder is not None
    if repository.unet is None:
        settings = preprocessor(size.image_encoder.image_size)
        write_json(settings, folder / "image_processor" / "preprocessor_config.json")
        write_tokenizer(folder / "tokenizer", size.text_encoder.vocab_size, "!" if is_2_1 else END)
    elif is_2_1:
        write_multilingual_tokenizer(folder / "tokenizer")
        index["text_encoder"] = ("kandinsky", "MultilingualCLIP")  # a module inside diffusers
        index["tokenizer"] = ("transformers", "XLMRobertaTokenizerFast")
    index["scheduler"] = ("diffusers", type(repository.schedulers["scheduler"]).__name__)
    index |= {"_class_name": repository.pipeline, "_diffusers_version": _DIFFUSERS}
    write_json(index, folder / "model_index.json")


_DIFFUSERS = "0.17.0.dev0"  # the version that the official files name


def _version(config: Any) -> dict[str, str]:
    return {"_diffusers_version": _DIFFUSERS} if config.IDENTITY[0] == "_class_name" else {}


def _check_free(folder: Path, record: dict[str, Any]) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        return
    path = folder / RECORD
    made = read_json(path) if path.exists() else None
    if made != record:
        what = "was not made here" if made is None else f"was made with {made}"
        raise CheckpointError(f"{folder} is there already and {what}; name another --out, or remove it")


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
