"""Measures what the README states: medians of runs taken in turn, so that a drifting machine favours none.

import   a fresh process to the end of the import
start    a fresh process to a saved picture, and its peak memory, against diffusers on the same folders
parts    text encoder, prior, U-Net step and MoVQ, at random weights, against diffusers' on the same weights
ladder   the same networks, plain, with each rewrite of `kandinsky.optimize` alone, and with ever more of them
"""

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reference import distance, randn, reference_for
from torch import Tensor, nn

from kandinsky import Kandinsky, MoVQ, Prior, UNet, arguments, cli, random_weights
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.optimize import UNTRIED, USUAL, optimize, restore
from kandinsky.schedulers import UnCLIPScheduler

IMPORTS = {
    "torch": "import torch",
    "kandinsky": "import kandinsky",
    "diffusers": "from diffusers import KandinskyV22CombinedPipeline",
}
PROMPT = "a red circle above a small blue square on a yellow background"
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
Runs = tuple[Callable, Callable, int]  # of ours, of theirs, how often theirs is needed for one of ours


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("what", choices=("import", "start", "parts", "ladder"), help="see above")
    parser.add_argument(
        "--runs", type=int, help="of each, after one that is not counted; default: 9, parts and ladder 5"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="which, for parts"
    )
    parser.add_argument("--size", choices=tuple(random_weights.SIZES), default="released", help="of networks")
    parser.add_argument(
        "--pixels", type=int, help="side of the picture; default: the checkpoint's, parts 512"
    )
    parser.add_argument("--dtype", choices=cli.DTYPES, default="float32", help="of the weights")
    parser.add_argument("--steps", type=int, default=50, help="of the decoder, for start")
    parser.add_argument("--prior-steps", type=int, default=25, help="for start")
    parser.add_argument(
        "--weights", type=Path, default=cli.WEIGHTS / "mini-decoder", help="decoder folder, for start"
    )
    parser.add_argument("--device", default="cpu", help="for parts")
    parser.add_argument("--compile", action="store_true", help="also diffusers under torch.compile")
    args = parser.parse_args(argv)
    if args.runs is None:
        args.runs = 5 if args.what in ("parts", "ladder") else 9
    if args.compile and args.what != "parts":
        parser.error("--compile goes with parts")
    if args.runs < 1:
        parser.error(f"--runs is {args.runs}; allowed is 1 and more")
    if args.pixels is None and args.what in ("parts", "ladder"):
        args.pixels = 512
    args.device = arguments.device(args.device)
    return args


def in_turn(runs: int, timed: dict[str, Callable[[], Any]]) -> dict[str, list]:
    """What each gives, one after the other, again and again; the first round is not counted."""
    given = {name: [] for name in timed}
    for run in range(runs + 1):
        for name, once in timed.items():
            result = once()
            if run > 0:
                given[name].append(result)
    return given


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


def can_import(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", IMPORTS[name]], capture_output=True).returncode == 0


def measure_processes(runs: int, commands: dict[str, list[str]]) -> dict[str, dict[str, list[float]]]:
    measured = in_turn(runs, {name: process(*command) for name, command in commands.items()})
    named = {"seconds": 0, "gib": 1}
    return {what: {name: [run[i] for run in m] for name, m in measured.items()} for what, i in named.items()}


def measure_imports(args) -> dict[str, dict[str, list[float]]]:
    names = [name for name in IMPORTS if can_import(name)]
    return measure_processes(args.runs, {name: [sys.executable, "-c", IMPORTS[name]] for name in names})


def measure_start(args) -> dict[str, dict[str, list[float]]]:
    pipe = Kandinsky.from_pretrained(args.weights)
    pixels = str(args.pixels or pipe.unet_config.sample_size * pipe.movq_config.downscale)
    steps, dtype = [str(args.steps), str(args.prior_steps)], args.dtype
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, str(Path(__file__).parent / "text2img.py"), PROMPT, "--seed", "0"]
        ours += ["--weights", str(args.weights), "--height", pixels, "--width", pixels, "--dtype", dtype]
        ours += ["--steps", steps[0], "--prior-steps", steps[1], "--overwrite", "--out", f"{folder}/a.png"]
        commands = {"kandinsky": ours, "kandinsky, --low-memory": [*ours, "--low-memory"]}
        if can_import("diffusers"):
            given = [str(args.weights), str(pipe.need_prior()), PROMPT, pixels, *steps, dtype]
            commands["diffusers"] = [sys.executable, "-c", THEIR_SCRIPT, *given, f"{folder}/b.png"]
        return measure_processes(args.runs, commands)


def text_runs(args, config: Any) -> Runs:
    """A prompt of 12 tokens and the empty one; diffusers pads to 77 and calls twice."""
    end = config.vocab_size - 1
    ids = torch.full((2, 77), end)
    ids[0, 1:12] = torch.arange(11)
    ids[:, 0] = end - 1
    ids = ids.to(args.device)

    def theirs(tower: nn.Module) -> Tensor:
        return torch.cat([tower(row[None]).text_embeds for row in ids])

    return lambda tower: tower(ids[:, :13])[1], theirs, 1


def prior_runs(args, config: Any) -> Runs:
    """25 guided steps at one prompt; of diffusers' 25 equal steps one is run."""
    d, scheduler = config.embedding_dim, UnCLIPScheduler()
    mask = torch.arange(77, device=args.device)[None] < torch.tensor([[2], [12]], device=args.device)
    text = tuple(x.to(args.device) for x in (randn(2, d, seed=1), randn(2, 77, d, seed=2)))
    x, ts = randn(2, d).to(args.device), [t for t, _ in scheduler.timesteps(25)]

    def ours(prior: Prior) -> Tensor:
        cache = prior.prefill(*text, mask)
        return [prior.step(x, torch.full((2,), t, device=args.device), cache) for t in ts][0]

    def theirs(prior: nn.Module) -> Tensor:
        inputs = (x, torch.full((2,), ts[0], device=args.device), *text, mask)
        inputs = [i.to(prior.dtype) if i.is_floating_point() else i for i in inputs]
        return prior(*inputs).predicted_image_embedding

    return ours, theirs, 25


def unet_runs(args, config: Any) -> Runs:
    """One guided step. Ours reads what `prepare` made for the loop, which is timed apart."""
    f = random_weights.SIZES[args.size].movq.downscale
    x = randn(2, 4, args.pixels // f, args.pixels // f).to(args.device)
    image_embeds, plans = randn(2, config.embedding_dim, seed=1).to(args.device), {}

    def ours(unet: UNet) -> Tensor:
        if unet not in plans:
            plans[unet] = prepare(args, unet, 1)
        return unet.step(x, plans[unet], 0)

    def theirs(unet: nn.Module) -> Tensor:
        t, added = torch.tensor([681, 681], device=args.device), {"image_embeds": image_embeds.to(unet.dtype)}
        return unet(x.to(unet.dtype), t, encoder_hidden_states=None, added_cond_kwargs=added).sample

    return ours, theirs, 1


def prepare(args, unet: UNet, num_steps: int) -> Any:
    image_embeds = randn(2, unet.config.embedding_dim, seed=1).to(args.device)
    return unet.prepare(image_embeds, [681 - step for step in range(num_steps)])


def movq_runs(args, config: Any) -> Runs:
    z = randn(1, 4, args.pixels // config.downscale, args.pixels // config.downscale).to(args.device)
    theirs = lambda movq: movq.decode(z.to(movq.dtype), force_not_quantize=True).sample  # noqa: E731
    return lambda movq: movq.decode(z), theirs, 1


PARTS = {
    "text_encoder": (CLIPTextEncoder, text_runs),
    "prior": (Prior, prior_runs),
    "unet": (UNet, unet_runs),
    "movq": (MoVQ, movq_runs),
}


@torch.no_grad()
def measure_part(args, name: str) -> dict[str, Any]:
    """Seconds of diffusers, ours, and ours optimized, and how far each lies from diffusers in float32."""
    model, (ours, theirs, repeats) = random_part(args, name)
    exact = theirs(reference_for(model)).float()
    model = model.to(getattr(torch, args.dtype))
    reference, fast = reference_for(model), copy.deepcopy(model)
    optimize(fast)
    gc.collect()
    subjects = {"diffusers": (reference, theirs, repeats)}
    if args.compile:
        compiled = copy.copy(reference)
        compiled.forward = torch.compile(reference.forward)
        subjects["diffusers, compiled"] = (compiled, theirs, repeats)
    subjects |= {"ours": (model, ours, 1), "ours, optimized": (fast, ours, 1)}
    away = {key: distance(call(subject).float(), exact) for key, (subject, call, _) in subjects.items()}
    timed = {key: stopwatch(args, subject, call, times) for key, (subject, call, times) in subjects.items()}
    result = {"seconds": in_turn(args.runs, timed), "relative_l2": away}
    if name == "unet":
        ones = {"ours": model, "ours, optimized": fast}
        timed = {key: stopwatch(args, one, lambda u: prepare(args, u, 50), 1) for key, one in ones.items()}
        result["prepare"] = in_turn(args.runs, timed)
    return result


@torch.no_grad()
def measure_ladder(args, name: str) -> dict[str, Any]:
    """Seconds of a network with different rewrites, in turn, and how far each lies from the plain one."""
    model, (ours, _, _) = random_part(args, name)
    model = model.to(getattr(torch, args.dtype))
    exact, timed, away = ours(model).float(), {}, {}
    for rung, rewrites in rungs(model).items():

        def once(rewrites: tuple[str, ...] = rewrites) -> float:
            restore(model)
            optimize(model, rewrites)
            ours(model)
            return stopwatch(args, model, ours, 1)()

        timed[rung] = once
        restore(model)
        optimize(model, rewrites)
        away[rung] = distance(ours(model).float(), exact)
    return {"seconds": in_turn(args.runs, timed), "relative_l2": away}


def rungs(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Each rewrite that changes this network, alone, then all up to it. Winograd is of packed layers."""
    changed = [rewrite for rewrite, count in optimize(model, (*USUAL, *UNTRIED)).items() if count]
    restore(model)
    needed = {"winograd": ("packed weights", "winograd")}
    alone = {rewrite: needed.get(rewrite, (rewrite,)) for rewrite in changed}
    sums = {f"up to {changed[i]}": tuple(changed[: i + 1]) for i in range(1, len(changed))}
    return {"plain": ()} | alone | sums


def random_part(args, name: str) -> tuple[nn.Module, Runs]:
    network, make_runs = PARTS[name]
    config = getattr(random_weights.SIZES[args.size], name)
    with torch.device("meta"):
        model = network(config)
    model = random_weights.randomize(model.to_empty(device="cpu")).to(args.device)
    return model, make_runs(args, config)


def stopwatch(args, subject: nn.Module, call: Callable, times: int) -> Callable[[], float]:
    """Seconds of `times` equal calls, of which one is made."""

    def wait() -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)

    def once() -> float:
        wait()
        start = time.perf_counter()
        call(subject)
        wait()
        return times * (time.perf_counter() - start)

    return once


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
    print(f"\n{name}, {args.size}, {args.dtype}, {args.pixels} px, {args.device}")
    for line, away in zip(table(result["seconds"], base), result["relative_l2"].values()):
        print(f"{line}  {away:.1e} from {exact}", flush=True)


def whole_picture(parts: dict[str, Any], steps: int = 50) -> dict[str, list[float]]:
    """The sum of the parts' medians: text, 25 prior steps, what is prepared once, the U-Net's steps, MoVQ."""
    total = {}
    for name in parts["unet"]["seconds"]:
        medians = {part: statistics.median(result["seconds"][name]) for part, result in parts.items()}
        once = statistics.median(parts["unet"]["prepare"].get(name, [0.0]))
        total[name] = [sum(medians.values()) + (steps - 1) * medians["unet"] + once]
    return total


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.what in ("parts", "ladder"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        results = {}
        for name in args.parts:
            results[name] = (measure_part if args.what == "parts" else measure_ladder)(args, name)
            if not args.json:
                report_part(name, results[name], args)
        if args.what == "parts" and set(args.parts) == set(PARTS):
            results["whole picture"] = {"seconds": whole_picture(results)}
    else:
        base = "torch" if args.what == "import" else "diffusers"
        results = (measure_imports if args.what == "import" else measure_start)(args)
        base = base if base in results["seconds"] else "kandinsky"
        if not args.json:
            lines = [*table(results["seconds"], base), "", *table(results["gib"], base, "GiB")]
            print("\n".join(lines))
    if args.json:
        print(json.dumps(results))
    elif "whole picture" in results:
        print("\nwhole picture, 50 and 25 steps, the sum of the parts")
        print("\n".join(table(results["whole picture"]["seconds"], "diffusers")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
