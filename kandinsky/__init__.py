"""Kandinsky 2.2 and 2.1 in pure PyTorch: readable, checked against diffusers, fast."""

from importlib import import_module
from types import ModuleType

from kandinsky.checkpoint import CheckpointError
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder
from kandinsky.movq import MoVQ
from kandinsky.pipeline import Kandinsky
from kandinsky.prior import Prior
from kandinsky.sampling import ImageEmbeds, Step
from kandinsky.unet import UNet

_LATER = ("download", "explain", "inspection", "lora", "optimize", "shapes", "training")


def __getattr__(name: str) -> ModuleType:
    """`kandinsky.optimize` and others, imported when they are named."""
    if name in _LATER:
        return import_module(f"kandinsky.{name}")
    raise AttributeError(f"module 'kandinsky' has no attribute {name!r}")


__all__ = [
    "CLIPImageEncoder",
    "CLIPTextEncoder",
    "CheckpointError",
    "ImageEmbeds",
    "Kandinsky",
    "MoVQ",
    "Prior",
    "Step",
    "UNet",
]
