"""On a CUDA device: the small pipeline against the CPU's, and half precision against float32."""

import pytest
import torch

from kandinsky import Kandinsky
from tests.helpers import relative_l2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"num_inference_steps": 4, "prior_num_inference_steps": 3, "height": 32, "width": 48, "seed": 3}


@pytest.fixture(autouse=True)
def without_tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    "dtype, allowed", [(torch.float32, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 0.1)]
)
def test_a_seed_gives_the_cpus_latents(decoder_folder, dtype, allowed):
    expected = Kandinsky.from_pretrained(decoder_folder).text2img(
        "a red cat", output_type="latent", **SETTINGS
    )
    pipe = Kandinsky.from_pretrained(decoder_folder, device="cuda", dtype=dtype)
    latents = pipe.text2img("a red cat", output_type="latent", **SETTINGS)
    assert latents.device.type == "cuda" and relative_l2(latents.cpu(), expected) <= allowed


def test_low_memory_frees_the_device(decoder_folder):
    pipe = Kandinsky.from_pretrained(decoder_folder, device="cuda", keep_loaded=False)
    before = torch.cuda.memory_allocated()
    pipe.text2img("a red cat", **SETTINGS)
    assert torch.cuda.memory_allocated() <= before + 2**20
