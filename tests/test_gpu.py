"""On a CUDA device: the small pipeline against the CPU's, and half precision against float32."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky import Kandinsky, fused, images
from kandinsky.optimize import optimize
from tests.helpers import half_mask, picture, randn, relative_l2
from tests.small import EMBEDDING_DIM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"num_inference_steps": 4, "prior_num_inference_steps": 3, "height": 32, "width": 48, "seed": 3}


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
    _ = torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")  # cuBLAS keeps memory from then on
    before = torch.cuda.memory_allocated()
    pipe.text2img("a red cat", **SETTINGS)
    assert torch.cuda.memory_allocated() <= before + 2**20


def draw_every_task(folders: dict[str, Path], device: str) -> list[torch.Tensor]:
    """Latents of img2img, inpaint and hint img2img, and the embeddings of mix and embed_from."""
    image, quick = picture(48, 32), {"num_inference_steps": 4, "prior_num_inference_steps": 3, "seed": 3}
    quick |= {"output_type": "latent"}
    pipe = Kandinsky.from_pretrained(folders["decoder"], device=device)
    inpainter = Kandinsky.from_pretrained(folders["inpaint"], device=device)
    hinted = Kandinsky.from_pretrained(folders["hint"], device=device)
    out = [pipe.img2img("a red cat", image=image, strength=0.6, **quick)]
    out += [inpainter.inpaint("a red cat", image=image, mask_image=half_mask(), **quick)]
    out += [hinted.img2img("a red cat", image=image, hint=image, strength=0.6, **quick)]
    out += [pipe.mix(["a red cat", image], [0.5, 0.5], "blurry", num_inference_steps=3, seed=1).image_embeds]
    out += [pipe.embed_from(image, "a red cat", 0.7, num_inference_steps=4, seed=1).image_embeds]
    kept = inpainter.inpaint("a", image=image, mask_image=half_mask() * 0, **{**quick, "output_type": "pt"})
    assert torch.equal(kept[0].cpu(), images.picture(image))
    return out


def test_every_task_gives_the_cpus_result(decoder_folder, inpaint_folder, hint_folder):
    folders = {"decoder": decoder_folder, "inpaint": inpaint_folder, "hint": hint_folder}
    for ours, cpus in zip(draw_every_task(folders, "cuda"), draw_every_task(folders, "cpu"), strict=True):
        assert ours.device.type == "cuda" and relative_l2(ours.cpu(), cpus) <= 1e-4


def test_optimized_pictures_are_the_cpus(decoder_folder):
    """Another prompt gives the graph another plan; another size, and plain again, take it away."""
    cpu = Kandinsky.from_pretrained(decoder_folder)
    pipe = Kandinsky.from_pretrained(decoder_folder, device="cuda")
    pipe.optimize()
    for prompt, width in (("a red cat", 48), ("a blue cat", 48), ("a red cat", 64)):
        settings = SETTINGS | {"width": width, "output_type": "pt"}
        expected, pixels = (p.text2img(prompt, **settings) for p in (cpu, pipe))
        assert relative_l2(pixels.cpu(), expected) <= 1e-4
        for network in (pipe.unet, pipe.prior):
            assert network.graphs and not network.failed  # it did not fall back
    assert fused.can_run(pipe.unet.device, pipe.unet.dtype)
    assert any(isinstance(module, fused.FusedResnetBlock) for module in pipe.unet.modules())
    pipe.restore()
    pixels = pipe.text2img("a red cat", output_type="pt", **SETTINGS)
    assert relative_l2(pixels.cpu(), cpu.text2img("a red cat", output_type="pt", **SETTINGS)) <= 1e-4


@pytest.mark.parametrize("optimized", [False, True])
def test_the_loops_do_not_wait_for_the_gpu(decoder_folder, optimized):
    def strict_between_steps(step):
        torch.cuda.set_sync_debug_mode("error" if step.index < step.num_steps - 1 else "default")

    pipe = Kandinsky.from_pretrained(decoder_folder, device="cuda")
    if optimized:
        pipe.optimize()
    try:
        embeds = pipe.embed("a red cat", num_inference_steps=4, seed=0, on_step=strict_between_steps)
        settings = {"embeds": embeds, "height": 32, "width": 48, "num_inference_steps": 4}
        assert pipe.text2img(seed=0, on_step=strict_between_steps, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_optimized_hints_and_inpainting_are_the_cpus(inpaint_folder, hint_folder):
    image, quick = picture(48, 32), {"num_inference_steps": 4, "prior_num_inference_steps": 3, "seed": 3}
    quick |= {"output_type": "latent", "image": image}
    for folder, task, given in (
        (hint_folder, "img2img", {"hint": image, "strength": 0.6}),
        (inpaint_folder, "inpaint", {"mask_image": half_mask()}),
    ):
        drawn = []
        for device in ("cpu", "cuda"):
            pipe = Kandinsky.from_pretrained(folder, device=device)
            if device == "cuda":
                pipe.optimize()
            drawn.append(getattr(pipe, task)("a red cat", **quick, **given).cpu())
        assert relative_l2(drawn[1], drawn[0]) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "prior", "movq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_optimized_networks_lie_no_further_from_float32_in_half_precision(decoder_folder, kind, dtype):
    """The first call runs plainly or is captured, the others are replayed."""
    exact = getattr(Kandinsky.from_pretrained(decoder_folder), kind)
    plain, fast = (
        getattr(Kandinsky.from_pretrained(decoder_folder, None, "cuda", dtype), kind) for _ in "ab"
    )
    optimize(fast)
    away = {"plain": [], "optimized": []}
    for seed in range(8):
        expected = output_of(kind, exact, seed)
        away["plain"].append(relative_l2(output_of(kind, plain, seed).cpu(), expected))
        away["optimized"].append(relative_l2(output_of(kind, fast, seed).cpu(), expected))
    assert fast.graphs and not fast.failed
    assert statistics.median(away["optimized"]) <= 1.3 * statistics.median(away["plain"])


def output_of(kind: str, network: Any, seed: int) -> torch.Tensor:
    given = [randn(2, EMBEDDING_DIM, seed=seed), randn(2, EMBEDDING_DIM, seed=100 + seed)]
    x, embeds = (tensor.to(network.device) for tensor in given)
    if kind == "movq":
        return network.decode(randn(1, 4, 6, 8, seed=seed).to(network.device))
    if kind == "unet":
        latents = randn(2, 4, 8, 8, seed=seed).to(network.device)
        return network.step(latents, network.prepare(embeds, [681]), 0)
    states = randn(2, 5, EMBEDDING_DIM, seed=200 + seed).to(network.device)
    mask = torch.arange(5, device=network.device) < torch.tensor([[5], [3]], device=network.device)
    t = torch.full((2,), 681, device=network.device)
    return network.step(x, t, network.prefill(embeds, states, mask))


def test_the_fused_norm_of_a_large_map():
    """More moments than are read at once, as at MoVQ's widest level."""
    norm = torch.nn.GroupNorm(32, 256).cuda().bfloat16()
    x = (3 + randn(1, 256, 512, 512)).cuda().bfloat16().to(memory_format=torch.channels_last)
    weight, bias = norm.weight, norm.bias
    expected = torch.nn.functional.group_norm(x.float(), 32, weight.float(), bias.float(), norm.eps)
    with torch.no_grad():
        ours, theirs = fused.apply(norm, x, activate=False), norm(x)
    away = [relative_l2(out.float(), expected) for out in (ours, theirs)]
    assert away[0] <= 1.1 * away[1]
