"""The networks of a pipeline: where they lie, when they are read, and when they are freed."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kandinsky import arguments
from kandinsky.checkpoint import CheckpointError, lasting, open_safetensors
from kandinsky.config import MoVQConfig, PriorConfig, UNetConfig
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.prompts import MultilingualTokenizer, PromptTokenizer
from kandinsky.scheduler_files import DECODER_SCHEDULERS, PRIOR_SCHEDULERS, load_scheduler
from kandinsky.schedulers import NoiseScheduler, UnCLIPScheduler
from kandinsky.unet import UNet
from kandinsky.zero_image import compute_zero_image_embeds, zero_image_embeds

# which part reads what they make
TOKENIZERS = {"text_encoder": "tokenizer", "decoder_text_encoder": "decoder_tokenizer"}

Pipeline = TypeVar("Pipeline", bound="Parts")


class Part:
    """A network that is read from its subfolder when first used.

    Assigning another replaces it for good; after `del` or assigning None it is read again.
    """

    def __init__(self, network: type, repository: str, subfolder: str | None = None):
        self.network, self.repository, self.subfolder = network, repository, subfolder

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.subfolder = name, self.subfolder or name

    def __get__(self, parts: "Parts | None", owner: type) -> Any:
        if parts is None:
            return self
        if getattr(parts._loaded.get(self.name), "left_out", ()):
            del parts._loaded[self.name]  # read anew, as a whole
        if self.name not in parts._loaded:
            self.read(parts)
        return parts._loaded[self.name]

    @lasting()
    def read(self, parts: "Parts", without: tuple[str, ...] = ()) -> None:
        """without: attributes of the network that are left out, until someone asks for the whole."""
        where = {"dtype": parts.dtype, "device": parts.device}
        network = self.network.from_pretrained(self.folder(parts), **where, without=without)
        for change in parts.changes.get(self.name, []):
            change(network)
        parts._loaded[self.name] = network

    def __set__(self, parts: "Parts", network: Any) -> None:
        if self.name == "image_encoder":
            parts._constants.pop("zero_image_embeds", None)  # it may be another tower's
        if network is None:
            parts._loaded.pop(self.name, None)
            parts._replaced.discard(self.name)
            return
        if hasattr(network, "_orig_mod"):
            raise TypeError(f"{self.name} is compiled; pipe.optimize(compile=True) compiles it in its place")
        arguments.instance(network, self.name, (self.network,))
        if network.left_out:
            what = f"{self.name} was read without {', '.join(network.left_out)}"
            raise ValueError(f"{what}; a pipeline takes whole networks")
        here, there = parts.device, network.device
        if here.type != there.type or arguments.index_of(here) != arguments.index_of(there):
            raise ValueError(
                f"{self.name} is on {there}, the pipeline on {here}; move one of them with .to()"
            )
        parts._loaded[self.name] = network
        parts._replaced.add(self.name)

    def __delete__(self, parts: "Parts") -> None:
        self.__set__(parts, None)

    def folder(self, parts: "Parts") -> Path:
        repository = parts.decoder_folder if self.repository == "decoder" else parts.need_prior()
        return repository / self.subfolder

    def config(self, parts: "Parts") -> Any:
        """Known before any weight is read."""
        if self.name in parts._replaced:
            return parts._loaded[self.name].config
        return parts._once(f"{self.name} config", lambda: self.network.read_config(self.folder(parts)))


class Parts:
    """A decoder folder and a prior folder in the published layout, and the networks read from them.

    Attributes:
        text_encoder, prior, image_encoder, unet, movq: networks, read when first used; assign to replace
        them. tokenizer, scheduler, prior_scheduler: likewise. decoder_text_encoder, decoder_tokenizer: what
        2.1's decoder reads the prompt with. prior_config, unet_config, movq_config: known
        before any weight is read. changes: by network, what is done to it each time that it is read; see
        `change`. is_optimized: whether `Kandinsky.optimize` is among them.
    """

    text_encoder = Part(CLIPTextEncoder, "prior")
    prior = Part(Prior, "prior")
    image_encoder = Part(CLIPImageEncoder, "prior")
    unet = Part(UNet, "decoder")
    movq = Part(MoVQ, "decoder")
    decoder_text_encoder = Part(MultilingualCLIP, "decoder", "text_encoder")

    def __init__(
        self, decoder: Path, prior: Path | None, device: torch.device, dtype: torch.dtype, keep_loaded: bool
    ):
        """`from_pretrained` checks what it is given, and calls this."""
        # a process may go to another folder before a network is read
        self.decoder_folder, self.prior_folder = Path(os.path.abspath(decoder)), prior
        self.device, self.dtype, self.keep_loaded = device, dtype, keep_loaded
        self._loaded: dict[str, Any] = {}  # networks by name
        self._replaced: set[str] = set()  # those of them that someone assigned
        self._constants: dict[str, Any] = {}  # what was read or made once
        self.changes: dict[str, list[Callable]] = {}
        self.is_optimized = False

    @classmethod
    @arguments.public
    @lasting()
    def from_pretrained(
        cls: type[Pipeline],
        decoder: str | Path,
        prior: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        keep_loaded: bool = True,
        scheduler: str = "scheduler",
    ) -> Pipeline:
        """Opens a checkpoint; nothing is downloaded, and weights are read when first needed.

        Args:
            decoder: a folder in the published layout (`unet/ movq/ scheduler/`; 2.1 also
                `text_encoder/ tokenizer/`).
            prior: likewise (`prior/ text_encoder/ tokenizer/ scheduler/ image_encoder/`); None: the sibling
                folder that belongs to the decoder by name. Where there is none, only embeddings can be drawn.
            keep_loaded: False frees every network after use and reads it again when needed; changes made to
                one stay only where it is assigned (`pipe.unet = unet`).
            scheduler: the decoder's subfolder that names scheduler and values.

        Raises:
            ValueError: no such folder, device or dtype, or (as CheckpointError) not such a checkpoint.
        """
        decoder = arguments.folder(decoder, "decoder")
        if not (decoder / "unet").is_dir():
            raise CheckpointError(f"{decoder} is not a decoder: it has no unet/{_what_it_is(decoder)}")
        if prior is not None:
            prior = arguments.folder(prior, "prior")
            if not (prior / "prior").is_dir():
                raise CheckpointError(f"{prior} is not a prior: it has no prior/{_what_it_is(prior)}")
            prior = Path(os.path.abspath(prior))

        prior, keep_loaded = prior or _sibling_prior(decoder), arguments.flag(keep_loaded, "keep_loaded")
        parts = cls(decoder, prior, arguments.device(device), arguments.dtype(dtype), keep_loaded)
        folder = decoder / arguments.instance(scheduler, "scheduler", (str,))
        parts.scheduler = load_scheduler(folder, DECODER_SCHEDULERS)
        _ = parts.unet_config, parts.movq_config  # a folder that is no checkpoint is refused here
        return parts

    @arguments.public
    @lasting()
    def to(
        self: Pipeline, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Pipeline:
        """Moves and casts every loaded network, and those to come; returns the pipeline. A network that
        another pipeline shares goes along: call `to` on that one as well. Where it fails the pipeline
        stays where it was: what had moved is moved back, and what was cast is read again when needed, or cast
        back if it was assigned."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device is {device}; pass it as dtype=")
        device = self.device if device is None else arguments.device(device)
        dtype = self.dtype if dtype is None else arguments.dtype(dtype)
        moved = []
        try:
            for name, network in self._loaded.items():
                moved.append(name)
                network.to(device, dtype)
        except BaseException:
            for name in moved:
                if dtype == self.dtype or name in self._replaced:
                    self._loaded[name].to(self.device, self.dtype)
                else:
                    del self._loaded[name]
            raise
        self.device, self.dtype = device, dtype
        self._constants.pop("zero_image_embeds", None)  # it may be of another dtype's accuracy
        return self

    @property
    def prior_config(self) -> PriorConfig:
        return Parts.prior.config(self)

    @property
    def unet_config(self) -> UNetConfig:
        return Parts.unet.config(self)

    @property
    def movq_config(self) -> MoVQConfig:
        return Parts.movq.config(self)

    @property
    def tokenizer(self) -> PromptTokenizer:
        return self._once(
            "tokenizer", lambda: PromptTokenizer.from_pretrained(self.need_prior() / "tokenizer")
        )

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        if not isinstance(tokenizer, PromptTokenizer) and hasattr(tokenizer, "backend_tokenizer"):
            tokenizer = PromptTokenizer.from_transformers(tokenizer)  # one of transformers'
        self._constants["tokenizer"] = arguments.instance(tokenizer, "tokenizer", (PromptTokenizer,))

    @property
    def decoder_tokenizer(self) -> MultilingualTokenizer:
        folder = self.decoder_folder / "tokenizer"
        return self._once("decoder_tokenizer", lambda: MultilingualTokenizer.from_pretrained(folder))

    @decoder_tokenizer.setter
    def decoder_tokenizer(self, tokenizer: Any) -> None:
        known = arguments.instance(tokenizer, "decoder_tokenizer", (MultilingualTokenizer,))
        self._constants["decoder_tokenizer"] = known

    @property
    def scheduler(self) -> Any:
        return self._constants["scheduler"]

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._constants["scheduler"] = arguments.instance(scheduler, "scheduler", (NoiseScheduler,))

    @property
    def prior_scheduler(self) -> Any:
        return self._once(
            "prior_scheduler", lambda: load_scheduler(self.need_prior() / "scheduler", PRIOR_SCHEDULERS)
        )

    @prior_scheduler.setter
    def prior_scheduler(self, scheduler: Any) -> None:
        known = arguments.instance(scheduler, "prior_scheduler", (UnCLIPScheduler,))
        self._constants["prior_scheduler"] = known

    @property
    def zero_image_embeds(self) -> Tensor:
        """(1, d) float32: the zero image's embedding, from the prior's folder or the image tower."""
        embeds = self._once("zero_image_embeds", self._read_zero_image_embeds)
        return arguments.embeddings(embeds, self.unet_config.image_dim, "the zero image").to(self.device)

    @contextmanager
    def using(self, name: str, without: tuple[str, ...] = ()) -> Iterator[Any]:
        """Yields a network and, with keep_loaded=False, frees it afterwards. without: attributes that are
        left out if it has to be read first."""
        try:
            if without and name not in self._loaded:
                getattr(Parts, name).read(self, without)
            yield self._loaded[name] if without else getattr(self, name)
        finally:
            if not self.keep_loaded and name not in self._replaced:
                self._loaded.pop(name, None)

    def loaded(self, name: str) -> Any | None:
        """A network, if it is in memory; MoVQ may be there without what encodes."""
        return self._loaded.get(name)

    def change(self, name: str, change: Callable[[Any], None]) -> None:
        """Does `change(network)` now, where the network is in memory, and each time that it is read; MoVQ
        may be read without what encodes, which is a `LeftOut` then. One that fails now is not kept. A
        ValueError where no network is called so."""
        arguments.choice(name, "name", tuple(n for n, part in vars(Parts).items() if isinstance(part, Part)))
        if name in self._loaded:
            with lasting():
                change(self._loaded[name])
        self.changes.setdefault(name, []).append(change)
        if name == "image_encoder":
            self._constants.pop("zero_image_embeds", None)  # it was the unchanged tower's

    def check_files(self, *names: str) -> None:
        """Raises a CheckpointError now for a network that could not be read later; reads headers only, and
        the tokenizer of a text encoder."""
        for name in names:
            if name not in self._loaded:
                part = getattr(Parts, name)
                part.network.check_pretrained(part.folder(self))
            if name in TOKENIZERS:
                getattr(self, TOKENIZERS[name])

    def check_zero_image(self) -> None:
        """The same for the zero image's embedding: stored, or an image tower to compute it with."""
        if "zero_image_embeds" not in self._constants and self._zero_image_file() is None:
            self.check_files("image_encoder")
        else:
            _ = self.zero_image_embeds

    def need_prior(self) -> Path:
        """The prior's folder, or an error that says how to give one."""
        if self.prior_folder is None:
            model, dim = ("2.1", 768) if self.unet_config.text else ("2.2", 1280)
            official = self.unet_config.image_dim == dim
            hint = "the prior must be the one whose embeddings this decoder was trained on"
            if official:
                hint = f"`python scripts/download_weights.py {model} --only prior` fetches one"
            raise CheckpointError(
                f"{self.decoder_folder} has no prior beside it; pass prior=FOLDER (--prior), or both halves "
                f"of embeds; {hint}"
            )
        return self.prior_folder

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._constants:
            with lasting():
                self._constants[name] = make()
        return self._constants[name]

    def _zero_image_file(self) -> Path | None:
        if "image_encoder" in self._replaced or self.changes.get("image_encoder"):
            return None  # what is stored is another tower's
        path = self.need_prior() / "zero_image_embeds.safetensors"
        return path if path.exists() else None

    def _read_zero_image_embeds(self) -> Tensor:
        path = self._zero_image_file()
        if path is None:
            was_loaded, plain = "image_encoder" in self._loaded, Parts.image_encoder.network
            is_plain = type(self).image_encoder.network is plain and not self.changes.get("image_encoder")
            if is_plain and not was_loaded:
                return compute_zero_image_embeds(self.need_prior(), self.device, self.dtype)
            embeds = zero_image_embeds(self.image_encoder)
            if not was_loaded:
                del self.image_encoder
            return embeds
        file = open_safetensors(path)
        if list(file.keys()) != ["zero_image_embeds"]:
            raise CheckpointError(f"{path} does not hold zero_image_embeds alone")
        embeds = arguments.embeddings(
            file.get_tensor("zero_image_embeds"), self.unet_config.image_dim, str(path)
        )
        if len(embeds) != 1:
            raise CheckpointError(f"{path} holds {len(embeds)} embeddings; it is one that is needed")
        return embeds


def _sibling_prior(decoder: Path) -> Path | None:
    """The prior that belongs to a decoder by name, beside it or beside what a link to it points at."""
    for folder in (Path(os.path.abspath(decoder)), decoder.resolve()):
        family = re.match(r"(kandinsky-2-\d|mini)(-|$)", folder.name)
        if family and (folder.parent / f"{family[1]}-prior").is_dir():
            return folder.parent / f"{family[1]}-prior"
    return None


def _what_it_is(folder: Path) -> str:
    parts = {"unet": "a decoder", "prior": "a prior", "config.json": "a single network"}
    return next((f"; it looks like {what}" for name, what in parts.items() if (folder / name).exists()), "")
