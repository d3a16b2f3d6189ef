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
    open_safetensors,
    read_json,
    write_json,
    write_safetensors,
)
from kandinsky.config import (
    HINT_UNET,
    INPAINT_UNET,
    CLIPImageConfig,
    CLIPTextConfig,
    MoVQConfig,
    PriorConfig,
    UNetConfig,
)
from kandinsky.download import ZERO_IMAGE, check_space
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP
from kandinsky.images import CLIP_MEAN, CLIP_STD
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.schedulers import DDPMScheduler, UnCLIPScheduler, to_config
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
    """The networks of a checkpoint."""

    unet: UNetConfig = UNetConfig()
    inpaint: UNetConfig = INPAINT_UNET
    hint: UNetConfig = HINT_UNET
    movq: MoVQConfig = MoVQConfig()
    prior: PriorConfig = PriorConfig()
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    image_encoder: CLIPImageConfig = CLIPImageConfig()


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


SIZES = {"released": Size(), "small": _small()}
# part: (repository, pipeline class, whether the decoder's scheduler clips, the field of Size with its U-Net)
DECODERS = {
    "decoder": ("kandinsky-2-2-decoder", "KandinskyV22Pipeline", True, "unet"),
    "inpaint": ("kandinsky-2-2-decoder-inpaint", "KandinskyV22InpaintPipeline", False, "inpaint"),
    "controlnet-depth": ("kandinsky-2-2-controlnet-depth", "KandinskyV22ControlnetPipeline", True, "hint"),
}
PARTS = ("prior", *DECODERS)
PRIOR_FOLDER = "kandinsky-2-2-prior"


def make(
    out: Path,
    size: str = "released",
    parts: tuple[str, ...] = ("prior", "decoder"),
    seed: int = 0,
    say: Callable[[str], Any] = print,
) -> list[Path]:
    """Writes whole repositories in the published layout into `out`; returns their folders.

    What an earlier call with the same size and seed finished is kept, also after it was killed.

    Args:
        size: "released" or "small".
        parts: of "prior", "decoder", "inpaint", "controlnet-depth".

    Raises:
        CheckpointError: a folder is there that was not made here, or with another size or seed.
        OSError: no space; said before anything is written.
    """
    out, record = Path(out), {"size": size, "seed": seed}
    folders = {part: out / (PRIOR_FOLDER if part == "prior" else DECODERS[part][0]) for part in parts}
    for folder in folders.values():
        _check_free(folder, record)
    out.mkdir(parents=True, exist_ok=True)
    networks = [(folders[part] / n, network, c) for part in parts for n, network, c in _networks(part, size)]
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
        _write_small_files(folder, part, SIZES[size])
    for folder, network, config in networks:
        write_network(folder, network, config, seed, say)
    if "prior" in folders:
        _write_zero_image(folders["prior"], say)
    return list(folders.values())


def layout(network: type, config: Any) -> Layout:
    """Shape and dtype of every tensor in the official file, in the file's order."""
    with torch.device("meta"):
        model = network(config)
    dtype = torch.float16 if network is CLIPImageEncoder else torch.float32
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


def write_tokenizer(folder: Path, vocab_size: int = 519) -> Path:
    """A byte-level CLIP tokenizer with a few merges; the two special tokens have the highest ids."""
    write_vocabulary(MERGES, folder, vocab_size)
    return folder


def preprocessor(image_size: int) -> dict[str, Any]:
    """`preprocessor_config.json`: what `images.clip_pixels` does."""
    return {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,  # bicubic
        "size": image_size,
    }


def _networks(part: str, size: str) -> list[tuple[str, type, Any]]:
    sizes = SIZES[size]
    if part != "prior":
        return [("unet", UNet, getattr(sizes, DECODERS[part][3])), ("movq", MoVQ, sizes.movq)]
    towers = [("text_encoder", CLIPTextEncoder), ("image_encoder", CLIPImageEncoder)]
    return [(name, network, getattr(sizes, name)) for name, network in [("prior", Prior), *towers]]


def _write_small_files(folder: Path, part: str, sizes: Size) -> None:
    if part == "prior":
        write_json(to_config(UnCLIPScheduler()), folder / "scheduler" / "scheduler_config.json")
        write_json(
            preprocessor(sizes.image_encoder.image_size), folder / "image_processor/preprocessor_config.json"
        )
        write_tokenizer(folder / "tokenizer", sizes.text_encoder.vocab_size)
        parts = {"prior": ("diffusers", "PriorTransformer"), "scheduler": ("diffusers", "UnCLIPScheduler")}
        parts |= {"text_encoder": ("transformers", "CLIPTextModelWithProjection")}
        parts |= {"image_encoder": ("transformers", "CLIPVisionModelWithProjection")}
        parts |= {name: ("transformers", f"CLIP{cls}") for name, cls in _PROCESSORS.items()}
        pipeline = "KandinskyV22PriorPipeline"
    else:
        _, pipeline, clips, _ = DECODERS[part]
        write_json(
            to_config(DDPMScheduler(clip_sample=clips)), folder / "scheduler" / "scheduler_config.json"
        )
        parts = {"scheduler": "DDPMScheduler", "unet": "UNet2DConditionModel", "movq": "VQModel"}
        parts = {name: ("diffusers", cls) for name, cls in parts.items()}
    index = {"_class_name": pipeline, "_diffusers_version": _DIFFUSERS, **parts}
    write_json(index, folder / "model_index.json")


_PROCESSORS = {"tokenizer": "Tokenizer", "image_processor": "ImageProcessor"}
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


def _write_zero_image(prior: Path, say: Callable[[str], Any]) -> None:
    """The zero image's embedding, layer by layer from the file: the tower is never in memory as a whole."""
    if (prior / ZERO_IMAGE).exists():
        return
    say(f"{prior / ZERO_IMAGE}: computing it")
    folder = prior / "image_encoder"
    config = CLIPImageEncoder.read_config(folder)
    with torch.device("meta"):
        tower = CLIPImageEncoder(config)
    for name, module in tower.named_modules():
        if not any(module.children()) or name.endswith(".embeddings"):
            module.register_forward_pre_hook(_reader(folder / CLIPImageEncoder.weights_name, name))
            module.register_forward_hook(lambda module, args, out: module.to("meta") and None)
    with torch.no_grad():
        embeds = tower(torch.zeros(1, 3, config.image_size, config.image_size))
    write_safetensors({"zero_image_embeds": embeds}, prior / ZERO_IMAGE)


def _reader(path: Path, prefix: str) -> Callable[[nn.Module, Any], None]:
    def read(module: nn.Module, args: Any) -> None:
        file = open_safetensors(path)
        tensors = {name: file.get_tensor(f"{prefix}.{name}").float() for name in module.state_dict()}
        module.load_state_dict(tensors, assign=True)

    return read


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
