"""The training loop: one file for every network, on one process or many.

    objective.batch(indices) → tensors ─ objective.loss ─ gradients, averaged over processes ─ AdamW ─ EMA

A step is a function of the state before it and of (seed, step) alone: which samples it sees and which noise
it draws follow from these numbers, so no random state is kept. The state is one safetensors file, written
beside the old one, synced and renamed; a run killed at any moment goes on from there to the same bits.
"""

import copy
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from kandinsky import arguments, images
from kandinsky.checkpoint import (
    CheckpointError,
    atomic_file,
    open_safetensors,
    read_json,
    temporaries,
    write_json,
    write_safetensors,
)
from kandinsky.lora import lora_parameters, save_lora
from kandinsky.optimize import is_optimized

DROPPED = 0.1  # share of samples without text or image embedding (arXiv:2204.06125 §2.1 and §2.2)
LEAST = 1e-9  # of what must not be zero
IF_TORN = "delete it to begin anew"  # of what a training wrote: it is not to be had elsewhere
STATE, METRICS, WRITTEN = "state.safetensors", "metrics.jsonl", "written.json"


@dataclass(frozen=True)
class Settings:
    """How a run goes. If it is resumed with others than `save_every` and `sample_every`, it goes on from
    where it was, but not to the same bits; with other `steps` only until the decay of either begins."""

    steps: int = 10_000
    batch_size: int = 64  # of one process, in one backward pass
    accumulate: int = 1  # backward passes in a step
    learning_rate: float = 1e-3
    warmup: int = 200  # steps
    decay: float = 0.3  # the last part of the steps, in which the learning rate falls to zero
    weight_decay: float = 0.01
    beta2: float = 0.99
    max_norm: float = 1.0  # of the gradient
    ema: float = 0.999
    bf16: bool = False
    seed: int = 0
    save_every: int = 200
    sample_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "sample_every"):
            arguments.whole(getattr(self, name), name)
        for name in ("warmup", "seed"):
            arguments.whole(getattr(self, name), name, 0)
        for name in ("learning_rate", "weight_decay"):
            arguments.number(getattr(self, name), name, 0)
        arguments.number(self.max_norm, "max_norm", LEAST)
        arguments.number(self.beta2, "beta2", 0, 1 - LEAST)
        for name in ("decay", "ema"):
            arguments.share(getattr(self, name), name)

    def rate(self, step: int) -> float:
        """The learning rate of a step: up in a line, level, and down to zero in a line."""
        left = (self.steps - step) / max(self.decay * self.steps, 1)
        return self.learning_rate * min((step + 1) / max(self.warmup, 1), left, 1)


class Objective(nn.Module):
    """What is trained: networks as submodules, their data and their loss. Frozen ones need no gradient."""

    def batch(self, indices: list[int]) -> dict[str, Any]:
        """The samples of these numbers. A pure function: it runs ahead of the training, in another thread."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Any], draws: "Draws") -> tuple[Tensor, dict[str, Tensor]]:
        """-> the mean loss of the batch, and what else to report"""
        raise NotImplementedError

    def sample(self, draws: "Draws") -> tuple[Tensor | None, dict[str, float]]:
        """A grid of pictures in [0, 1], (rows, columns, 3, h, w), and measurements on fresh data. Only the
        first process calls it: it must wait for no other."""
        return None, {}

    def save(self, folder: Path) -> None:
        """Writes the networks in the published layout."""
        raise NotImplementedError


class Draws:
    """A step's random numbers: drawn for the whole batch, of which each process keeps its own rows."""

    def __init__(self, key: str, rows: slice, total: int, device: torch.device | str = "cpu"):
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        self.rows, self.total, self.device = rows, total, device

    def part(self, rows: slice) -> "Draws":
        """What these rows alone draw from here on."""
        part = copy.copy(self)
        part.generator, part.rows = self.generator.clone_state(), rows
        return part

    def randn(self, *shape: int) -> Tensor:
        """(b, *shape)"""
        return torch.randn(self.total, *shape, generator=self.generator)[self.rows].to(self.device)

    def rand(self, *shape: int) -> Tensor:
        """(b, *shape) in [0, 1)"""
        return torch.rand(self.total, *shape, generator=self.generator)[self.rows].to(self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        """(b, *shape) integers, 0 to high - 1"""
        return torch.randint(high, (self.total, *shape), generator=self.generator)[self.rows].to(self.device)


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_device(device: str) -> str:
    """Of this process, where torchrun gives each a GPU of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, if it did; gives the device of this one."""
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    is_cuda = device.startswith("cuda")
    distributed.init_process_group("nccl" if is_cuda else "gloo")
    try:
        yield own_device(device)
    finally:
        distributed.destroy_process_group()


def initialize(model: nn.Module, seed: int, zero: tuple[str, ...] = ()) -> nn.Module:
    """First weights, from a generator of their own.

    zero: ends of the names of layers that start at zero, so that residual blocks start as the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = 0.0 if name.endswith(zero or ("\0",)) else module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5, generator=generator)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("class_embedding", "prd_embedding", "positional_embedding"):
            nn.init.normal_(parameter, std=0.5, generator=generator)
    for name, module in model.named_modules():
        if name.endswith("conv_y"):  # a spatial norm starts as a plain one
            nn.init.ones_(module.bias)
    return model


def save_as(network: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Writes a network's weights in another precision; the network keeps its own."""
    cast = {id(p): nn.Parameter(p.detach().to(dtype), False) for p in network.parameters()}
    copy.deepcopy(network, cast).save_pretrained(folder)  # which takes these for copied already


def save_trained(network: nn.Module, folder: Path, name: str, dtype: torch.dtype) -> None:
    """Writes the network's LoRA, where it has one, else the network in its folder."""
    if lora_parameters(network):
        save_lora(network, folder / f"{name}-lora.safetensors")
    else:
        save_as(network, folder / name, dtype)


def checkpoint_blocks(network: nn.Module, *kinds: type[nn.Module]) -> None:
    """Lets blocks of these classes recompute in the backward pass what they would have kept."""
    for module in network.modules():
        if isinstance(module, kinds):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


class Trainer:
    """Trains an objective. Networks go to a folder; state, metrics and sample grids to `name` in it."""

    def __init__(
        self,
        objective: Objective,
        settings: Settings,
        folder: Path,
        device: str = "cpu",
        name: str = "training",
    ):
        if is_optimized(objective):
            raise ValueError("an optimized network is for drawing; kandinsky.optimize.restore(network) first")
        self.objective, self.settings = objective.to(device), settings
        self.output, self.folder = Path(folder), Path(folder) / name
        self.device, self.step = device, 0
        self.weights = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        matrices = [p for p in self.weights.values() if p.ndim > 1]
        vectors = [p for p in self.weights.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}]
        groups.append({"params": vectors, "weight_decay": 0.0})
        betas = (0.9, settings.beta2)
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas)
        if (self.folder / STATE).exists():
            self.load()
        if world_size() > 1:
            for tensor in (*self.weights.values(), *self.average.values()):
                distributed.broadcast(tensor.data, 0)

    def run(self, progress: bool = True) -> None:
        """Trains up to the last step, then saves. What is saved can be trained further with more steps."""
        from tqdm import tqdm

        settings, main = self.settings, rank() == 0
        self.folder.mkdir(parents=True, exist_ok=True)
        if main:
            self._forget_later_metrics()
            for path in temporaries(self.folder / STATE):  # of saves that were killed
                path.unlink(missing_ok=True)
        bar = tqdm(total=settings.steps, initial=self.step, disable=not (progress and main), mininterval=1)
        with bar, ThreadPoolExecutor(1) as ahead:
            batches = self._batches(ahead)
            while self.step < settings.steps:
                started = time.perf_counter()
                metrics = self.train_step(next(batches))
                self.step += 1
                bar.update()
                last = self.step == settings.steps
                if main and (self.step % 10 == 0 or last):
                    self._report(metrics, time.perf_counter() - started, bar)
                if main and (self.step % settings.save_every == 0 or last):
                    self.save()
                if main and (self.step % settings.sample_every == 0 or last):
                    self.write()
                    self.sample()
        if main and not self._is_written():  # by a run that was stopped behind its last save
            self.write()
        if world_size() > 1:
            distributed.barrier()

    def train_step(self, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One update from `accumulate` batches -> the last one's loss and measurements"""
        settings = self.settings
        self.objective.train()
        losses = []
        for part, batch in enumerate(batches):
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=settings.bf16):
                loss, metrics = self.objective.loss(batch, self._draws(f"{self.step} {part}"))
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        self._average_gradients()
        norm = nn.utils.clip_grad_norm_(self.weights.values(), settings.max_norm)
        if not torch.stack([*losses, norm]).isfinite().all():  # one wait for all batches
            numbers = f"the loss is {losses[-1].item()} and the gradient's norm {norm.item()}"
            raise FloatingPointError(f"{numbers} at step {self.step}; try a lower rate")
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)
        return {"loss": losses[-1], "gradient": norm, **metrics}

    def write(self) -> None:
        """Writes the networks, with the averaged weights."""
        with self.averaged(), torch.no_grad():
            self.objective.save(self.output)
        write_json({"step": self.step}, self.folder / WRITTEN)

    def _is_written(self) -> bool:
        """Whether of this step. Not again then: a later stage may have written over some of it."""
        path = self.folder / WRITTEN
        return path.exists() and read_json(path).get("step") == self.step

    def sample(self) -> None:
        """Measures and draws with the averaged weights."""
        draws = Draws(f"{self.settings.seed} sample", slice(None), 64, self.device)
        with self.averaged(), torch.no_grad():
            grid, measured = self.objective.sample(draws)
        if measured:
            self._write_metrics({"step": self.step, **measured})
        if grid is not None:
            path = self.folder / "samples" / f"{self.step:07}.png"
            images.save_image(images.to_pil(tile(grid)[None])[0], path, overwrite=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The objective with its averaged weights."""
        self.objective.eval()
        own = {name: p.data for name, p in self.weights.items()}
        for name, p in self.weights.items():
            p.data = self.average[name]
        try:
            yield
        finally:
            for name, p in self.weights.items():
                p.data = own[name]
            self.objective.train()

    def save(self) -> None:
        """Writes the whole state as one file; the rename is the moment from which a run goes on."""
        tensors = {}
        for name, p in self.weights.items():
            tensors |= {f"weights.{name}": p, f"average.{name}": self.average[name]}
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[p][moment]
        write_safetensors(tensors, self.folder / STATE, {"step": str(self.step)})

    def load(self) -> None:
        """Takes up the state of the folder; one of another objective is a CheckpointError."""
        path = self.folder / STATE
        file = open_safetensors(path, if_torn=IF_TORN)
        kinds = ("weights", "average", "exp_avg", "exp_avg_sq")
        wanted = {f"{kind}.{name}": p.shape for name, p in self.weights.items() for kind in kinds}
        found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}
        if wanted != found:
            wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise CheckpointError(
                f"{path} is of another model: {', '.join(wrong[:4])} differ; use a new folder"
            )
        self.step = int(file.metadata()["step"])
        for name, p in self.weights.items():
            read = [file.get_tensor(f"{kind}.{name}").to(self.device, copy=True) for kind in kinds]
            p.data.copy_(read[0])
            self.average[name].copy_(read[1])
            step = torch.tensor(float(self.step))
            self.optimizer.state[p] = {"step": step, "exp_avg": read[2], "exp_avg_sq": read[3]}

    def _batches(self, ahead: ThreadPoolExecutor) -> Iterator[list[dict[str, Any]]]:
        """Each step's batches, made one step ahead."""
        size, parts, step = self.settings.batch_size, self.settings.accumulate, self.step

        def make(step: int) -> list[dict[str, Any]]:
            starts = [((step * parts + part) * world_size() + rank()) * size for part in range(parts)]
            return [self.objective.batch(list(range(start, start + size))) for start in starts]

        coming = ahead.submit(make, step)
        while True:
            made, step = coming.result(), step + 1
            if step < self.settings.steps:
                coming = ahead.submit(make, step)
            yield [{name: to_device(value, self.device) for name, value in b.items()} for b in made]

    def _draws(self, key: str) -> Draws:
        size = self.settings.batch_size
        rows = slice(rank() * size, (rank() + 1) * size)
        return Draws(f"{self.settings.seed} {key}", rows, size * world_size(), self.device)

    def _average_gradients(self) -> None:
        if world_size() == 1:
            return
        gradients = [p.grad for p in self.weights.values() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        flat /= world_size()
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(averaged.reshape(gradient.shape))

    def _report(self, metrics: dict[str, Tensor], seconds: float, bar: Any) -> None:
        numbers = {name: round(float(value), 6) for name, value in metrics.items()}
        pictures = self.settings.batch_size * self.settings.accumulate * world_size()
        numbers["pictures_per_second"] = round(pictures / seconds, 2)
        bar.set_postfix(loss=numbers["loss"], refresh=False)
        self._write_metrics({"step": self.step, "rate": self.settings.rate(self.step - 1), **numbers})

    def _write_metrics(self, numbers: dict[str, float]) -> None:
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")

    def _forget_later_metrics(self) -> None:
        """After a kill the metrics may be ahead of the state."""
        path = self.folder / METRICS
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def to_device(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def tile(grid: Tensor) -> Tensor:
    """(rows, columns, 3, h, w) -> (3, rows * (h + 2), columns * (w + 2)), white between the pictures"""
    padded = nn.functional.pad(grid.float().cpu().clamp(0, 1), (1, 1, 1, 1), value=1.0)
    return padded.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
