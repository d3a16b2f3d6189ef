"""Measures what the README states: medians of runs taken in turn, so that a drifting machine favours none.

import   a fresh process to the end of the import, and of ours until a model is built
start    a fresh process to a saved picture, and its peak memory, against diffusers on the same folders
mask     what inpainting makes of a mask, against diffusers' on the same, 1024 px where not given
pictures whole pictures of loaded pipelines, the first's seconds, and peak memory on a GPU, against diffusers
parts    text encoder, zero image, prior, U-Net step and MoVQ, at random weights, against diffusers' on them
ladder   the same networks, plain, with each rewrite of `kandinsky.optimize` alone, and with ever more of them
cuda     what is worth knowing on a GPU, most important first, until --budget is spent; JSON, a line for each

"% of roofline": of the time taken, the least that our plain network can take here (`roofline.py`).
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import roofline
import torch
from benchmark_networks import (
    PARTS,
    each_part,
    in_turn,
    measure_convolutions,
    measure_kernels,
    measure_ladder,
    measure_part,
    stopwatch,
    whole_picture,
)
from benchmark_pictures import PROMPT, by_size, measure_pipeline, pipelines
from reference import is_installed
from torch.nn import functional as F

from kandinsky import Kandinsky, arguments, cli, random_weights
from kandinsky.masks import keep_latents

DECODER = cli.WEIGHTS / "mini-decoder"
UNET = str(DECODER / "unet")
IMPORTS = {
    "torch": "import torch",
    "kandinsky": "import kandinsky",
    "kandinsky, a model built": f"import kandinsky; kandinsky.UNet.from_pretrained({UNET!r})",
    "diffusers": "from diffusers import KandinskyV22CombinedPipeline",
}
THEIR_SCRIPT = """
import sys, torch
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline
decoder, prior, prompt, pixels, steps, prior_steps, dtype, out = sys.argv[1:]
dtype = getattr(torch, dtype)
prior = KandinskyV22PriorPipeline.from_pretrained(prior, torch_dtype=dtype)
decoder = KandinskyV22Pipeline.from_pretrained(decoder, torch_dtype=dtype)
generator = torch.Generator().manual_seed(0)
embeds, negative = prior(prompt, num_inference_steps=int(prior_steps), generator=generator).to_tuple()
size = dict(height=int(pixels), width=int(pixels), num_inference_steps=int(steps))
decoder(embeds, negative, generator=generator, **size).images[0].save(out)
"""


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    kinds = ("import", "start", "mask", "pictures", "parts", "ladder", "cuda")
    parser.add_argument("what", choices=kinds, help="see above")
    parser.add_argument(
        "--runs", type=int, help="of each, after one that is not counted; default: 9, of networks 5"
    )
    parser.add_argument("--quick", action="store_true", help="2 runs at 256 px, where not given")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="which, of parts and ladder"
    )
    parser.add_argument("--size", choices=tuple(random_weights.SIZES), default="released", help="of networks")
    parser.add_argument(
        "--pixels", type=int, nargs="+", help="sides of pictures; default: the checkpoint's, of networks 512"
    )
    parser.add_argument("--dtype", choices=cli.DTYPES, default="float32", help="of the weights")
    parser.add_argument("--steps", type=int, default=50, help="of the decoder, for start and pictures")
    parser.add_argument("--prior-steps", type=int, default=25, help="for start and pictures")
    parser.add_argument(
        "--weights",
        help="2.2 or a decoder folder, for start, pictures and cuda; default: the embedded one",
    )
    parser.add_argument(
        "--num-images", type=int, nargs="+", default=[1], help="pictures at once, for pictures"
    )
    parser.add_argument("--device", default="cpu", help="of the networks")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="both",
        choices=("both", "diffusers", "ours"),
        help="whose networks also under torch.compile; of pictures, diffusers'. Behind the kind",
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds after which cuda begins no more")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: cli.OneLineParser, args) -> None:
    """What goes together, and the defaults that depend on what is measured."""
    of_networks = args.what in ("parts", "ladder")
    if args.runs is None:
        args.runs = 2 if args.quick else 9 if args.what in ("import", "start", "mask") else 5
    if args.compile and args.what not in ("parts", "pictures"):
        parser.error("--compile goes with parts and pictures")
    if args.compile == "ours" and args.what == "pictures":
        parser.error("--compile ours goes with parts; of pictures only diffusers' networks are compiled")
    if min(args.num_images) < 1:
        parser.error(f"--num-images is {min(args.num_images)}; allowed is 1 and more")
    if args.runs < 1:
        parser.error(f"--runs is {args.runs}; allowed is 1 and more")
    if args.pixels is None and of_networks:
        args.pixels = [256 if args.quick else 512]
    if args.what in ("start", "mask") and args.pixels is not None and len(args.pixels) > 1:
        parser.error(f"{args.what} takes one of --pixels")
    if args.what == "mask" and args.pixels and args.pixels[0] % 8:
        parser.error(f"--pixels is {args.pixels[0]}; of a mask it is a multiple of 8")
    if args.what == "cuda" and (args.pixels or args.quick or args.parts != list(PARTS)):
        parser.error("cuda takes none of --pixels, --parts and --quick; it does all that it has time for")
    args.device = arguments.device(args.device)
    if args.weights == "2.1":
        parser.error("--weights is 2.1; what is compared is 2.2's")
    if args.what in ("start", "pictures", "cuda"):
        args.weights = cli.decoder_folder(args.weights)
    elif args.weights is not None:
        parser.error(f"--weights goes with start, pictures and cuda; {args.what} reads no checkpoint")


def process(*command: str) -> Callable[[], tuple[float, float]]:
    """Seconds and peak memory in GiB of a fresh process, which must succeed."""

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                raise ValueError(f"{Path(command[0]).name} ended with {child.returncode}: {' '.join(last)}")
        return time.perf_counter() - start, usage.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)

    return once


def measure_processes(runs: int, commands: dict[str, list[str]]) -> dict[str, dict[str, list[float]]]:
    measured = in_turn(runs, {name: process(*command) for name, command in commands.items()})
    named = {"seconds": 0, "gib": 1}
    return {what: {name: [run[i] for run in m] for name, m in measured.items()} for what, i in named.items()}


def measure_imports(args) -> dict[str, dict[str, list[float]]]:
    names = [name for name in IMPORTS if is_installed(name.split(",")[0])]
    return measure_processes(args.runs, {name: [sys.executable, "-c", IMPORTS[name]] for name in names})


def own_side(pipe: Kandinsky) -> int:
    """In pixels, of the checkpoint's pictures."""
    return pipe.unet_config.sample_size * pipe.movq_config.downscale


def measure_start(args) -> dict[str, dict[str, list[float]]]:
    pipe = Kandinsky.from_pretrained(args.weights)
    pixels = str(args.pixels[0] if args.pixels else own_side(pipe))
    steps, dtype = [str(args.steps), str(args.prior_steps)], args.dtype
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, str(Path(__file__).parent / "text2img.py"), PROMPT, "--seed", "0"]
        ours += ["--weights", str(args.weights), "--height", pixels, "--width", pixels, "--dtype", dtype]
        ours += ["--steps", steps[0], "--prior-steps", steps[1], "--overwrite", "--out", f"{folder}/a.png"]
        commands = {"kandinsky": ours, "kandinsky, --low-memory": [*ours, "--low-memory"]}
        if is_installed("diffusers"):
            given = [str(args.weights), str(pipe.need_prior()), PROMPT, pixels, *steps, dtype]
            commands["diffusers"] = [sys.executable, "-c", THEIR_SCRIPT, *given, f"{folder}/b.png"]
        return measure_processes(args.runs, commands)


def measure_mask(args) -> dict[str, dict[str, list[float]]]:
    """A square in the middle, a quarter of the picture, on its way to what the U-Net is told of it."""
    side = args.pixels[0] if args.pixels else 1024
    inside = (torch.arange(side) - side / 2 + 0.5).abs() < side / 4
    mask = (inside[:, None] & inside).float()[None, None]
    ways = {"kandinsky": lambda mask: keep_latents(mask, 8)}
    if is_installed("diffusers"):
        from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_inpainting as theirs

        ways["diffusers"] = lambda mask: theirs.prepare_mask(F.interpolate(1 - mask, scale_factor=1 / 8))
    timed = {name: stopwatch(args, mask, way, 1) for name, way in ways.items()}
    return {"seconds": in_turn(args.runs, timed)}


def table(measured: dict[str, list[float]], base: str, unit: str = "s") -> list[str]:
    medians = {name: statistics.median(values) for name, values in measured.items()}
    lines = []
    for name, values in measured.items():
        spread = f"{min(values):.3g} to {max(values):.3g}"
        ratio = f"{medians[name] / medians[base]:5.2f} × {base}"
        lines.append(f"{name:<24} {medians[name]:8.3g} {unit}  ({spread})  {ratio}")
    return lines


def report_part(name: str, result: dict[str, Any], args) -> None:
    base, exact = ("plain", "plain") if args.what == "ladder" else ("diffusers", "float32")
    print(f"\n{name}, {args.size}, {args.dtype}, {args.side} px, {args.device}")
    lines = zip(table(result["seconds"], base), result["seconds"].values(), result["relative_l2"].values())
    for line, seconds, away in lines:
        share = result["floor"] / statistics.median(seconds) if result.get("floor") else None
        floor = "" if share is None else f"  {share:4.0%} of roofline"
        print(f"{line}  {away:.1e} from {exact}{floor}", flush=True)


def measure_cuda(args) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is worth knowing on a GPU, most important first: parts and single pictures of 512 px, where the
    time goes, then larger ones and all the rest."""
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
    yield "machine", {"device": where, "torch": torch.__version__}
    half, networks = "bfloat16", ["unet", "prior", "movq", "text_encoder"]
    whole = ["diffusers", "kandinsky", "kandinsky, optimized"]
    yield from measure_cuda_parts(args, [(half, networks, 512, False)])
    yield from measure_cuda_pictures(args, [*whole, "diffusers, compiled"], [(512, 1)])
    yield from measure_cuda_parts(args, [(half, ["unet", "movq"], 1024, False)])
    for name in ("unet", "movq", "prior"):
        vars(args).update(dtype=half, side=512)
        yield f"kernels of {name}", attempt(measure_kernels, args, name)
    yield from measure_cuda_pictures(args, whole, [(512, 8), (1024, 1)])
    vars(args).update(dtype=half, side=512)
    yield "convolutions", attempt(lambda args, _: dict(measure_convolutions(args)), args, "")
    for name in ("unet", "movq"):
        yield f"ladder of {name}", attempt(measure_ladder, args, name)
    yield from measure_cuda_pictures(args, ["kandinsky, --low-memory"], [(512, 1)])
    yield from measure_cuda_parts(args, [(dtype, networks, 512, False) for dtype in ("float32", "float16")])
    yield from measure_cuda_parts(args, [(half, ["unet"], 512, True), (half, ["zero_image"], 512, False)])


def measure_cuda_pictures(
    args, names: list[str], sizes: list[tuple[int, int]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a checkpoint of one's own. sizes: sides in pixels, and how many at once"""
    if args.weights == DECODER:
        return
    vars(args).update(dtype="bfloat16", compile="both")
    measured = ", ".join(f"{count} of {side} px" for side, count in sizes)
    for name in names:
        yield f"pictures, {name}, {measured}", attempt(partial(measure_pipeline, sizes=sizes), args, name)


def measure_cuda_parts(args, plan: list[tuple[str, list[str], int, bool]]) -> Iterator[tuple[str, Any]]:
    """plan: dtype, networks, side of the picture, whether compiled too"""
    for dtype, names, side, compiled in plan:
        vars(args).update(dtype=dtype, side=side, compile="both" if compiled else None)
        parts = {}
        for name in names:
            parts[name] = attempt(measure_part, args, name)
            yield f"{name}, {dtype}, {side} px" + ", compiled" * compiled, parts[name]
        if all("error" not in result for result in parts.values()) and len(names) > 2:
            yield f"whole picture, {dtype}, {side} px", {"seconds": whole_picture(parts)}


def attempt(measure: Callable, args: Any, name: str) -> dict[str, Any]:
    """The result, or what went wrong: the others are still worth knowing. With it what it warned of, as that
    a network ran without its graph."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            torch._dynamo.reset()
            result = measure(args, name)
        except Exception as error:
            result = {"error": one_line(error)}
        finally:
            gc.collect()
    warned = dict.fromkeys(one_line(w.message) for w in caught if w.category is UserWarning)
    return result | {"warnings": list(warned)} if warned else result


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def run_cuda(args) -> None:
    """A line for each result as soon as it is there, so that a machine taken away loses one at most."""
    start = time.perf_counter()
    for name, result in measure_cuda(args):
        if args.device.type == "cuda":
            result["peak_gib"] = torch.cuda.max_memory_allocated(args.device) / 2**30
            torch.cuda.reset_peak_memory_stats(args.device)
        print(json.dumps({name: result}), flush=True)
        if "error" in result:
            roofline.synchronize(args.device)  # raises where CUDA is beyond repair, and with it this process
        if time.perf_counter() - start > args.budget:
            break


MEASURE = {"import": measure_imports, "start": measure_start, "mask": measure_mask}


def report_pictures(results: dict[str, Any], base: str, has_memory: bool) -> None:
    for size, seconds in by_size(results).items():
        print("\n".join([f"\n{size}", *table(seconds, base)]))
        if not has_memory or size == "first picture":
            continue
        for kind, unit in (("gib", "GiB"), ("gib taken", "GiB taken")):
            gib = {name: [result[kind][size]] for name, result in results.items() if size in result[kind]}
            print("\n".join(table(gib, base, unit)))


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.what == "cuda":
        # a wrong folder is said before minutes are spent
        Kandinsky.from_pretrained(args.weights).need_prior()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.what == "cuda":
        run_cuda(args)
        return 0
    if args.what in ("parts", "ladder"):
        results = {}
        for name, result in each_part(args, measure_part if args.what == "parts" else measure_ladder):
            results[name] = result
            if not args.json:
                report_part(name, result, args)
        if args.what == "parts" and set(args.parts) == set(PARTS) and len(args.pixels) == 1:
            results["whole picture"] = {"seconds": whole_picture(results)}
    elif args.what == "pictures":
        sides = args.pixels or [own_side(Kandinsky.from_pretrained(args.weights))]
        sizes = [(side, count) for count in args.num_images for side in sides]
        results = {name: measure_pipeline(args, name, sizes) for name in pipelines(args)}
        base = "diffusers" if "diffusers" in results else "kandinsky"
        if not args.json:
            report_pictures(results, base, has_memory=args.device.type == "cuda")
    else:
        base = "torch" if args.what == "import" else "diffusers"
        results = MEASURE[args.what](args)
        base = base if base in results["seconds"] else "kandinsky"
        if not args.json:
            print("\n".join(table(results["seconds"], base)))
            if "gib" in results:
                print("\n".join(["", *table(results["gib"], base, "GiB")]))
    if args.json:
        print(json.dumps(results))
    elif "whole picture" in results:
        print("\nwhole picture, 50 and 25 steps, the sum of the parts")
        print("\n".join(table(results["whole picture"]["seconds"], "diffusers")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
