"""diffusers' and transformers' networks at the weights of ours, which the scripts measure against.

Needs the test extra, `pip install -e '.[test]'`, imported when used.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def distance(x: Tensor, exact: Tensor) -> float:
    """Relative L2, ‖x − exact‖ / ‖exact‖"""
    return ((x - exact).norm() / exact.norm()).item()


def reference_for(model: nn.Module) -> nn.Module:
    """Their network at the same weights, in the same memory.

    Raises:
        ValueError: the libraries are not there.
    """
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ValueError(f"{error.name} is needed to compare with; pip install -e '.[test]'") from None

    published = model.config.published()
    with parameters_without_memory():
        if isinstance(model, (CLIPTextEncoder, CLIPImageEncoder)):
            kind = "Text" if isinstance(model, CLIPTextEncoder) else "Vision"
            config = getattr(transformers, f"CLIP{kind}Config")(**published)
            reference = getattr(transformers, f"CLIP{kind}ModelWithProjection")(config)
        elif isinstance(model, MultilingualCLIP):
            from diffusers.pipelines.kandinsky import text_encoder

            reference = text_encoder.MultilingualCLIP(text_encoder.MCLIPConfig(**published))
        else:
            reference = getattr(diffusers, published["_class_name"]).from_config(published)
    return share(reference, model).eval()


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """For networks whose parameters are given afterwards. Buffers are real, as some are in no file."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def share(reference: nn.Module, model: nn.Module) -> nn.Module:
    """Gives theirs the tensors of ours."""
    reference.load_state_dict(model.state_dict(), assign=True)
    for module in reference.modules():  # buffers that are in no file
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(model.device))
    return reference
