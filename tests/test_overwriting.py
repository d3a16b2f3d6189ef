"""MoVQ overwrites what it read, and nothing that someone else may see."""

import pytest
import torch
from torch import nn

from kandinsky import winograd
from kandinsky.optimize import optimize
from tests.helpers import randn, relative_l2
from tests.small import NETWORKS, movq_output

HOOKED = {
    "all": lambda name: True,
    "inner norms": lambda name: name.endswith("norm_layer"),
    "norms": lambda name: name.endswith(("norm1", "norm2", "norm_out", "spatial_norm")),
    "convolutions": lambda name: name.endswith(("conv1", "conv2", "conv_out")),
}


@torch.no_grad()
@pytest.mark.parametrize("where", [*HOOKED, "all modules of a process"])
def test_what_a_hook_has_seen_is_not_overwritten(monkeypatch, where):
    monkeypatch.setattr(winograd, "NARROWEST", 96)  # some layers' maps are in another order then
    monkeypatch.setattr(winograd, "FEWEST_TILES", 4)
    movq, seen = NETWORKS["movq"][0](0), []
    optimize(movq)
    unseen = movq_output(movq)

    def see(module, args, out):
        seen.append((out, out.clone()))

    if where in HOOKED:
        hooks = [m.register_forward_hook(see) for name, m in movq.named_modules() if HOOKED[where](name)]
    else:
        hooks = [nn.modules.module.register_module_forward_hook(see)]
    try:
        assert torch.equal(movq_output(movq), unseen)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) > 20 and all(torch.equal(now, then) for now, then in seen)


class Nothing(nn.Module):
    """In place of a spatial norm."""

    def forward(self, x: torch.Tensor, zq: torch.Tensor) -> torch.Tensor:
        return x


class Kept(Nothing):
    """The same map at each call."""

    def __init__(self, *shape: int):
        super().__init__()
        self.map = randn(*shape)

    def forward(self, x: torch.Tensor, zq: torch.Tensor) -> torch.Tensor:
        return self.map


@torch.no_grad()
def test_norms_put_in_place_of_others_lose_nothing():
    """They may return what they were given, or what they keep."""
    movq, z = NETWORKS["movq"][0](0), randn(2, 4, 6, 5)
    first, second = movq.decoder.mid_block.resnets
    first.norm1.norm_layer, second.norm1 = nn.Identity(), Nothing()
    second.norm2 = Kept(2, second.conv2.in_channels, 6, 5)
    plain = movq.decode(z)
    optimize(movq, ("low spatial norm", "row bands"))
    for _ in range(2):
        assert relative_l2(movq.decode(z), plain) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_silu_and_the_sum_take_the_memory_of_what_they_read(monkeypatch, half):
    movq, at = NETWORKS["movq"][0](0), {"norms": [], "convolutions read": [], "conv2": []}
    optimize(movq, ("low spatial norm", "row bands"))
    block = getattr(movq, half).mid_block.resnets[0]

    def noting(name, compute):
        def computed(*args):
            out = compute(*args)
            at[name].append(out.data_ptr())
            return out

        return computed

    def note(module, args):
        at["convolutions read"].append(args[0].data_ptr())

    monkeypatch.setattr(nn.functional, "group_norm", noting("norms", nn.functional.group_norm))
    monkeypatch.setattr(block.conv2, "_conv_forward", noting("conv2", block.conv2._conv_forward))
    for conv in (block.conv1, block.conv2):
        conv.register_forward_pre_hook(note)
    x = randn(1, block.conv1.in_channels, 4, 4)
    out = block(x) if half == "encoder" else block(x, randn(1, 4, 2, 2))
    assert at["convolutions read"] == at["norms"] and at["conv2"] == [out.data_ptr()]


@pytest.mark.slow
@torch.no_grad()
def test_the_compiler_takes_the_overwriting_as_it_is():
    movq, zq = NETWORKS["movq"][0](0), randn(1, 4, 2, 2)
    optimize(movq, ("low spatial norm", "row bands"))
    block = movq.decoder.mid_block.resnets[0]
    x = randn(1, block.conv1.in_channels, 4, 4)
    plain = block(x, zq)
    assert relative_l2(torch.compile(block, backend="aot_eager", fullgraph=True)(x, zq), plain) <= 1e-5
    assert torch.equal(x, randn(1, block.conv1.in_channels, 4, 4))
