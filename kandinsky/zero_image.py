"""The zero image's embedding, which stands for "no picture" wherever guidance leads away from one.

It is the image tower's answer to a picture that is zero after normalisation, one vector for all prompts. It
lies in the prior's folder (`zero_image_embeds.safetensors`), so that the tower need not be read to draw.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky.checkpoint import open_safetensors, weight_files
from kandinsky.encoders import CLIPImageEncoder


@torch.no_grad()
def zero_image_embeds(image_encoder: CLIPImageEncoder) -> Tensor:
    """(1, d) float32: the embedding of a picture that is zero after normalisation (not a black one)."""
    size = image_encoder.config.image_size
    return image_encoder(torch.zeros(1, 3, size, size, device=image_encoder.device))


@torch.no_grad()
def compute_zero_image_embeds(
    prior: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same from a prior's folder, layer by layer: the tower's 1.84 B weights are never in memory as a
    whole."""
    folder = Path(prior) / "image_encoder"
    tower = CLIPImageEncoder._find(folder)[0].to(dtype)
    files, size = weight_files(folder, tower.weights_name), tower.config.image_size
    places = {name: path for path in files for name in open_safetensors(path).keys()}

    def read(name: str, layer: nn.Module, _: Any) -> None:
        paths = {key: f"{name}.{key}" for key in layer.state_dict()}
        # opened anew, so that what is mapped goes with the layer
        opened = {path: open_safetensors(path, device) for path in {places[p] for p in paths.values()}}
        own = {key: opened[places[path]].get_tensor(path).to(dtype) for key, path in paths.items()}
        layer.load_state_dict(own, assign=True)

    def drop(layer: nn.Module, *_: Any) -> None:
        layer.to("meta")

    for name, layer in tower.named_modules():
        if not any(layer.children()) or name.endswith(".embeddings"):  # these have weights of their own
            layer.register_forward_pre_hook(partial(read, name))
            layer.register_forward_hook(drop)
    return tower(torch.zeros(1, 3, size, size, device=device))
