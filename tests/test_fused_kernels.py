"""The Triton kernels without a GPU: played (`TRITON_INTERPRET=1 pytest …`), and compiled. Needs Triton."""

import os
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from kandinsky import fused
from tests.helpers import randn, relative_l2

pytest.importorskip("triton", reason="needs Triton, which PyTorch brings for CUDA alone")
from kandinsky import fused_kernels  # noqa: E402

IS_PLAYED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks when it is imported
played = pytest.mark.skipif(not IS_PLAYED, reason="needs TRITON_INTERPRET=1")
# ragged tiles of pixels and channels; the last has more parts than `affine` reads at once
SIZES = [(2, 32, 5, 7, 16), (1, 64, 1, 1, 16), (2, 96, 9, 15, 8), (1, 128, 21, 40, 1)]


@played
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.float16, 6e-4)])
@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_they_compute_what_is_written_in_pytorch(modulated, activate, dtype, allowed, order):
    for b, c, h, w, num_groups in SIZES:
        x = (3 + randn(b, c, h, w)).to(dtype).to(memory_format=order)
        weight, bias = (randn(c, seed=seed).to(dtype) for seed in (1, 2))
        modulation = randn(b, 2 * c, seed=3).to(dtype).chunk(2, dim=1) if modulated else None
        given = x, weight, bias, num_groups, 1e-5, modulation, activate
        out, expected = fused_kernels.norm_silu(*given), fused.norm_silu(*given)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert relative_l2(out.float(), expected.float()) <= allowed


@played
def test_a_far_mean_does_not_drown_the_spread():
    weight, x = torch.ones(32), 1000 + randn(1, 32, 24, 24)
    exact = F.group_norm(x.double(), 8, eps=1e-5)
    torch.set_default_dtype(torch.float16)  # which is the process's own, and no kernel's
    try:
        out = fused_kernels.norm_silu(x, weight, 0 * weight, 8, 1e-5, activate=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_l2(out, exact) <= 2e-4


def test_a_group_wider_than_the_kernels_is_refused():
    weight = torch.ones(2048)
    with pytest.raises(ValueError, match="group of 2048 channels"):
        fused_kernels.norm_silu(torch.zeros(1, 2048, 1, 1), weight, weight, 1, 1e-5)


@pytest.mark.skipif(IS_PLAYED, reason="nothing is compiled where it is played")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name, choice", [("moments", None), *product(["affine", "applied"], [False, True])])
def test_they_compile_for_a_gpu_that_is_not_there(name, dtype, choice, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, types = getattr(fused_kernels, name), {"eps": "fp32"}
    types |= dict.fromkeys(("x", "out", "weight", "bias", "scale", "shift"), f"*{dtype}")
    types |= dict.fromkeys(("means", "spreads", "a", "b"), "*fp32")
    constants = {"PIXELS": 64, "CHANNELS": 64, "PARTS": 1024, "MODULATED": choice, "ACTIVATE": choice}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(
        constants, "constexpr"
    )
    made = compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
