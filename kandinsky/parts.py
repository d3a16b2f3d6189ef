"""The networks of a pipeline: where they lie, when they are read, and when they are freed."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky import arguments
from kandinsky.checkpoint import CheckpointError, open_safetensors
from kandinsky.config import PriorConfig
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, PromptTokenizer
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.schedulers import load_scheduler
from kandinsky.unet import UNet


class Part:
    """A network that is read from its subfolder when first used; assigning another replaces it for good."""

    def __init__(self, network: type, repository: str):
        self.network, self.repository = network, repository

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, parts: "Parts | None", owner: type) -> Any:
        if parts is None:
            return self
        if self.name not in parts._loaded:
            where = {"dtype": parts.dtype, "device": parts.device}
            network = self.network.from_pretrained(self.folder(parts), **where)
            for change in parts.changes.get(self.name, []):
                change(network)
            parts._loaded[self.name] = network
        return parts._loaded[self.name]

    def __set__(self, parts: "Parts", network: Any) -> None:
        parts._loaded[self.name] = network
        parts._replaced.add(self.name)
        if self.name == "image_encoder":
            parts._constants.pop("zero_image_embeds", None)

    def folder(self, parts: "Parts") -> Path:
        return (parts.decoder_folder if self.repository == "decoder" else parts.need_prior()) / self.name


class Parts:
    """A decoder folder and a prior folder in the published layout, and the networks read from them.

    Attributes:
        text_encoder, prior, image_encoder, unet, movq: networks, read when first used; assign to replace
        them. tokenizer, scheduler, prior_scheduler: likewise. unet_config, movq_config: known before any
        weight is read. changes: by network, what is done to it each time that it is read; see `change`.
    """

    text_encoder = Part(CLIPTextEncoder, "prior")
    prior = Part(Prior, "prior")
    image_encoder = Part(CLIPImageEncoder, "prior")
    unet = Part(UNet, "decoder")
    movq = Part(MoVQ, "decoder")

    @classmethod
    @arguments.public
    def from_pretrained(
        cls,
        decoder: str | Path,
        prior: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        keep_loaded: bool = True,
        scheduler: str = "scheduler",
    ) -> "Parts":
        """Opens a checkpoint; nothing is downloaded, and weights are read when first needed.

        Args:
            decoder: a folder in the published layout (`unet/ movq/ scheduler/`).
            prior: likewise (`prior/ text_encoder/ tokenizer/ scheduler/ image_encoder/`); None: the sibling
                folder that belongs to the decoder by name. Where there is none, only embeddings can be drawn.
            keep_loaded: False frees every network after use and reads it again when needed.
            scheduler: the decoder's subfolder that names scheduler and values.

        Raises:
            ValueError: no such folder, device or dtype, or (as CheckpointError) not such a checkpoint.
        """
        decoder = arguments.folder(decoder, "decoder")
        if not (decoder / "unet").is_dir():
            raise CheckpointError(f"{decoder} is not a decoder: it has no unet/{_what_it_is(decoder)}")
        prior = _sibling_prior(decoder) if prior is None else arguments.folder(prior, "prior")
        if prior is not None and not (prior / "prior").is_dir():
            raise CheckpointError(f"{prior} is not a prior: it has no prior/{_what_it_is(prior)}")

        parts = cls.__new__(cls)
        parts.decoder_folder, parts.prior_folder, parts.keep_loaded = decoder, prior, keep_loaded
        parts.device, parts.dtype = arguments.device(device), arguments.dtype(dtype)
        parts.unet_config = UNet.read_config(decoder / "unet")
        parts.movq_config = MoVQ.read_config(decoder / "movq")
        parts.scheduler = load_scheduler(decoder / scheduler)
        parts._loaded, parts._replaced, parts._constants = {}, set(), {}
        parts.changes = {}
        return parts

    @arguments.public
    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Parts":
        """Moves and casts every loaded network, and those to come; returns the pipeline."""
        self.device = self.device if device is None else arguments.device(device)
        self.dtype = self.dtype if dtype is None else arguments.dtype(dtype)
        for network in self._loaded.values():
            network.to(self.device, self.dtype)
        return self

    @property
    def tokenizer(self) -> PromptTokenizer:
        return self._once(
            "tokenizer", lambda: PromptTokenizer.from_pretrained(self.need_prior() / "tokenizer")
        )

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._constants["tokenizer"] = tokenizer

    @property
    def prior_scheduler(self) -> Any:
        return self._once("prior_scheduler", lambda: load_scheduler(self.need_prior() / "scheduler"))

    @prior_scheduler.setter
    def prior_scheduler(self, scheduler: Any) -> None:
        self._constants["prior_scheduler"] = scheduler

    @property
    def prior_config(self) -> PriorConfig:
        """Known before any weight is read."""
        replaced = self._loaded["prior"] if "prior" in self._replaced else None
        return replaced.config if replaced else Prior.read_config(self.need_prior() / "prior")

    @property
    def zero_image_embeds(self) -> Tensor:
        """(1, d) float32: the zero image's embedding, from the prior's folder or the image tower."""
        return self._once("zero_image_embeds", self._read_zero_image_embeds).to(self.device)

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """Gives a network; frees it afterwards unless it is to be kept."""
        try:
            yield getattr(self, name)
        finally:
            if not self.keep_loaded and name not in self._replaced:
                self._loaded.pop(name, None)

    def loaded(self, name: str) -> Any | None:
        """A network, if it is in memory."""
        return self._loaded.get(name)

    def change(self, name: str, change: Callable[[Any], None]) -> None:
        """Does `change(network)` now, where the network is in memory, and each time that it is read."""
        self.changes.setdefault(name, []).append(change)
        if name in self._loaded:
            change(self._loaded[name])

    def check_files(self, *names: str) -> None:
        """Raises a CheckpointError now for a network that could not be read later; reads headers only."""
        for name in names:
            if name not in self._loaded:
                part = vars(Parts)[name]
                part.network.check_pretrained(part.folder(self))

    def need_prior(self) -> Path:
        """The prior's folder, or an error that says how to give one."""
        if self.prior_folder is None:
            raise CheckpointError(
                f"{self.decoder_folder} has no prior beside it; pass prior=FOLDER, or both halves of embeds"
            )
        return self.prior_folder

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._constants:
            self._constants[name] = make()
        return self._constants[name]

    def _read_zero_image_embeds(self) -> Tensor:
        replaced = "image_encoder" in self._replaced  # then the stored constant is another tower's
        path = None if replaced else self.need_prior() / "zero_image_embeds.safetensors"
        if path is None or not path.exists():
            with self.using("image_encoder") as image_encoder:
                return zero_image_embeds(image_encoder)
        file = open_safetensors(path)
        if list(file.keys()) != ["zero_image_embeds"]:
            raise CheckpointError(f"{path} does not hold zero_image_embeds alone")
        embeds = file.get_tensor("zero_image_embeds")
        return arguments.embeddings(embeds, self.unet_config.embedding_dim, str(path))


@torch.no_grad()
def zero_image_embeds(image_encoder: CLIPImageEncoder) -> Tensor:
    """(1, d) float32: the embedding of a picture that is zero after normalisation (not a black one)."""
    size = image_encoder.config.image_size
    return image_encoder(torch.zeros(1, 3, size, size, device=image_encoder.device))


def compute_zero_image_embeds(prior: str | Path) -> Tensor:
    """The same from a prior's folder, in float32; reads the whole image tower."""
    return zero_image_embeds(CLIPImageEncoder.from_pretrained(Path(prior) / "image_encoder"))


def _sibling_prior(decoder: Path) -> Path | None:
    """The prior that belongs to a decoder by name, where it lies beside it."""
    decoder = decoder.resolve()
    family = re.match(r"(kandinsky-2-\d|mini)(-|$)", decoder.name)
    sibling = decoder.parent / f"{family[1]}-prior" if family else None
    return sibling if sibling is not None and sibling.is_dir() else None


def _what_it_is(folder: Path) -> str:
    parts = {"unet": "a decoder", "prior": "a prior", "config.json": "a single network"}
    return next((f"; it looks like {what}" for name, what in parts.items() if (folder / name).exists()), "")
