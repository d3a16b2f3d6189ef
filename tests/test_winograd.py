"""Winograd's convolutions against PyTorch's, alone and in networks."""

from itertools import product

import pytest
import torch
from torch import nn

from kandinsky import UNet, lora, winograd
from kandinsky.optimize import is_optimized, optimize, restore
from tests import small
from tests.helpers import needs_packing, randn, relative_l2
from tests.small import NETWORKS, ours, unet_output


@torch.no_grad()
@pytest.mark.parametrize("b, h, w", [(1, 1, 1), (2, 5, 3), (1, 8, 13), (3, 16, 4)])
def test_winograd_equals_convolution(b, h, w):
    orders = {
        "NCHW": randn(b, 6, h, w),
        "NHWC": randn(b, 6, h, w).to(memory_format=torch.channels_last),
        "cropped": randn(b, h + 3, w + 2, 6)[:, :h, :w].permute(0, 3, 1, 2),
    }
    for bias, x in product((True, False), orders.values()):
        conv = nn.Conv2d(6, 10, 3, padding=1, bias=bias)
        out = winograd.convolve(x, winograd.transform_kernel(conv.weight), conv.bias)
        assert relative_l2(out, conv(x)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("most_tiles", [1, 5, 12])
def test_winograd_in_bands_equals_all_at_once(monkeypatch, most_tiles):
    conv, x = nn.Conv2d(6, 10, 3, padding=1), randn(2, 6, 18, 9)
    whole = winograd.convolve(x, winograd.transform_kernel(conv.weight), conv.bias)
    monkeypatch.setattr(winograd, "MOST_TILES", most_tiles)
    bands = winograd.convolve(x, winograd.transform_kernel(conv.weight), conv.bias)
    assert bands.shape == whole.shape and relative_l2(bands, whole) <= 1e-6


@pytest.mark.slow
@needs_packing
@torch.no_grad()
def test_networks_with_winograd_give_the_same_and_come_back_to_the_bit(monkeypatch, tmp_path):
    monkeypatch.setattr(winograd, "NARROWEST", 16)
    monkeypatch.setattr(winograd, "FEWEST_TILES", 4)
    for kind in ("unet", "movq"):
        make, output = NETWORKS[kind]
        network, calls = make(0), []
        plain = output(network)
        assert optimize(network)["winograd"] > 4
        with monkeypatch.context() as patch:
            convolve = winograd.convolve
            patch.setattr(winograd, "convolve", lambda *args: calls.append(1) or convolve(*args))
            assert relative_l2(output(network), plain) <= 1e-5 and len(calls) > 4
        network.to(torch.float32)
        assert any(isinstance(layer, winograd.WinogradConv2d) for layer in network.modules())
        network.save_pretrained(tmp_path / kind)
        assert torch.equal(output(type(network).from_pretrained(tmp_path / kind)), plain)
        network.to(torch.bfloat16)
        assert not any(isinstance(layer, winograd.WinogradConv2d) for layer in network.modules())
        network = make(0)
        optimize(network)
        restore(network)
        assert torch.equal(output(network), plain)


@needs_packing
@torch.no_grad()
def test_a_lora_of_a_convolution_goes_on_a_winograd_layer(monkeypatch):
    monkeypatch.setattr(winograd, "NARROWEST", 16)
    network, other = (ours(UNet, small.reference_unet()) for _ in range(2))
    optimize(network)
    name = next(n for n, m in network.named_modules() if isinstance(m, winograd.WinogradConv2d))
    c_out, c_in = network.get_submodule(name).weight.shape[:2]
    factors = {name: lora.Factors(randn(2, c_in, 3, 3) / 10, randn(c_out, 2, 1, 1) / 10, 2.0)}
    attach = lora.Attach("x", factors)
    attach.check(network)
    attach(network)
    attach(other)
    assert is_optimized(network) and relative_l2(unet_output(network), unet_output(other)) <= 1e-5
