"""LoRA (arXiv:2106.09685): a low-rank change of a layer, W + scale · alpha / r · up @ down.

    pipe.load_lora("cats.safetensors", scale=0.8)         add_lora(pipe.unet, rank=8)
    pipe.unload_lora()  # to the last bit                 optimizer = AdamW(train_only_lora(pipe.unet))
    pipe.merge_lora()   # into the weights, to be saved   save_lora(pipe.unet, "mine.safetensors")

A layer that gets a LoRA stays the same object with the same weight at the same path; only its class changes,
to one whose forward adds the LoRAs' part. So the weights are not touched, and taking the LoRAs away is exact.
Down and up are float32 and compute in float32, whatever the network's dtype. Several LoRAs on one network add
up. While it has any, the network can not be saved: merge or unload them first.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky import arguments
from kandinsky.checkpoint import CheckpointError, skeleton
from kandinsky.lora_files import Factors, listed, read_lora, write_lora
from kandinsky.optimize import restored
from kandinsky.packed import PackedLinear
from kandinsky.prior import Prior
from kandinsky.unet import UNet

NETWORKS = {"prior": Prior, "unet": UNet}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")  # the last two: U-Net only


class LoRA(nn.Module):
    """One change of one layer, in float32."""

    def __init__(self, factors: Factors, scale: float = 1.0):
        super().__init__()
        # of its own: a pipeline gives the factors again, untrained, to a network that is read again
        self.down, self.up = nn.Parameter(factors.down.clone()), nn.Parameter(factors.up.clone())
        self.alpha, self.scale = factors.alpha, scale

    @property
    def multiplier(self) -> float:
        return self.scale * self.alpha / len(self.down)

    def delta(self) -> Tensor:
        """What is added to the weight, in its shape."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.multiplier * product.reshape(len(self.up), *self.down.shape[1:])

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRA":
        """Follows the network to its device, not to its dtype."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)


class LoRALinear(nn.Linear):
    """A Linear with LoRAs in `loras`."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        parts = (F.linear(lora.multiplier * F.linear(x.float(), lora.down), lora.up) for lora in self.loras)
        return sum(parts, out.float()).to(out.dtype)


class LoRAConv2d(nn.Conv2d):
    """A convolution with LoRAs in `loras`."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        where = (None, self.stride, self.padding, self.dilation)
        parts = (
            F.conv2d(lora.multiplier * F.conv2d(x.float(), lora.down, *where), lora.up) for lora in self.loras
        )
        return sum(parts, out.float()).to(out.dtype)


WITH_LORA = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


def add_lora(
    network: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: str | tuple[str, ...] | None = None,
    seed: int = 0,
) -> None:
    """Gives a network a LoRA to train; its output stays the same to the bit.

    Nothing is frozen here: torch picks other kernels for frozen weights (5e-7 off). See `train_only_lora`.

    Args:
        alpha: the change is alpha / rank · up @ down; None: rank.
        targets: ends of the names of Linear layers; None: all of attention, the added projections included.
        seed: of down, uniform within ± 1 / √in; up is zero.
    """
    rank = arguments.whole(rank, "rank")
    alpha = float(rank) if alpha is None else arguments.number(alpha, "alpha")
    generator = torch.Generator().manual_seed(arguments.whole(seed, "seed", 0))
    targets = (targets,) if isinstance(targets, str) else targets
    factors, hit = {}, set()
    for name, layer in network.named_modules():
        target = next((t for t in targets or ATTENTION if f".{name}".endswith(f".{t}")), None)
        if target is None or type(layer) not in (nn.Linear, LoRALinear, PackedLinear):
            continue
        hit.add(target)
        bound = 1 / math.sqrt(layer.in_features)
        down = torch.empty(rank, layer.in_features, dtype=torch.float32, device="cpu")
        down.uniform_(-bound, bound, generator=generator)
        factors[name] = Factors(down, down.new_zeros(layer.out_features, rank), alpha)
    missing = [] if targets is None and hit else [t for t in targets or ATTENTION if t not in hit]
    if missing:
        raise ValueError(f"this {type(network).__name__} has no Linear called {', '.join(missing)}")
    Attach("add_lora", factors)(network)


def load_lora(network: nn.Module, path: str | Path, scale: float = 1.0) -> None:
    """Adds a LoRA file to one network.

    Raises:
        CheckpointError: see `read_lora`, and a file for another network; nothing is changed then.
    """
    found = read_lora(path)
    kind = next(
        (name for name, network_class in NETWORKS.items() if isinstance(network, network_class)), None
    )
    for name in found:
        if name != kind:
            ours, theirs = type(network).__name__, NETWORKS[name].__name__
            raise CheckpointError(f"{path} has a LoRA of the {theirs}; this network is the {ours}")
    Attach(str(path), found[kind], arguments.number(scale, "scale"))(network)


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """down and up of every LoRA, in the order of the network's layers."""
    return [parameter for layer in _layers(network).values() for parameter in layer.loras.parameters()]


def train_only_lora(network: nn.Module) -> list[nn.Parameter]:
    """Freezes all but the LoRAs' parameters, added or loaded, and returns these for the optimizer."""
    network.requires_grad_(False)
    parameters = lora_parameters(network)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def save_lora(network: nn.Module, path: str | Path) -> None:
    """Writes the network's LoRA in peft's layout, which `load_lora` and diffusers' `load_lora_adapter` read.

    A scale that it was loaded with becomes part of alpha.

    Raises:
        ValueError: there is none, or a layer has several.
    """
    layers = _layers(network)
    if not layers:
        raise ValueError(f"this {type(network).__name__} has no LoRA to save")
    if any(len(layer.loras) > 1 for layer in layers.values()):
        raise ValueError(
            "several LoRAs are loaded; a file holds one: unload the others, or merge_lora() and save"
        )
    loras = {name: layer.loras[0] for name, layer in layers.items()}
    write_lora({name: Factors(x.down, x.up, x.alpha * x.scale) for name, x in loras.items()}, path)


def remove_lora(network: nn.Module) -> None:
    """Takes every LoRA off a network; its weights were never touched."""
    layers = _layers(network)
    if not layers:
        return
    with restored(network):
        for layer in layers.values():
            del layer.loras
            layer.__class__ = next(plain for plain, other in WITH_LORA.items() if other is type(layer))


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """Adds every LoRA to the weights, in float32 and rounded once, and takes it off."""
    for layer in _layers(network).values():
        layer.weight.copy_(layer.weight.float() + sum(lora.delta() for lora in layer.loras))
    remove_lora(network)


@dataclass(eq=False)  # its tensors cannot be compared as one
class Attach:
    """Puts LoRAs on a network; kept by a pipeline for when the network is read again."""

    source: str
    factors: dict[str, Factors]
    scale: float = 1.0

    def __call__(self, network: nn.Module) -> None:
        with restored(network):
            self.check(network)
            for name, factors in self.factors.items():
                layer = network.get_submodule(name)
                if type(layer) in WITH_LORA:
                    layer.__class__, layer.loras = WITH_LORA[type(layer)], nn.ModuleList()
                layer.loras.append(LoRA(factors, self.scale).to(layer.weight.device))

    def check(self, network: nn.Module) -> None:
        """Raises a CheckpointError that lists the layers that the network lacks and those that do not fit."""
        layers, problems = dict(network.named_modules()), []
        for name, (down, up, _) in self.factors.items():
            layer = layers.get(name)
            if not hasattr(layer, "weight"):
                problems.append(f"this {type(network).__name__} has no layer {name}")
            elif not isinstance(layer, tuple(WITH_LORA)):
                problems.append(f"{name} is a {type(layer).__name__}, which takes no LoRA")
            else:
                needed = tuple(layer.weight.shape)
                change = (len(up), *down.shape[1:])
                if change != needed or up.shape[2:] not in ((), (1, 1)) or up.ndim != down.ndim:
                    shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
                    problems.append(f"{name} has {shapes}, for a weight of {needed}")
        if problems:
            raise CheckpointError(f"{self.source}: {listed(problems)}")


def load_into(pipe: Any, path: str | Path, scale: float = 1.0) -> None:
    """`Kandinsky.load_lora`: every network that the file has keys for gets its part, or none gets any."""
    scale = arguments.number(scale, "scale")
    attached = {name: Attach(str(path), factors, scale) for name, factors in read_lora(path).items()}
    for name, attach in attached.items():
        attach.check(_shape_of(pipe, name))
    for name, attach in attached.items():
        pipe.change(name, attach)


def unload(pipe: Any) -> None:
    """`Kandinsky.unload_lora`: all that are not merged."""
    for name in NETWORKS:
        changes = pipe.changes.get(name, [])
        merged = max((i + 1 for i, change in enumerate(changes) if change is merge_lora), default=0)
        changes[merged:] = [change for change in changes[merged:] if not isinstance(change, Attach)]
    for network in pipe._loaded.values():  # one may have been given to any of them by `add_lora`
        remove_lora(network)


def merge(pipe: Any) -> None:
    """`Kandinsky.merge_lora`: for good; a network that is freed is merged again when it is read again."""
    names = [name for name in NETWORKS if _is_attached(pipe, name)]
    if not names:
        raise ValueError("no LoRA is loaded; load_lora(path) first")
    for name in names:
        pipe.change(name, merge_lora)


def _is_attached(pipe: Any, name: str) -> bool:
    """Whether a network has LoRAs that are not merged, or will have when it is read."""
    if pipe.loaded(name) is not None:
        return bool(_layers(pipe.loaded(name)))
    changes = pipe.changes.get(name, [])
    return any(isinstance(c, Attach) and merge_lora not in changes[i:] for i, c in enumerate(changes))


def _shape_of(pipe: Any, name: str) -> nn.Module:
    """The network itself, or where it is not loaded one like it without memory."""
    if pipe.loaded(name) is not None:
        return pipe.loaded(name)
    config = pipe.unet_config if name == "unet" else pipe.prior_config
    with skeleton():
        return NETWORKS[name](config)


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that have LoRAs, by name."""
    found = network.named_modules()
    return {name: layer for name, layer in found if isinstance(layer, tuple(WITH_LORA.values()))}
