"""Kandinsky 2.2 in pure PyTorch: readable, checked against diffusers, fast."""

from kandinsky.checkpoint import CheckpointError
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder
from kandinsky.movq import MoVQ
from kandinsky.pipeline import Kandinsky
from kandinsky.prior import Prior
from kandinsky.sampling import ImageEmbeds, Step
from kandinsky.unet import UNet

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
