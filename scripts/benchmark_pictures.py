"""What `benchmark.py pictures` times: whole pictures of loaded pipelines, ours and diffusers', each alone."""

import gc
import time
from collections.abc import Callable
from typing import Any

import roofline
import torch
from benchmark_networks import in_turn, stopwatch
from reference import is_installed

from kandinsky import Kandinsky

PROMPT = "a red circle above a small blue square on a yellow background"
Draw = Callable[[int, int], Any]  # side in pixels, pictures at once


def measure_pipeline(args, name: str, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Of one pipeline: seconds from nothing to its first picture, then those of later ones, and on CUDA the
    peak of the device's memory in GiB: of all tensors, and as taken from the device, with what PyTorch keeps
    for reuse and what a graph works in, which counts as a tensor's only while it is captured. sizes: (pixels,
    pictures at once), the first's is the first picture's; what is compiled draws that alone, as it is
    compiled anew for every size."""
    result: dict[str, Any] = {"seconds": {}, "gib": {}, "gib taken": {}}
    make = pipelines(args)[name]
    forget_peak(args)
    start = time.perf_counter()
    draw = make()
    draw(*sizes[0])
    roofline.synchronize(args.device)
    result["first"] = time.perf_counter() - start
    for side, count in sizes[:1] if "compiled" in name else sizes:
        size = f"{count} of {side} px"
        forget_peak(args)
        once = stopwatch(args, draw, lambda draw, given=(side, count): draw(*given), 1)
        result["seconds"][size] = in_turn(args.runs, {name: once})[name]
        if args.device.type == "cuda":
            result["gib"][size] = torch.cuda.max_memory_allocated(args.device) / 2**30
            result["gib taken"][size] = torch.cuda.max_memory_reserved(args.device) / 2**30
    return result


def by_size(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Of `measure_pipeline`'s results, by name -> what a table shows, by size and name."""
    shown: dict[str, dict[str, list[float]]] = {
        "first picture": {n: [r["first"]] for n, r in results.items()}
    }
    for name, result in results.items():
        for size, seconds in result["seconds"].items():
            shown.setdefault(size, {})[name] = seconds
    return shown


def forget_peak(args) -> None:
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)


def pipelines(args) -> dict[str, Callable[[], Draw]]:
    found = {}
    if is_installed("diffusers"):
        from diffusers import KandinskyV22PriorPipeline  # noqa: F401 - its import is not to be timed

        found["diffusers"] = lambda: theirs(args)
    found |= {
        "kandinsky": lambda: ours(args),
        "kandinsky, optimized": lambda: ours(args, optimized=True),
        "kandinsky, --low-memory": lambda: ours(args, optimized=True, keep_loaded=False),
    }
    if args.compile and is_installed("diffusers"):
        found["diffusers, compiled"] = lambda: theirs(args, compiled=True)
    return found


def ours(args, optimized: bool = False, keep_loaded: bool = True) -> Draw:
    given = args.device, getattr(torch, args.dtype), keep_loaded
    pipe = Kandinsky.from_pretrained(args.weights, None, *given)
    if optimized:
        pipe.optimize()
    steps = {"num_inference_steps": args.steps, "prior_num_inference_steps": args.prior_steps}

    def draw(side: int, count: int) -> Any:
        size = {"height": side, "width": side, "num_images_per_prompt": count}
        return pipe.text2img(PROMPT, seed=0, **size, **steps)

    return draw


def theirs(args, compiled: bool = False) -> Draw:
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    folder = Kandinsky.from_pretrained(args.weights).need_prior()
    dtype = getattr(torch, args.dtype)
    prior = KandinskyV22PriorPipeline.from_pretrained(folder, torch_dtype=dtype).to(args.device)
    decoder = KandinskyV22Pipeline.from_pretrained(args.weights, torch_dtype=dtype).to(args.device)
    for pipe in (prior, decoder):
        pipe.set_progress_bar_config(disable=True)
    if compiled:
        decoder.unet.compile()
        decoder.movq.decoder.compile()

    def draw(side: int, count: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        many = {"num_images_per_prompt": count, "generator": generator}
        embeds, negative = prior(PROMPT, num_inference_steps=args.prior_steps, **many).to_tuple()
        size = {"height": side, "width": side, "num_inference_steps": args.steps}
        return decoder(embeds, negative, generator=generator, **size).images

    return draw
