"""The rewrites for CUDA that can be played on the CPU: NHWC maps, fused norms; and compiled blocks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kandinsky import Kandinsky, MoVQ, UNet, bands, fused, optimize
from kandinsky.inspection import module_names
from kandinsky.lora import add_lora
from kandinsky.optimize import FUSED, is_optimized, restore
from tests import small
from tests.helpers import randn, relative_l2
from tests.small import EMBEDDING_DIM, ours

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_cuda])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("modulated, activate", [(False, True), (True, True), (False, False)])
def test_the_fused_norm_is_the_sequence_that_it_stands_for(device, order, modulated, activate):
    for seed, (b, c, h, w) in enumerate([(2, 32, 5, 7), (1, 64, 1, 1), (3, 96, 4, 4)]):
        norm = nn.GroupNorm(16, c).to(device)
        norm.weight.data, norm.bias.data = (randn(c, seed=20 + i).to(device) for i in range(2))
        x = 3 + randn(b, c, h, w, seed=seed).to(device).to(memory_format=order)
        modulation = tuple(randn(b, c, seed=10 + i).to(device) for i in range(2)) if modulated else None
        expected = copy.deepcopy(norm).double()(x.double())  # float32's own: up to 3e-6 in NHWC order
        if modulated:
            scale, shift = (m[:, :, None, None] for m in modulation)
            expected = expected * (1 + scale) + shift
        out = fused.apply(norm, x, modulation, activate)
        assert relative_l2(out, F.silu(expected) if activate else expected) <= 2e-6
        assert out.is_contiguous(memory_format=order if device == "cpu" else torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_lies_no_further_from_float32_in_half_precision(device, dtype):
    norm, x, modulation = (
        nn.GroupNorm(8, 64),
        2 + randn(2, 64, 8, 8),
        tuple(randn(2, 64, seed=i) for i in (1, 2)),
    )

    def plain(norm, x, scale, shift):
        return F.silu(norm(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    exact, half = plain(norm, x, *modulation), copy.deepcopy(norm).to(device, dtype)
    given = [a.to(device, dtype) for a in (x, *modulation)]
    ours, theirs = fused.apply(half, given[0], tuple(given[1:])), plain(half, *given)
    away = [relative_l2(out.float().cpu(), exact) for out in (ours, theirs)]
    assert ours.dtype == dtype and away[0] <= 1.1 * away[1]


def test_where_triton_does_not_work_norms_stay_as_they_are(monkeypatch):
    def broken() -> None:
        raise RuntimeError("Failed to find\nC compiler")

    can_run = fused.can_run.__wrapped__  # without its memory
    monkeypatch.setattr(fused, "kernels", broken)
    with pytest.warns(UserWarning, match="norms are not fused: .* work here .Failed to find C compiler"):
        assert not can_run(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(fused, "kernels", lambda: lambda *given: 1.1 * fused.norm_silu(*given))
    with pytest.warns(UserWarning, match="norms are not fused: .* not close"):
        assert not can_run(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(fused, "kernels", lambda: fused.norm_silu)
    assert can_run(torch.device("cpu"), torch.float32)


def unet_output(unet: UNet) -> torch.Tensor:
    x, e = randn(2, 4, 8, 12), randn(2, EMBEDDING_DIM, seed=1)
    return unet(x.to(unet.device), torch.tensor([900, 30], device=unet.device), e.to(unet.device))


def movq_output(movq: MoVQ) -> torch.Tensor:
    return movq.decode(randn(2, 4, 4, 6).to(movq.device))


def networks(device: str) -> list:
    unet, movq = ours(UNet, small.reference_unet()), ours(MoVQ, small.reference_movq())
    return [(unet.to(device), unet_output), (movq.to(device), movq_output)]


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("merges", [False, True])
def test_networks_in_nhwc_with_fused_norms_give_the_same_and_come_back(device, merges, monkeypatch):
    monkeypatch.setattr(bands, "LARGEST", 1000)
    for network, output in networks(device):
        plain, weights = output(network), copy.deepcopy(network.state_dict())
        if merges:
            assert optimize.merge_upsampling(network) > 0
            optimize.cut_bands(network)
        assert optimize.use_channels_last(network, device) > 0 and optimize.fuse_norms(network, device) > 0
        assert not optimize.use_channels_last(network, device) and not optimize.fuse_norms(network, device)
        assert not {type(m) for m in network.modules()} & set(FUSED)
        strides = []
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, args, out: strides.append(out.stride(1) == 1))
        assert relative_l2(output(network), plain) <= 1e-5
        assert sum(strides) > 0.9 * len(strides)  # the order holds through the network
        assert relative_l2(output(copy.deepcopy(network)), plain) <= 1e-5 and is_optimized(network)
        restore(network)
        assert not is_optimized(network) and torch.equal(output(network), plain)
        assert all(
            torch.equal(weights[name], t) and t.is_contiguous() for name, t in network.state_dict().items()
        )


def test_on_a_cpu_merged_kernels_keep_their_order():
    unet = ours(UNet, small.reference_unet()).half()  # which is not packed
    assert optimize.optimize(unet)["channels last"] == 0
    merged = [m.merged.weight for m in unet.modules() if isinstance(m, optimize.Merged)]
    assert merged and all(weight.is_contiguous() for weight in merged)


def test_norms_that_are_not_called_cannot_be_looked_at():
    unet, name = ours(UNet, small.reference_unet()), "mid_block.resnets.0.norm1"
    assert module_names(unet, name) == [name]
    optimize.fuse_norms(unet, "cpu")
    with pytest.raises(ValueError, match=f"{name} is not called in an optimized network"):
        module_names(unet, name)


def test_gradients_pass_through_fused_blocks():
    unet = ours(UNet, small.reference_unet())
    plain = copy.deepcopy(unet)
    optimize.merge_upsampling(unet), optimize.fuse_norms(unet, "cpu")
    for network in (unet, plain):
        unet_output(network).square().mean().backward()
    for (name, p), q in zip(unet.named_parameters(), plain.parameters()):
        assert relative_l2(p.grad, q.grad) <= 1e-5, name


@pytest.fixture
def compiled_calls(monkeypatch) -> list:
    """The compiler is played: what it is given runs as it is, and is counted."""
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(graph)
            return graph.forward(*args)

        return run

    monkeypatch.setitem(optimize.COMPILER, "backend", backend)
    return calls


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_give_the_same_and_come_back(compiled_calls):
    unet = ours(UNet, small.reference_unet())
    plain = unet_output(unet)
    changed = optimize.optimize(unet, compile=True)
    assert changed["compiled blocks"] > 4 and not {"packed weights", "winograd", "cuda graph"} & set(changed)
    blocks = [m for m in unet.modules() if isinstance(m, optimize.BLOCKS)]
    compiled_calls.clear()
    assert relative_l2(unet_output(unet), plain) <= 1e-5 and len(compiled_calls) >= len(blocks) > 4
    restore(unet)
    compiled_calls.clear()
    assert torch.equal(unet_output(unet), plain) and not compiled_calls


@pytest.mark.slow
def test_a_pipeline_compiles_what_it_reads_later_and_takes_loras(compiled_calls, decoder_folder):
    pipe, quick = Kandinsky.from_pretrained(decoder_folder), {"num_inference_steps": 2, "seed": 0}
    quick |= {"prior_num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    plain = pipe.text2img("a", **quick)
    assert pipe.optimize(compile=True)["prior"]["compiled blocks"] > 0
    add_lora(pipe.unet, rank=2)
    assert relative_l2(pipe.text2img("a", **quick), plain) <= 1e-5 and compiled_calls
    with pytest.raises(ValueError, match="do not go with packed weights"):
        pipe.optimize(["packed weights"])
    pipe.restore()


def test_what_does_not_go_together_is_refused_and_nothing_changes(decoder_folder):
    unet = ours(UNet, small.reference_unet())
    with pytest.raises(ValueError, match="compiled blocks do not go with packed weights"):
        optimize.optimize(unet, ("packed weights",), compile=True)
    assert not is_optimized(unet) and not hasattr(unet, "rewrites")
    pipe = Kandinsky.from_pretrained(decoder_folder)
    with pytest.raises(ValueError, match="compiled blocks do not go with packed weights"):
        pipe.optimize(["packed weights"], compile=True)
    assert not pipe.is_optimized and type(pipe.unet) is UNet and not is_optimized(pipe.unet)
