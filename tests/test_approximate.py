"""The approximate modes: what they leave out, that the rest is exact, and that by default all is done."""

from concurrent.futures import ThreadPoolExecutor
from math import ceil

import pytest
import torch

from kandinsky import ImageEmbeds, UNet, metadata
from kandinsky.approximate import GuidanceInterval, KeptFeatures, outermost
from kandinsky.inspection import edit
from kandinsky.optimize import optimize
from tests.helpers import half_mask, picture, randn, relative_l2, slow
from tests.small import EMBEDDING_DIM, ours, reference_unet
from tests.test_scripts import load

STEPS = 6
SETTINGS = {"num_inference_steps": STEPS, "output_type": "latent", "seed": 3}
EMBEDS = ImageEmbeds(randn(1, EMBEDDING_DIM), randn(1, EMBEDDING_DIM, seed=1))


def steps_of(pipe, **settings) -> list[torch.Tensor]:
    """The sample after each step."""
    seen = []
    pipe.text2img(
        embeds=EMBEDS, height=32, width=32, on_step=lambda s: seen.append(s.x), **SETTINGS | settings
    )
    return seen


def calls_of(pipe, path: str, **settings) -> list[int]:
    """With how many rows a module is called in each step that calls it."""
    rows = []
    hook = pipe.unet.get_submodule(path).register_forward_hook(lambda m, args, out: rows.append(len(out)))
    steps_of(pipe, **settings)
    hook.remove()
    return rows


def test_by_default_nothing_is_left_out(pipe):
    plain = steps_of(pipe)
    given = steps_of(pipe, guidance_interval=(0, 1), cache_every=1)
    assert all(torch.equal(a, b) for a, b in zip(plain, given))
    assert calls_of(pipe, "mid_block") == [2] * STEPS


def test_outside_the_interval_steps_are_not_guided(pipe):
    unguided = steps_of(pipe, guidance_scale=1.0)
    assert relative_l2(steps_of(pipe, guidance_interval=(0, 0))[-1], unguided[-1]) <= 1e-5
    guided, first_half = steps_of(pipe), steps_of(pipe, guidance_interval=(0, 0.5))
    assert torch.equal(first_half[2], guided[2]) and relative_l2(first_half[3], guided[3]) > 1e-3
    assert calls_of(pipe, "mid_block", guidance_interval=(0.4, 0.7)) == [1, 1, 1, 2, 2, 1]
    assert calls_of(pipe, "mid_block", guidance_interval=(0.4, 0.7), guidance_scale=1.0) == [1] * STEPS


@pytest.mark.parametrize("every", [2, 3, 6])
def test_the_inner_levels_run_at_each_nth_step_only(pipe, every):
    assert calls_of(pipe, "mid_block", cache_every=every) == [2] * ceil(STEPS / every)
    assert calls_of(pipe, "down_blocks.0.resnets.0", cache_every=every) == [2] * STEPS
    plain, kept = steps_of(pipe), steps_of(pipe, cache_every=every)
    assert torch.equal(kept[0], plain[0]) and 1e-4 < relative_l2(kept[1], plain[1]) < 1
    assert not pipe.unet.up_blocks[-1]._forward_pre_hooks


@torch.no_grad()
def test_the_outermost_level_is_exact_given_what_the_inner_ones_make():
    unet, x, seen = ours(UNet, reference_unet()), randn(2, 4, 16, 24), []
    plan = unet.prepare(randn(2, EMBEDDING_DIM), [900, 300])
    hook = unet.up_blocks[-1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    whole = unet.step(x, plan, 1)
    hook.remove()
    assert torch.equal(outermost(unet, x, seen[0], unet.conditioning(plan, 1), None), whole)


def test_kept_features_and_an_interval_go_together(pipe):
    both = {"guidance_interval": (0, 0.5), "cache_every": 2}
    assert calls_of(pipe, "mid_block", **both) == [2, 2, 1]
    assert calls_of(pipe, "conv_in", **both) == [2, 2, 2, 1, 1, 1]
    late = {"guidance_interval": (0.5, 1), "cache_every": 2}
    assert calls_of(pipe, "mid_block", **late) == [1, 1, 2, 2]  # step 3 has rows that step 2 did not compute


def test_an_edit_of_the_last_block_is_made_once_a_step(pipe):
    inner, last = [], f"up_blocks.{len(pipe.unet.up_blocks) - 1}"
    with edit(pipe.unet, {last: lambda args: (2 * args[0], *args[1:])}, inputs=True):
        hook = pipe.unet.get_submodule(last).register_forward_pre_hook(lambda m, args: inner.append(args[0]))
        steps_of(pipe, cache_every=2)
        hook.remove()
    assert torch.equal(inner[0], inner[1]) and len(inner) == STEPS


@torch.no_grad()
def test_another_thread_on_the_same_network_does_not_change_what_is_kept():
    unet = ours(UNet, reference_unet())
    plan = unet.prepare(randn(2, EMBEDDING_DIM, seed=1), [999, 20])
    x = randn(2, 4, 8, 12)

    def two_steps() -> torch.Tensor:
        kept = KeptFeatures(unet, 2)
        return torch.cat([kept.step(x, plan, index) for index in (0, 1)])

    def meanwhile(module: torch.nn.Module, args: tuple) -> None:
        hook.remove()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(unet.step, randn(2, 4, 8, 12, seed=2), plan, 0).result()

    alone = two_steps()
    hook = unet.conv_norm_out.register_forward_pre_hook(meanwhile)
    assert torch.equal(two_steps(), alone)


@torch.no_grad()
def test_a_step_without_guidance_keeps_the_conditional_features():
    unet, x = ours(UNet, reference_unet()), randn(1, 4, 8, 8)
    embeds = randn(2, EMBEDDING_DIM)
    stand_in = KeptFeatures(unet, 2)
    plan, cond = stand_in.prepare(embeds, [9, 6]), unet.prepare(embeds[1:], [9, 6])
    stand_in.step(torch.cat([x, x]), plan, 0)
    inner = stand_in.inner
    wanted = outermost(unet, x, inner[1:], unet.conditioning(cond, 1), None)
    assert relative_l2(inner[:1], inner[1:]) > 1e-3
    assert relative_l2(stand_in.step(x, cond, 1), wanted) <= 1e-5


@pytest.mark.parametrize("task", ["inpaint", *slow("img2img", "hint")])
def test_every_task_takes_the_approximate_modes_and_a_batch_equals_single_runs(task, pipe, inpainter, hinted):
    settings = {"num_inference_steps": 4, "output_type": "latent", "guidance_interval": [0.25, 0.75]}
    settings |= {"cache_every": 2, "height": 32, "width": 32}
    if task == "hint":
        method, settings = hinted.text2img, settings | {"hint": randn(1, 3, 64, 64).sigmoid()}
    elif task == "inpaint":
        method = inpainter.inpaint
        settings |= {"image": picture(32, 32), "mask_image": half_mask(32, 32)}
    else:
        method, settings = pipe.img2img, settings | {"image": picture(32, 32), "strength": 1.0}
    batch = method(embeds=EMBEDS, num_images_per_prompt=2, seed=[3, 8], **settings)
    for row, seed in zip(batch, (3, 8)):
        assert relative_l2(row[None], method(embeds=EMBEDS, seed=seed, **settings)) <= 1e-5
    whole = method(embeds=EMBEDS, seed=3, **settings | {"cache_every": 1, "guidance_interval": (0, 1)})
    assert relative_l2(batch[:1], whole) > 1e-3


@torch.no_grad()
def test_an_optimized_unet_gives_the_same():
    unet, fast = (ours(UNet, reference_unet()) for _ in range(2))
    optimize(fast)
    outs = []
    for one in (unet, fast):
        stand_in = GuidanceInterval(KeptFeatures(one, 2), 0, 0.5)
        plan = stand_in.prepare(
            torch.cat([randn(1, EMBEDDING_DIM), randn(1, EMBEDDING_DIM, seed=1)]), [9, 6, 3]
        )
        outs.append([stand_in.step(randn(2, 4, 8, 8, seed=i), plan, i) for i in range(3)])
    assert all(relative_l2(a, b) <= 1e-5 for a, b in zip(*outs))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cache_every": 0}, "cache_every is 0; allowed is 1 and more"),
        ({"cache_every": 1.5}, "cache_every is 1.5 of type float"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5; two numbers"),
        ({"guidance_interval": (0.6, 0.4)}, "starts after it stops"),
        ({"guidance_interval": (0, 1.2)}, "guidance_interval is 1.2; allowed is 0 to 1"),
        ({"guidance_interval": (0, float("nan"))}, "a finite number is needed"),
    ],
)
def test_bad_values_are_refused_before_weights_are_read(pipe, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        steps_of(pipe, **settings)
    assert pipe.loaded("unet") is None


def test_a_picture_made_so_is_made_again(tmp_path, decoder_folder):
    given = ["--weights", str(decoder_folder), "--out", str(tmp_path / "a.png"), "--height", "16"]
    modes = ["--cache-every", "2", "--guidance-interval", "0.2", "0.8", "--steps", "4", "--prior-steps", "2"]
    assert load("text2img").main(["cat", *given, *modes]) == 0
    call = metadata.read(tmp_path / "a.png")["call"]
    assert call["cache_every"] == 2 and call["guidance_interval"] == [0.2, 0.8]
    again = ["--from-png", str(tmp_path / "a.png"), *given[:2], "--out", str(tmp_path / "b.png")]
    assert load("text2img").main(again) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
