"""The graphed step. On the CPU a capture is played by a function that computes into the same memory again."""

import copy
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from kandinsky import Kandinsky, MoVQ, Prior, UNet, graphs, lora
from kandinsky.graphs import GraphedMoVQ, GraphedPrior, GraphedUNet
from kandinsky.layers import attention
from kandinsky.optimize import merge_upsampling, optimize, restore
from tests import small
from tests.helpers import randn, relative_l2
from tests.small import EMBEDDING_DIM, ours

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_cuda])])
def device(request, monkeypatch) -> str:
    """On the CPU with the capture played, and counted in `graphs.captured`."""
    monkeypatch.setattr(graphs, "captured", [], raising=False)
    real = graphs.capture

    def capture(compute):
        graphs.captured.append(1)
        if request.param == "cuda":
            return real(compute)
        out = compute()
        return lambda: out.copy_(compute()), out, out.clone()

    monkeypatch.setattr(graphs, "capture", capture)
    if request.param == "cpu":
        dependencies = graphs.dependencies
        as_if = type("OnCuda", (), {"is_cuda": True})()
        monkeypatch.setattr(graphs, "dependencies", lambda network, x: dependencies(network, as_if))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return request.param


def pair(device: str, hint: bool = False) -> tuple[UNet, UNet]:
    reference = small.reference_unet(hint=True, in_channels=8) if hint else small.reference_unet()
    plain, graphed = (ours(UNet, reference).to(device) for _ in range(2))
    graphed.__class__ = GraphedUNet
    return plain, graphed


@torch.no_grad()
@pytest.mark.parametrize("hint", [False, True])
def test_every_step_of_every_plan_is_the_plain_one(device, hint):
    plain, graphed = pair(device, hint)
    for seed in range(3):
        hints = randn(2, 3, 64, 96, seed=seed).sigmoid().to(device) if hint else None
        given = randn(2, EMBEDDING_DIM, seed=seed).to(device), [900, 500, 30], hints
        plans = plain.prepare(*given), graphed.prepare(*given)
        for index in (0, 1, 2, 1):
            x = randn(2, 4, 8, 12, seed=10 * seed + index).to(device)
            step = graphed.step(x, plans[1], index)
            assert relative_l2(step, plain.step(x, plans[0], index)) <= 1e-6
    assert len(graphs.captured) == 1


@torch.no_grad()
def test_plans_may_take_turns(device):
    plain, graphed = pair(device)
    given = [(randn(2, EMBEDDING_DIM, seed=seed).to(device), [900, 500]) for seed in (0, 1)]
    plans, x = [(plain.prepare(*g), graphed.prepare(*g)) for g in given], randn(2, 4, 8, 8).to(device)
    for turn in (0, 1, 0, 1, 0):
        wanted = plain.step(x, plans[turn][0], 0)
        assert relative_l2(graphed.step(x, plans[turn][1], 0), wanted) <= 1e-6
    assert len(graphs.captured) == 1


@torch.no_grad()
def test_another_size_and_another_number_of_rows_are_captured_anew(device):
    plain, graphed = pair(device)
    for rows, h, captures in ((2, 8, 1), (2, 16, 2), (1, 16, 3), (2, 16, 3), (1, 16, 3), (2, 8, 4)):
        embeds, x = randn(rows, EMBEDDING_DIM).to(device), randn(rows, 4, h, 8).to(device)
        step = graphed.step(x, graphed.prepare(embeds, [5]), 0)
        assert relative_l2(step, plain.step(x, plain.prepare(embeds, [5]), 0)) <= 1e-6
        assert len(graphs.captured) == captures  # two that differ in their rows alone are kept
    assert len(graphed.graphs) == 1


@torch.no_grad()
def test_more_steps_than_are_prepared_at_once(device):
    plain, graphed = pair(device)
    embeds, ts = randn(1, EMBEDDING_DIM).to(device), list(range(99, -1, -1))
    plans, x = (plain.prepare(embeds, ts), graphed.prepare(embeds, ts)), randn(1, 4, 8, 8).to(device)
    for index in (0, 63, 64, 99):
        given = graphed.conditioning(plans[1], index)
        assert all(tensor.is_contiguous() for pair in given.values() for tensor in pair)
        step = graphed.step(x, plans[1], index)
        assert relative_l2(step, plain.step(x, plans[0], index)) <= 1e-6


def test_a_first_step_in_inference_mode_and_a_later_one_without(device):
    plain, graphed = pair(device)
    embeds, x = randn(1, EMBEDDING_DIM).to(device), randn(1, 4, 8, 8).to(device)
    with torch.inference_mode():
        graphed.step(x, graphed.prepare(embeds, [5]), 0)
    with torch.no_grad():
        step = graphed.step(2 * x, graphed.prepare(2 * embeds, [7]), 0)
        assert relative_l2(step, plain.step(2 * x, plain.prepare(2 * embeds, [7]), 0)) <= 1e-6
    assert len(graphs.captured) == 1
    assert all(copied() is None for copied in graphed.graphs[0].copied)  # a plan is not kept


@torch.no_grad()
def test_another_attention_is_captured_anew(device, monkeypatch):
    plain, graphed = pair(device)
    plans = [unet.prepare(randn(1, EMBEDDING_DIM).to(device), [5]) for unet in (plain, graphed)]
    x = randn(1, 4, 8, 8).to(device)
    before = graphed.step(x, plans[1], 0)
    monkeypatch.setattr("kandinsky.unet.attention", lambda q, k, v, heads: q + v.mean(dim=1, keepdim=True))
    after = graphed.step(x, plans[1], 0)
    assert relative_l2(after, plain.step(x, plans[0], 0)) <= 1e-6 and relative_l2(after, before) > 1e-3


@torch.no_grad()
def test_results_are_not_overwritten_by_the_next_step(device):
    _, graphed = pair(device)
    plan = graphed.prepare(randn(1, EMBEDDING_DIM).to(device), [900, 30])
    first = graphed.step(randn(1, 4, 8, 8).to(device), plan, 0)
    before = first.clone()
    graphed.step(randn(1, 4, 8, 8, seed=1).to(device), plan, 1)
    assert torch.equal(first, before)


@torch.no_grad()
def test_threads_do_not_write_over_each_others_input(device, monkeypatch):
    plain, graphed = pair(device)
    given = [randn(1, 4, 8, 8, seed=seed).to(device) for seed in (1, 2)]
    plans = [unet.prepare(randn(1, EMBEDDING_DIM).to(device), [5]) for unet in (plain, graphed)]
    graphed.step(given[0], plans[1], 0)
    copy_all = graphs.copy_all

    def copy_slowly(*lists) -> None:
        copy_all(*lists)
        time.sleep(0.1)

    @torch.no_grad()
    def step(x: torch.Tensor) -> torch.Tensor:
        return graphed.step(x, plans[1], 0)

    monkeypatch.setattr(graphs, "copy_all", copy_slowly)
    with ThreadPoolExecutor(2) as threads:
        stepped = list(threads.map(step, given))
    for x, out in zip(given, stepped):
        assert relative_l2(out, plain.step(x, plans[0], 0)) <= 1e-6


@torch.no_grad()
def test_every_step_of_every_prompt_is_the_plain_priors(device, monkeypatch):
    plain, graphed = (ours(Prior, small.reference_prior()).to(device) for _ in range(2))
    graphed.__class__ = GraphedPrior
    near = 1e-6 if device == "cpu" else 1e-5  # sums over another number of tokens

    def assert_alike(rows: int, length: int, seed: int) -> None:
        mask = torch.arange(5, device=device)[None] < torch.tensor([[seed % 3], [length]], device=device)
        text = randn(2, EMBEDDING_DIM, seed=seed), randn(2, 5, EMBEDDING_DIM, seed=seed + 1)
        index = torch.arange(rows, device=device) % 2
        caches = [p.prefill(*(x.to(device) for x in text), mask).rows(index) for p in (plain, graphed)]
        for t in (900, 30):
            x = randn(rows, EMBEDDING_DIM, seed=seed + t).to(device)
            given = x, torch.full((rows,), t, device=device)
            step, again = graphed.step(*given, caches[1]), graphed.step(2 * x, given[1], caches[1])
            assert relative_l2(step, plain.step(*given, caches[0])) <= near and not torch.equal(step, again)

    for seed in (0, 1, 2):
        assert_alike(2, 5, seed)
    assert_alike(2, 3, 3)  # a shorter prompt
    assert len(graphs.captured) == 1
    given = randn(2, EMBEDDING_DIM).to(device), torch.tensor([5, 5], device=device)
    text = (randn(2, *shape, EMBEDDING_DIM).to(device) for shape in ((), (5,)))
    cache = graphed.prefill(*text, torch.ones(2, 5, dtype=torch.bool, device=device))
    graphed.step(*given, cache)
    changed = cache._replace(keys_values=[(2 * k, v) for k, v in cache.keys_values])
    assert relative_l2(graphed.step(*given, changed), plain.step(*given, changed)) <= 1e-6
    assert len(graphs.captured) == 1
    assert_alike(4, 3, 3)
    assert len(graphs.captured) == 2
    twin = copy.deepcopy(graphed)
    graphed.proj_in.weight.mul_(2), plain.proj_in.weight.mul_(2)
    assert_alike(4, 3, 4)
    assert len(graphs.captured) == 2 and not vars(twin)["graphs"]
    monkeypatch.setattr("kandinsky.prior.attention", lambda q, *rest: attention(2 * q, *rest))
    assert_alike(4, 3, 5)
    assert len(graphs.captured) == 3
    graphed.double()
    assert "graphs" not in vars(graphed)


@torch.no_grad()
@pytest.mark.parametrize("failure", ["no capture", "another result", "not a number"])
def test_a_graph_that_fails_is_done_without(device, monkeypatch, failure):
    plain, graphed = pair(device)
    embeds, x = randn(1, EMBEDDING_DIM).to(device), randn(1, 4, 8, 8).to(device)
    real = graphs.capture

    def capture(compute):
        run, out, expected = real(compute)
        if failure == "no capture":
            raise graphs.NoGraph("operation not permitted when stream is capturing")
        return lambda: out.copy_(1.05 * expected if failure == "another result" else out / 0), out, expected

    def differs() -> float:
        step = graphed.step(x, graphed.prepare(embeds, [5]), 0)
        return relative_l2(step, plain.step(x, plain.prepare(embeds, [5]), 0))

    monkeypatch.setattr(graphs, "capture", capture)
    with pytest.warns(UserWarning, match="UNet runs without a graph: (operation not|a replay gave)"):
        assert differs() <= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert differs() <= 1e-6 and len(graphs.captured) == 1  # not tried at each step
    monkeypatch.setattr(graphs, "capture", real)
    for unet in (plain, graphed):
        unet.conv_in.weight = torch.nn.Parameter(3 * unet.conv_in.weight)
    assert differs() <= 1e-6 and len(graphs.captured) == 2 and graphed.graphs


@torch.no_grad()
def test_what_overflows_is_not_captured_until_it_does_no_more(device):
    plain, graphed = pair(device)
    embeds, x = randn(1, EMBEDDING_DIM).to(device), randn(1, 4, 8, 8).to(device)
    plan = graphed.prepare(embeds, [5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not graphed.step(x * float("inf"), plan, 0).isfinite().any() and not graphed.graphs
        step = graphed.step(x, plan, 0)
    assert relative_l2(step, plain.step(x, plain.prepare(embeds, [5]), 0)) <= 1e-6 and graphed.graphs


@torch.no_grad()
def test_a_network_that_fails_at_every_size_is_left_alone(device, monkeypatch):
    tried = []

    def capture(compute):
        tried.append(1)
        raise RuntimeError("CUDA error:\n out of memory")

    monkeypatch.setattr(graphs, "capture", capture)
    _, graphed = pair(device)
    plan = graphed.prepare(randn(1, EMBEDDING_DIM).to(device), [5])
    for width in range(4, 4 * 12, 4):
        context = pytest.warns(UserWarning, match="UNet runs without a graph: CUDA error: out of memory")
        with context if len(tried) < graphs.MOST_FAILURES else nullcontext():
            assert graphed.step(randn(1, 4, 4, width).to(device), plan, 0).isfinite().all()
    assert len(tried) == graphs.MOST_FAILURES
    assert not vars(copy.deepcopy(graphed))["failed"]
    graphed.double()
    assert "failed" not in vars(graphed)


@torch.no_grad()
def test_hooks_on_all_modules_are_called(device):
    _, graphed = pair(device)
    plan, seen = graphed.prepare(randn(1, EMBEDDING_DIM).to(device), [5]), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        for _ in range(2):
            graphed.step(randn(1, 4, 8, 8).to(device), plan, 0)
    finally:
        hook.remove()
    assert seen.count(graphed.conv_in) == 2 and not graphs.captured


@on_cuda
@pytest.mark.gpu
@torch.no_grad()
def test_after_a_capture_that_fails_the_next_one_does_not():
    plain, graphed = pair("cuda")

    class Asks(torch.nn.Identity):
        def forward(self, x):
            return x * x.new_tensor(1.0 if x.abs().sum().item() else 2.0)  # which a capture cannot

    for unet in (plain, graphed):
        unet.conv_norm_out = torch.nn.Sequential(unet.conv_norm_out, Asks())
    given = randn(1, 4, 8, 8).cuda(), graphed.prepare(randn(1, EMBEDDING_DIM).cuda(), [5]), 0
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="UNet runs without a graph"):
        out = graphed.step(*given)
    assert relative_l2(out, plain.step(*given)) <= 1e-6 and torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()  # an error, where PyTorch still takes itself to be capturing
    assert torch.randn(1, device="cuda").isfinite().all()  # likewise
    for unet in (plain, graphed):
        unet.conv_norm_out = unet.conv_norm_out[0]
    x, *plan = randn(1, 4, 8, 16).cuda(), *given[1:]
    assert relative_l2(graphed.step(x, *plan), plain.step(x, *plan)) <= 1e-6 and graphed.graphs


@torch.no_grad()
def test_a_large_decoding_is_not_captured(device, monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST_DECODING", 2 * 4 * 4 * 4)
    graphed = ours(MoVQ, small.reference_movq()).to(device)
    graphed.__class__ = GraphedMoVQ
    for size, captures in ((4, 1), (8, 1)):
        for _ in range(3):
            graphed.decode(randn(2, 4, 4, size).to(device))
        assert len(graphs.captured) == captures
    assert "graphs" not in vars(graphed)  # what it held is free for the large one


@torch.no_grad()
def test_movq_is_captured_at_the_second_decoding_of_a_size(device, monkeypatch):
    plain, graphed = (ours(MoVQ, small.reference_movq()).to(device) for _ in range(2))
    graphed.__class__ = GraphedMoVQ
    earlier, replays, replay = None, [], graphs.Graph.replay
    monkeypatch.setattr(graphs.Graph, "replay", lambda *args: replays.append(1) or replay(*args))
    captures_by_run = [(4, 0), (4, 1), (4, 1), (6, 1), (4, 1), (4, 1), (6, 1), (6, 2)]
    for run, (h, captures) in enumerate(captures_by_run):
        z = randn(2, 4, h, 5, seed=run).to(device)
        pixels = graphed.decode(z)
        assert relative_l2(pixels, plain.decode(z)) <= 1e-6 and len(graphs.captured) == captures
        assert earlier is None or torch.equal(*earlier)  # not overwritten
        earlier = pixels, pixels.clone()
    assert len(replays) == 5  # also at a size that was captured before another was decoded
    twin = copy.deepcopy(graphed)
    assert not vars(twin)["graphs"] and relative_l2(twin.decode(z), pixels) <= 1e-6
    for network in (plain, graphed):
        network.double()
    assert "graphs" not in vars(graphed) and relative_l2(graphed.decode(z), plain.decode(z)) <= 1e-6
    restore(graphed)
    assert type(graphed) is MoVQ and not {"graphs", "failed", "decoded"} & set(vars(graphed))


@pytest.mark.slow
def test_pictures_in_every_mode_are_the_plain_ones(device, decoder_folder):
    plain, graphed = (Kandinsky.from_pretrained(decoder_folder, device=device) for _ in range(2))
    for name, fast in (("unet", GraphedUNet), ("prior", GraphedPrior), ("movq", GraphedMoVQ)):
        getattr(graphed, name).__class__ = fast
    settings = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "seed": 3, "output_type": "pt"}
    settings |= {"prompt": "a red cat", "height": 16, "width": 32}
    for changes in (
        {},
        {"prompt": "a cat"},
        {"prompt": "a cat", "guidance_interval": (0.0, 0.6)},
        {"cache_every": 2},
        {"num_images_per_prompt": 2, "negative_prompt": "blurry"},
        {"width": 48},
        {"guidance_scale": 1},
    ):
        drawn = [pipe.text2img(**settings | changes) for pipe in (graphed, plain)]
        assert relative_l2(*drawn) <= (1e-5 if device == "cpu" else 1e-4), changes
    assert len(graphs.captured) >= 6


def test_the_pictures_of_a_batch_that_are_decoded_one_by_one_do_not_overwrite_each_other(
    device, decoder_folder, monkeypatch
):
    monkeypatch.setattr("kandinsky.pipeline.PIXELS_IN_MOVQ", 16 * 32)
    plain, graphed = (Kandinsky.from_pretrained(decoder_folder, device=device) for _ in range(2))
    graphed.movq.__class__ = GraphedMoVQ
    settings = {"num_inference_steps": 1, "prior_num_inference_steps": 2, "seed": 3, "output_type": "pt"}
    settings |= {"height": 16, "width": 32, "num_images_per_prompt": 4}
    drawn, expected = (pipe.text2img("a red cat", **settings) for pipe in (graphed, plain))
    assert relative_l2(drawn, expected) <= 1e-5 and len(graphs.captured) == 1
    assert not any(torch.equal(a, b) for a, b in zip(drawn, drawn[1:]))


def test_groups_of_two_sizes_have_a_graph_each(device, decoder_folder, monkeypatch):
    monkeypatch.setattr("kandinsky.pipeline.PIXELS_IN_MOVQ", 2 * 16 * 32)
    pipe = Kandinsky.from_pretrained(decoder_folder, device=device)
    pipe.movq.__class__ = GraphedMoVQ
    settings = {"num_inference_steps": 1, "prior_num_inference_steps": 2, "seed": 3, "output_type": "pt"}
    settings |= {"height": 16, "width": 32, "num_images_per_prompt": 3}
    drawn = [pipe.text2img("a red cat", **settings) for _ in range(3)]
    assert len(graphs.captured) == 2 and all(relative_l2(x, drawn[0]) <= 1e-5 for x in drawn)


def test_hooks_gradients_and_autocast_are_served_without_the_graph(device, monkeypatch):
    _, graphed = pair(device)
    plan, x, seen = graphed.prepare(randn(1, EMBEDDING_DIM).to(device), [5]), randn(1, 4, 8, 8).to(device), []
    graphed.step(x, plan, 0).square().sum().backward()
    assert graphed.conv_in.weight.grad is not None and not graphs.captured
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hook = getattr(graphed.mid_block, register)(lambda *_: seen.append(1))
        with torch.no_grad():
            graphed.step(x, plan, 0)
            graphed.step(x, plan, 0)
            assert len(seen) == 2 and not graphs.captured and graphs.dependencies(graphed, x) is None
        hook.remove()
        seen.clear()
    with torch.no_grad():
        graphed.step(x, plan, 0)
        assert not seen and len(graphs.captured) == 1 and graphs.dependencies(graphed, x) is not None
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: True)
        assert graphs.dependencies(graphed, x) is None


@torch.no_grad()
def test_weights_changed_in_place_count_and_replaced_ones_are_captured_anew(device):
    plain, graphed = pair(device)
    embeds, x = randn(1, EMBEDDING_DIM).to(device), randn(1, 4, 8, 8).to(device)

    def agrees() -> bool:
        step = graphed.step(x, graphed.prepare(embeds, [5]), 0)
        return relative_l2(step, plain.step(x, plain.prepare(embeds, [5]), 0)) <= 1e-6

    assert agrees()
    for unet in (plain, graphed):
        unet.conv_in.weight.mul_(2)
    assert agrees() and len(graphs.captured) == 1
    for unet in (plain, graphed):
        unet.conv_in.weight = torch.nn.Parameter(3 * unet.conv_in.weight)
    assert agrees() and len(graphs.captured) == 2
    for unet in (plain, graphed):
        lora.add_lora(unet, rank=2)
        for name, parameter in unet.named_parameters():
            if "lora" in name:
                parameter.fill_(0.05)
    graphed.__class__ = GraphedUNet  # add_lora restores, and optimizes again what `optimize` did
    assert agrees()
    twin = copy.deepcopy(graphed)
    twin.conv_in.weight.zero_()
    assert agrees() and relative_l2(twin.step(x, twin.prepare(embeds, [5]), 0), graphed.graphs[0].out) > 1e-2


@torch.no_grad()
def test_kernels_that_a_part_of_the_network_merges_anew_are_captured_anew(device):
    plain, graphed = (network.double() for network in pair(device))  # float32 would be packed on a CPU
    assert merge_upsampling(graphed) > 0
    embeds, x = randn(1, EMBEDDING_DIM).to(device), randn(1, 4, 8, 8).to(device)
    for captures in (1, 2):
        step = graphed.step(x, graphed.prepare(embeds, [5]), 0)
        assert relative_l2(step, plain.step(x, plain.prepare(embeds, [5]), 0)) <= 1e-5
        assert len(graphs.captured) == captures
        graphed.up_blocks.to(device)  # moves no parameter


@on_cuda
@pytest.mark.gpu
def test_a_pipeline_with_graphs_draws_the_plain_ones_picture(decoder_folder):
    settings = {"num_inference_steps": 5, "height": 32, "width": 48, "seed": 3, "output_type": "latent"}
    pipe = Kandinsky.from_pretrained(decoder_folder, device="cuda")
    plain = pipe.text2img("a red cat", **settings)
    pipe.optimize()
    assert (
        type(pipe.unet) is GraphedUNet and relative_l2(pipe.text2img("a red cat", **settings), plain) <= 1e-4
    )
    pipe.restore()
    assert type(pipe.unet) is UNet and torch.equal(pipe.text2img("a red cat", **settings), plain)


def test_on_the_cpu_there_is_no_graph():
    references = {Prior: small.reference_prior, MoVQ: small.reference_movq, UNet: small.reference_unet}
    for plain, reference in references.items():
        network = ours(plain, reference())
        assert optimize(network)["cuda graph"] == 0 and type(network) is plain
