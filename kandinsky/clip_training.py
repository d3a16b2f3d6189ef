"""What trains the CLIP towers: contrast, and three heads that keep a picture readable in its embedding.

Contrast alone is content with telling pictures apart; the decoder draws from the embedding alone, so all that
is to be drawn must be in it. The heads read the embedding during training and are thrown away: one speaks the
caption, one paints the picture, one (for shapes, where it is known) says what stands in each of nine places.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from kandinsky.checkpoint import Pretrained
from kandinsky.config import CLIPImageConfig, CLIPTextConfig
from kandinsky.datasets import first
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, Encoder
from kandinsky.images import CLIP_MEAN, CLIP_STD, to_unit_range
from kandinsky.judge import hard_negative, shows
from kandinsky.prompts import PromptTokenizer
from kandinsky.repository import write_image_constants
from kandinsky.shapes import OBJECT_COLORS, PLACES, SHAPES, Scene
from kandinsky.training import Draws, Objective, initialize, rank, world_size

EMBEDDING_NOISE = 0.15  # before the heads: what the prior draws is never exact
SIDE = 64  # of the painted picture
CELLS = (1 + len(SHAPES), len(OBJECT_COLORS), 2)  # in each place: which shape, if any; its colour; its size


def clip_normalize(pixels: Tensor, size: int) -> Tensor:
    """(b, 3, h, w) in [-1, 1] -> (b, 3, size, size), as the image tower reads them"""
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels * 0.5 + 0.5 - mean) / std


class ConvEncoder(nn.Module, Pretrained):
    """A teacher for the image tower. Convolutions see shapes and places at once; a transformer must find out
    from many pictures what is near to what. The tower then learns the teacher's embeddings."""

    config_class = CLIPImageConfig
    weights_name = "model.safetensors"

    def __init__(self, config: CLIPImageConfig, width: int = 32):
        super().__init__()
        self.config = config
        widths = [3, width, 2 * width, 4 * width]
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
            layers += [nn.Conv2d(c_out, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
        layers += [
            nn.Conv2d(widths[-1], widths[-1], 3, stride=2, padding=1),
            nn.GroupNorm(8, widths[-1]),
            nn.SiLU(),
        ]
        self.layers = nn.Sequential(*layers)
        features = widths[-1] * math.ceil(config.image_size / 16) ** 2
        self.out = nn.Linear(features, config.projection_dim)
        self.norm = nn.LayerNorm(config.projection_dim, elementwise_affine=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """As the image tower's: (b, 3, size, size) -> (b, projection_dim), about one in each dimension"""
        return self.norm(self.out(self.layers(pixels).flatten(1)).float())


def image_encoder_of(folder: Path) -> tuple[type[ConvEncoder] | type[CLIPImageEncoder], Path]:
    """What makes a folder's embeddings, and where it lies: the teacher, or without one the image tower."""
    teacher = folder / "teacher"
    return (ConvEncoder, teacher) if teacher.is_dir() else (CLIPImageEncoder, folder / "image_encoder")


def load_image_encoder(folder: Path) -> ConvEncoder | CLIPImageEncoder:
    kind, place = image_encoder_of(folder)
    return kind.from_pretrained(place)


class CaptionHead(nn.Module):
    """Speaks the caption token by token, from an embedding given as four tokens."""

    def __init__(self, dim: int, config: CLIPTextConfig):
        super().__init__()
        self.prefix = nn.Linear(dim, 4 * config.width)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions + 4, config.width)
        self.encoder = Encoder(config)
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.vocab_size)

    def forward(self, image_embeds: Tensor, ids: Tensor) -> Tensor:
        """(b, d), (b, n) -> (b, n, vocabulary), the logits of each token given those before it"""
        prefix = rearrange(self.prefix(image_embeds), "b (n c) -> b n c", n=4)
        x = torch.cat([prefix, self.tokens(ids[:, :-1])], dim=1)
        n = x.shape[1]
        x = x + self.positions.weight[:n]
        causal = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
        return self.out(self.norm(self.encoder(x, causal)[:, 3:]))


class PictureHead(nn.Module):
    """Paints the picture at 64 pixels."""

    def __init__(self, dim: int, width: int = 64):
        super().__init__()
        self.start = nn.Linear(dim, width * 64)

        def stage(c_in: int, c_out: int) -> list[nn.Module]:
            return [nn.GroupNorm(8, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)]

        double = nn.UpsamplingNearest2d(scale_factor=2)
        layers = [*stage(width, width), double, *stage(width, 64), double, *stage(64, 48), *stage(48, 12)]
        self.layers = nn.Sequential(*layers, nn.PixelShuffle(2))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(b, d) -> (b, 3, 64, 64), about [-1, 1]"""
        return self.layers(rearrange(self.start(image_embeds), "b (c h w) -> b c h w", h=8, w=8)).float()


class SceneHead(nn.Module):
    """Says what stands in each of the nine places."""

    def __init__(self, dim: int, width: int = 256):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, 9 * sum(CELLS)))

    def forward(self, image_embeds: Tensor) -> list[Tensor]:
        """(b, d) -> logits of shape, colour and size, (b, 9, choices) each"""
        logits = rearrange(self.layers(image_embeds).float(), "b (n c) -> b n c", n=9)
        return list(logits.split(CELLS, dim=-1))


def scene_labels(scenes: list[Scene]) -> Tensor:
    """(b, 9, 3): shape (0 where there is none), colour and size (-1 where there is none)"""
    labels = torch.tensor([0, -1, -1]).repeat(len(scenes), 9, 1)
    for row, scene in zip(labels, scenes):
        for item in scene.objects:
            shape, color = list(SHAPES).index(item.shape), OBJECT_COLORS.index(item.color)
            row[PLACES.index(item.place)] = torch.tensor([1 + shape, color, int(item.size == "large")])
    return labels


def recolor(pixels: Tensor, labels: Tensor, rng: Random) -> None:
    """Gives a picture colours from the whole space, in place, so that shape does not hang on colour."""
    channels, signs = rng.sample(range(3), 3), torch.tensor([rng.choice((-1.0, 1.0)) for _ in range(3)])
    pixels.copy_(pixels[channels] * signs[:, None, None] * rng.uniform(0.6, 1.0))
    labels[:, 1] = -1  # the colour has no name


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, with their gradients."""
    if world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def contrast(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss (arXiv:2103.00020, fig. 3), each picture also against every further text.

    image_embeds: (b, d). text_embeds: (m, d), the pictures' own first. -> the loss, and how often a picture's
    own caption is the nearest
    """
    b, start = len(image_embeds), rank() * len(image_embeds)
    images, texts = F.normalize(image_embeds, dim=1), F.normalize(text_embeds, dim=1)
    all_images, own, others = gather(images), gather(texts[:b]), gather(texts[b:])
    target = torch.arange(start, start + b, device=images.device)
    to_texts = scale * images @ torch.cat([own, others]).T
    to_images = scale * texts[:b] @ all_images.T
    loss = (F.cross_entropy(to_texts, target) + F.cross_entropy(to_images, target)) / 2
    return loss, (to_texts.argmax(dim=1) == target).float().mean()


@dataclass(frozen=True)
class LossWeights:
    """Of the losses' sum. 0 leaves a part out: without contrast and caption the text tower is not run."""

    contrast: float = 1.0
    caption: float = 1.0
    picture: float = 10.0
    scene: float = 1.0


class CLIPObjective(Objective):
    """Trains both towers. With frozen_image only the text tower learns, to fit pictures' embeddings as they
    are (arXiv:2111.07991)."""

    def __init__(
        self,
        image_encoder: CLIPImageEncoder,
        text_encoder: CLIPTextEncoder,
        tokenizer: PromptTokenizer,
        data: Any,
        fresh: dict[str, Any],
        weights: LossWeights = LossWeights(),
        frozen_image: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.tokenizer, self.data, self.fresh = tokenizer, data, fresh
        self.weights, self.frozen_image = weights, frozen_image
        dim = image_encoder.config.projection_dim
        self.log_scale = nn.Parameter(torch.tensor(14.0).log())
        self.heads = nn.ModuleDict()
        if weights.caption and not frozen_image:
            self.heads["caption"] = CaptionHead(dim, text_encoder.config)
        if weights.picture and not frozen_image:
            self.heads["picture"] = PictureHead(dim)
        if weights.scene and not frozen_image:
            self.heads["scene"] = SceneHead(dim)
        initialize(self.heads, seed)
        image_encoder.requires_grad_(not frozen_image)
        text_encoder.requires_grad_(weights.contrast > 0)
        self.log_scale.requires_grad_(weights.contrast > 0)

    def batch(self, indices: list[int]) -> dict[str, Any]:
        samples = self.data.load(indices)
        texts = list(samples.captions)
        batch = {"pixels": samples.pixels}
        if samples.scenes is not None and self.weights.contrast:
            rngs = [Random(f"{index} negative") for index in indices]
            texts += [hard_negative(scene, rng) for scene, rng in zip(samples.scenes, rngs)]
        if samples.scenes is not None:
            batch["labels"] = scene_labels(samples.scenes)
            if not self.weights.contrast and not self.weights.caption:
                for row in range(0, len(indices), 2):
                    recolor(batch["pixels"][row], batch["labels"][row], Random(f"{indices[row]} color"))
        batch["ids"], batch["mask"] = self.tokenizer(texts)
        return batch

    def loss(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, ids = batch["pixels"], batch["ids"]
        image_embeds = self.image_encoder(clip_normalize(pixels, self.image_encoder.config.image_size))
        losses, numbers = {}, {}
        blurred = image_embeds + EMBEDDING_NOISE * draws.randn(image_embeds.shape[1])
        if self.weights.contrast:
            _, text_embeds = self.text_encoder(ids)
            with torch.autocast(pixels.device.type, enabled=False):
                scale = self.log_scale.exp().clamp(max=100)
                losses["contrast"], numbers["nearest"] = contrast(image_embeds, text_embeds, scale)
        if "caption" in self.heads:
            own, real = ids[: len(pixels)], batch["mask"][: len(pixels), 1:]
            logits = self.heads["caption"](blurred, own).float()
            errors = F.cross_entropy(logits[:, 1:].mT, own[:, 1:], reduction="none")
            losses["caption"] = shared_mean(errors, real)
        if "picture" in self.heads:
            small = F.interpolate(pixels, (SIDE, SIDE), mode="area")
            losses["picture"] = F.l1_loss(self.heads["picture"](blurred), small)
        if "scene" in self.heads:
            losses["scene"] = scene_loss(self.heads["scene"](blurred), batch["labels"])
        loss = sum(getattr(self.weights, name) * value for name, value in losses.items())
        return loss, numbers | {name: value.detach() for name, value in losses.items()}

    def sample(self, draws: Draws) -> tuple[Tensor | None, dict[str, float]]:
        """Fresh pictures, what the heads make of their embeddings, and how often all of that is right."""
        rows, measured = [], {}
        size = self.image_encoder.config.image_size
        for name, data in self.fresh.items():
            samples = first(data, 128)
            pixels = samples.pixels.to(draws.device)
            image_embeds = self.image_encoder(clip_normalize(pixels, size))
            measured[f"{name} std"] = image_embeds.std().item()
            if self.weights.contrast:
                ids, _ = self.tokenizer(samples.captions)
                text_embeds = self.text_encoder(ids.to(draws.device))[1]
                near = F.normalize(image_embeds, dim=1) @ F.normalize(text_embeds, dim=1).T
                own = torch.arange(len(ids), device=near.device)
                measured[f"{name} nearest of {len(ids)}"] = (near.argmax(dim=1) == own).float().mean().item()
            if "scene" in self.heads:
                logits, labels = self.heads["scene"](image_embeds), scene_labels(samples.scenes)
                measured[f"{name} said right"] = all_right(logits, labels.to(draws.device))
            if "picture" in self.heads:
                painted = to_unit_range(self.heads["picture"](image_embeds))
                rows += [to_unit_range(F.interpolate(pixels[:12], (SIDE, SIDE), mode="area")), painted[:12]]
                if samples.scenes is not None:
                    measured[f"{name} readable"] = readable(painted, samples.scenes)
        return torch.stack(rows) if rows else None, measured

    def save(self, folder: Path) -> None:
        if not self.frozen_image:
            is_teacher = isinstance(self.image_encoder, ConvEncoder)
            self.image_encoder.save_pretrained(folder / ("teacher" if is_teacher else "image_encoder"))
            write_image_constants(folder, self.image_encoder)
        if self.weights.contrast:
            self.text_encoder.save_pretrained(folder / "text_encoder")


class TowerObjective(Objective):
    """Trains the image tower to give a teacher's embeddings, the zero image's among them."""

    def __init__(self, image_encoder: CLIPImageEncoder, teacher: nn.Module, data: Any, fresh: dict[str, Any]):
        super().__init__()
        self.image_encoder, self.teacher = image_encoder, teacher.requires_grad_(False)
        self.data, self.fresh = data, fresh

    def batch(self, indices: list[int]) -> dict[str, Any]:
        return {"pixels": self.data.load(indices).pixels}

    def loss(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = clip_normalize(batch["pixels"], self.image_encoder.config.image_size)
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])])
        with torch.no_grad():
            wanted = self.teacher(pixels)
        errors = (self.image_encoder(pixels) - wanted).square().mean(dim=1)
        return errors.mean(), {"zero image": errors[-1].detach()}

    def sample(self, draws: Draws) -> tuple[Tensor | None, dict[str, float]]:
        measured = {}
        for name, data in self.fresh.items():
            pixels = first(data, 128).pixels.to(draws.device)
            pixels = clip_normalize(pixels, self.image_encoder.config.image_size)
            error = F.mse_loss(self.image_encoder(pixels), self.teacher(pixels))
            measured[f"{name} error"] = error.item()
        return None, measured

    def save(self, folder: Path) -> None:
        self.image_encoder.save_pretrained(folder / "image_encoder")
        write_image_constants(folder, self.image_encoder)


def scene_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Of shape, colour and size, each over the places where there is one to tell."""
    parts = zip(logits, labels.unbind(dim=-1))
    return sum(
        shared_mean(F.cross_entropy(part.mT, label.clamp(min=0), reduction="none"), label >= 0)
        for part, label in parts
    )


def shared_mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values over all processes' batches, as this process's part of it: the average of
    the processes' parts is the mean that one process alone would have."""
    count = chosen.sum().float()
    if world_size() > 1:
        distributed.all_reduce(count)
    return (values * chosen).sum() * world_size() / count.clamp(min=1)


def all_right(logits: list[Tensor], labels: Tensor) -> float:
    said = torch.stack([part.argmax(dim=-1) for part in logits], dim=-1)
    return ((said == labels) | (labels < 0)).flatten(1).all(dim=1).float().mean().item()


def readable(pictures: Tensor, scenes: list[Scene]) -> float:
    """The share of pictures that show the ground and all of every object, by the judge."""
    levels = (pictures * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return sum(shows(picture, scene, ground=True) for picture, scene in zip(levels, scenes)) / len(scenes)
