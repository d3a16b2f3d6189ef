"""Looking into networks and changing what passes through, without a trace."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import kandinsky.unet
from kandinsky import MoVQ, Prior, UNet
from kandinsky.inspection import attention_maps, edit, module_names, record
from kandinsky.optimize import COMPILER, optimize
from tests import small
from tests.helpers import needs_packing, randn, relative_l2, slow
from tests.small import EMBEDDING_DIM, NETWORKS, movq_output, ours, prior_output, unet_output


def hooks_of(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def prepared_unet(unet: UNet) -> torch.Tensor:
    plan = unet.prepare(randn(2, EMBEDDING_DIM, seed=1), [999, 20])
    return torch.cat([unet.step(randn(2, 4, 8, 12), plan, index) for index in (0, 1)])


def prepared_prior(prior: Prior) -> torch.Tensor:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    cache = prior.prefill(randn(2, EMBEDDING_DIM, seed=1), randn(2, 5, EMBEDDING_DIM, seed=2), mask)
    return prior.step(randn(2, EMBEDDING_DIM), torch.tensor([999, 20]), cache)


RUNS = {
    "unet": ("unet", unet_output),
    "unet, prepared": ("unet", prepared_unet),
    "prior": ("prior", prior_output),
    "prior, prepared": ("prior", prepared_prior),
    "movq": ("movq", movq_output),
}


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, *slow(False)])
@pytest.mark.parametrize("run", RUNS)
def test_looking_at_everything_changes_no_bit_and_leaves_no_hook(run, fast):
    kind, output = RUNS[run]
    network = NETWORKS[kind][0](0)
    if fast:
        optimize(network)
    plain = output(network)
    with record(network, "*") as seen, record(network, "*", inputs=True) as taken:
        assert torch.equal(output(network), plain)
    ran = [name for name, values in seen.items() if values]
    assert len(ran) > 20 and seen.dropped == 0 and set(ran) >= {n for n, v in taken.items() if v}
    with edit(network, {"*": lambda out: out}), edit(network, {"*": lambda args: args}, inputs=True):
        assert torch.equal(output(network), plain)
    assert hooks_of(network) == 0


@pytest.mark.slow
@torch.no_grad()
def test_every_named_module_that_runs_can_be_changed_alone():
    unet = ours(UNet, small.reference_unet())
    plain = unet_output(unet)
    with record(unet, "*") as seen:
        unet_output(unet)
    for name in [name for name, values in seen.items() if values]:
        with edit(unet, {name: lambda out: out}):
            assert torch.equal(unet_output(unet), plain), name
    with edit(unet, {"conv_in": lambda out: 2 * out}):
        assert not torch.equal(unet_output(unet), plain)


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True])
def test_zeroed_image_tokens_equal_a_network_whose_tokens_are_zero(prepared):
    output = prepared_unet if prepared else unet_output
    network, other = (ours(UNet, small.reference_unet()) for _ in range(2))
    for parameter in other.encoder_hid_proj.norm.parameters():  # what makes the tokens ends in this norm
        parameter.zero_()
    with edit(network, {"encoder_hid_proj": torch.zeros_like}):
        changed = output(network)
    assert torch.equal(changed, output(other)) and not torch.equal(changed, output(network))


@torch.no_grad()
def test_recorded_values_are_those_of_the_run_one_for_each_call():
    unet = ours(UNet, small.reference_unet())
    kept = []
    handle = unet.mid_block.attentions[0].register_forward_hook(lambda module, args, out: kept.append(out))
    with record(unet, ["mid_block.attentions.0", "conv_o*"]) as seen:
        unet_output(unet)
        unet_output(unet)
    handle.remove()
    assert list(seen) == ["mid_block.attentions.0", "conv_out"]
    assert [len(values) for values in seen.values()] == [2, 2]
    assert torch.equal(seen["mid_block.attentions.0"][0], kept[0])
    with record(unet, "conv_in", inputs=True) as taken, record(unet, "conv_in", keep=torch.std) as spread:
        unet_output(unet)
    assert torch.equal(taken["conv_in"][0], randn(2, 4, 8, 12)) and spread["conv_in"][0].ndim == 0


@torch.no_grad()
def test_memory_is_bounded_and_what_is_left_out_is_counted():
    unet = ours(UNet, small.reference_unet())
    size = 2 * 32 * 8 * 12 * 4
    with record(unet, "conv_in", limit=2 * size) as seen:
        for _ in range(5):
            unet_output(unet)
    assert len(seen["conv_in"]) == 2 and seen.dropped == 3
    for keep in (torch.clone, lambda x: {"all": [x.clone()]}, lambda x: x[0, 0]):  # the last holds all of x
        with record(unet, "conv_in", keep=keep, limit=int(2.5 * size)) as seen:
            for _ in range(5):
                unet_output(unet)
        assert len(seen["conv_in"]) == 2 and seen.dropped == 3
    with record(unet, ["conv_in", "time_embedding"], limit=size // 2) as seen:
        unet_output(unet)
    order = ["time_embedding", "conv_in"]
    assert [len(seen[name]) for name in order] == [1, 0] and seen.dropped == 1
    with record(unet, ["conv_in", "mid_block.resnets.0", "conv_out"], limit=size + 1) as seen:
        unet_output(unet)
    assert [len(values) for values in seen.values()] == [1, 0, 0] and seen.dropped == 2  # nothing after a gap


@pytest.mark.slow
@torch.no_grad()
def test_what_is_compiled_is_seen_and_changed_too(monkeypatch):
    monkeypatch.setitem(COMPILER, "backend", "eager")
    unet, plain = ours(UNet, small.reference_unet()), ours(UNet, small.reference_unet())
    optimize(unet, compile=True)
    unet_output(unet)
    name, zeroed = "mid_block.attentions.0.to_q", {"mid_block.attentions.0.to_out": torch.zeros_like}
    with record(unet, name) as seen, record(plain, name) as wanted:
        unet_output(unet), unet_output(plain)
    assert relative_l2(seen[name][0], wanted[name][0]) <= 1e-5
    with edit(unet, zeroed), edit(plain, zeroed):
        changed = unet_output(unet)
        assert relative_l2(changed, unet_output(plain)) <= 1e-5
    assert relative_l2(changed, unet_output(plain)) > 1e-4
    with attention_maps(unet, "mid_block*") as maps:
        unet_output(unet)
    assert len(maps["mid_block.attentions.0"]) == 1
    compiled = [block for block in unet.modules() if block._compiled_call_impl is not None]
    first, second = record(unet, "*"), record(unet, "*")
    with first, second:
        assert not any(block._compiled_call_impl for block in compiled)
    assert len(compiled) > 4 and all(block._compiled_call_impl for block in compiled)


@needs_packing
def test_what_is_not_called_in_an_optimized_network_is_refused():
    unet, movq = ours(UNet, small.reference_unet()), ours(MoVQ, small.reference_movq())
    name = "up_blocks.0.upsamplers.0.conv1"
    module_names(unet, name)
    optimize(unet)
    optimize(movq)
    pattern = "up_blocks.*.upsamplers.0.conv1"  # of which none is called
    for block in (record(unet, name), edit(unet, {name: torch.zeros_like}), record(unet, pattern)):
        with pytest.raises(ValueError, match="conv1 is not called in an optimized network; kandinsky.opt"):
            with block:
                pass
    with pytest.raises(ValueError, match="MoVQ's has none while it is optimized"):
        with attention_maps(movq, "*"):
            pass


def test_unknown_names_are_refused_with_the_nearest_and_errors_leave_no_trace():
    unet = ours(UNet, small.reference_unet())
    nearest = "nearest are mid_block.attentions.0, "
    for block in (
        record(unet, "mid_block.attention.0"),
        edit(unet, {"mid_block.attention.0": torch.zeros_like}),
    ):
        with pytest.raises(ValueError, match=f"UNet has no module called 'mid_block.attention.0'; {nearest}"):
            with block:
                pass
    assert len(module_names(unet, "up_blocks.*.attentions.*.to_q")) == 6
    original = unet.forward.__globals__["attention"]
    for block in (
        record(unet, "*"),
        edit(unet, {"conv_in": torch.zeros_like}),
        attention_maps(unet, "*"),
    ):
        with pytest.raises(KeyError), block:
            raise KeyError("stop")
        assert hooks_of(unet) == 0 and unet.forward.__globals__["attention"] is original
    for name in ("up_blocks", "up_blocks.*.resnets"):
        said = f"{name} is a ModuleList, which only holds others: {name}.*"
        with pytest.raises(ValueError, match=re.escape(said)):
            module_names(unet, name)
    with pytest.raises(ValueError, match="no module called conv_in of UNet has an attention whose map"):
        with attention_maps(unet, "conv_in"):
            pass


def softmax_by_hand(q, k, heads, mask=None):
    """Row by row, in float64."""
    b, n, c = q.shape
    out = torch.zeros(b, heads, n, k.shape[1], dtype=torch.float64)
    d = c // heads
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = torch.einsum("bnd,bmd->bnm", q[..., part].double(), k[..., part].double()) / d**0.5
        if mask is not None:
            scores = torch.where(mask[:, 0].expand_as(scores), scores, torch.full_like(scores, -1e300))
        exp = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        out[:, head] = exp / exp.sum(dim=-1, keepdim=True)
    return out


@torch.no_grad()
def test_attention_maps_equal_an_independent_softmax(monkeypatch):
    for run in ("unet", "unet, prepared", "prior", "prior, prepared"):
        kind, output = RUNS[run]
        network = NETWORKS[kind][0](0)
        plain, calls = output(network), []
        import kandinsky.prior
        import kandinsky.unet

        with monkeypatch.context() as patch:
            for module in (kandinsky.prior, kandinsky.unet):
                original = module.attention

                def spy(q, k, v, heads, mask=None, original=original):
                    calls.append(softmax_by_hand(q, k, heads, mask))
                    return original(q, k, v, heads, mask)

                patch.setattr(module, "attention", spy)
            with attention_maps(network, "*") as maps:
                assert torch.equal(output(network), plain)
        flat = [one for values in maps.values() for one in values]
        assert len(flat) == len(calls) > 0
        by_size = {}
        for wanted in calls:
            by_size.setdefault(wanted.shape, []).append(wanted)
        for one in flat:
            assert (one.sum(dim=-1) - 1).abs().max() <= 1e-5
            assert min(relative_l2(one, wanted) for wanted in by_size[one.shape]) <= 1e-5


@torch.no_grad()
def test_the_decoders_maps_begin_with_the_image_tokens():
    unet = ours(UNet, small.reference_unet())
    with attention_maps(unet, "mid_block.attentions.0") as maps:
        unet_output(unet, 8, 12)
    (one,) = maps["mid_block.attentions.0"]
    assert one.shape == (2, 8, 2 * 3, 32 + 2 * 3)
    with attention_maps(unet, "mid_block.attentions.0", keep=lambda x: x.sum(dim=-1)) as sums:
        unet_output(unet)
    assert torch.allclose(sums["mid_block.attentions.0"][0], torch.ones(()), atol=1e-5)
    with attention_maps(unet, "*", limit=0) as maps:
        unet_output(unet)
    assert not any(maps.values()) and maps.dropped > 0


@torch.no_grad()
def test_movqs_attention_is_seen_in_its_plain_form():
    movq = ours(MoVQ, small.reference_movq())
    with attention_maps(movq, "decoder.*") as maps:
        movq.decode(randn(1, 4, 4, 3))
    assert all(one.shape == (1, 1, 12, 12) for values in maps.values() for one in values)
    assert len(maps) == 3
    optimize(movq)
    with pytest.raises(ValueError, match="no module called decoder.* of MoVQ has an attention whose map"):
        with attention_maps(movq, "decoder.*"):
            pass


@torch.no_grad()
def test_the_text_towers_maps_are_causal():
    make, output = NETWORKS["text encoder"]
    tower = make(0)
    with attention_maps(tower, "*") as maps:
        output(tower)
    assert len(maps) == 3 and all(one.triu(1).abs().max() == 0 for values in maps.values() for one in values)


@torch.no_grad()
def test_attention_maps_of_two_threads_do_not_meet():
    original = kandinsky.unet.attention
    first, second = (ours(UNet, small.reference_unet(seed=seed)) for seed in (0, 1))
    begun, ended = threading.Event(), threading.Event()

    def other() -> None:
        with torch.no_grad(), attention_maps(second, "mid_block.*") as maps:  # begins and ends as the second
            begun.set()
            ended.wait(10)
            unet_output(second)
            assert len(maps["mid_block.attentions.0"]) == 1

    def while_first_attends(module: nn.Module, args: tuple) -> None:
        with ThreadPoolExecutor(1) as thread:  # another network, which nobody looks at
            thread.submit(unet_output, second).result()

    with ThreadPoolExecutor(1) as thread:
        with attention_maps(first, "mid_block.*") as maps:
            first.mid_block.attentions[0].to_q.register_forward_pre_hook(while_first_attends)
            unet_output(first)
            assert len(maps["mid_block.attentions.0"]) == 1
            running = thread.submit(other)
            assert begun.wait(10)
        ended.set()
        running.result()
    assert kandinsky.unet.attention is original
