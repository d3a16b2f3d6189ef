"""The prior's networks and the MoVQ of 2.1: the published configs give the published tensors."""

import json
import re

import pytest

from kandinsky.config import read_config
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.random_weights import file_size, layout
from tests.helpers import SHARED

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the project's documents are not here")


@pytest.mark.parametrize(
    "name, network",
    [
        ("kandinsky-2-1-prior__prior", Prior),
        ("kandinsky-2-1-prior__text_encoder", CLIPTextEncoder),
        ("kandinsky-2-1-prior__image_encoder", CLIPImageEncoder),
        ("kandinsky-2-1__text_encoder", MultilingualCLIP),
        ("kandinsky-2-1-inpaint__text_encoder", MultilingualCLIP),
        ("kandinsky-2-1__movq", MoVQ),
        ("kandinsky-2-1-inpaint__movq", MoVQ),
    ],
)
def test_names_and_shapes_are_the_published_ones(name, network):
    published = json.loads((SHARED / "checkpoints" / "configs" / f"{name}.json").read_text())
    tensors = layout(network, read_config(network.config_class, published))
    lines = (SHARED / "checkpoints" / "keys" / f"{name}.keys.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    assert {key: json.loads(shape) for key, shape, *_ in rows} == {
        k: list(s) for k, (s, _) in tensors.items()
    }
    if network is not CLIPImageEncoder:  # 2.2's is float16, 2.1's float32
        predicted = re.search(r"predicted safetensors size.*?\)=(\d+)", "\n".join(lines))
        assert file_size(tensors) == int(predicted[1])
