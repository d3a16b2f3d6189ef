"""What `benchmark.py` times of single networks: ours, plain and optimized, in turn with diffusers'."""

import gc
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import roofline
import torch
from reference import distance, randn, reference_for, share
from torch import Tensor, nn
from torch.autograd import DeviceType

from kandinsky import MoVQ, Prior, UNet, random_weights
from kandinsky.checkpoint import open_safetensors, write_safetensors
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder
from kandinsky.optimize import optimize, restore
from kandinsky.schedulers import UnCLIPScheduler

Runs = tuple[Callable, Callable, int]  # of ours, of theirs, how often theirs is needed for one of ours
Result = dict[str, Any]


def in_turn(runs: int, timed: dict[str, Callable[[], Any]], warm_up: int = 1) -> dict[str, list]:
    """What each gives, one after the other, again and again; the first rounds, `warm_up`, are not counted."""
    given = {name: [] for name in timed}
    for run in range(runs + warm_up):
        for name, once in timed.items():
            result = once()
            if run >= warm_up:
                given[name].append(result)
    return given


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


def zero_image_runs(args, config: Any) -> Runs:
    """What stands for no prompt: diffusers runs the image tower on zeros, ours reads the stored vector."""
    pixels = torch.zeros(1, 3, config.image_size, config.image_size, device=args.device)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "zero_image_embeds.safetensors"

    def ours(tower: nn.Module, folder: Any = folder) -> Tensor:
        if not path.exists():
            write_safetensors({"zero_image_embeds": tower(pixels).cpu()}, path)
        return open_safetensors(path).get_tensor("zero_image_embeds").to(args.device)

    return ours, lambda tower: tower(pixels.to(tower.dtype)).image_embeds, 1


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
    x = randn(2, 4, args.side // f, args.side // f).to(args.device)
    image_embeds, plans = randn(2, config.embedding_dim, seed=1).to(args.device), {}

    def ours(unet: UNet) -> Tensor:
        which = unet, getattr(unet, "rewrites", ())  # an optimized one may lay its plan out otherwise
        if which not in plans:
            plans[which] = prepare(args, unet, 1)
        return unet.step(x, plans[which], 0)

    def theirs(unet: nn.Module) -> Tensor:
        t, added = torch.tensor([681, 681], device=args.device), {"image_embeds": image_embeds.to(unet.dtype)}
        return unet(x.to(unet.dtype), t, encoder_hidden_states=None, added_cond_kwargs=added).sample

    return ours, theirs, 1


def prepare(args, unet: UNet, num_steps: int) -> Any:
    image_embeds = randn(2, unet.config.embedding_dim, seed=1).to(args.device)
    return unet.prepare(image_embeds, [681 - step for step in range(num_steps)])


def movq_runs(args, config: Any) -> Runs:
    z = randn(1, 4, args.side // config.downscale, args.side // config.downscale).to(args.device)
    theirs = lambda movq: movq.decode(z.to(movq.dtype), force_not_quantize=True).sample  # noqa: E731
    return lambda movq: movq.decode(z), theirs, 1


PARTS = {
    "text_encoder": (CLIPTextEncoder, text_runs),
    "zero_image": (CLIPImageEncoder, zero_image_runs),
    "prior": (Prior, prior_runs),
    "unet": (UNet, unet_runs),
    "movq": (MoVQ, movq_runs),
}
FIELDS = {"zero_image": "image_encoder"}  # of `random_weights.Size`, where they have another name
KERNELS = 20  # that are listed
CALLS_ON_A_GPU = 10  # calls between two moments at which the device is waited for: as in a loop
FASTEST = "cuDNN's fastest"
SIZED = ("unet", "movq")


def each_part(args, measure: Callable[[Any, str], Result]) -> Iterator[tuple[str, Result]]:
    """The parts asked for, those that depend on it at each size of picture."""
    for name in args.parts:
        for args.side in args.pixels if name in SIZED else args.pixels[:1]:
            several = name in SIZED and len(args.pixels) > 1
            yield (f"{name} {args.side}" if several else name), measure(args, name)
            gc.collect()


def subjects_of(args, name: str, model: nn.Module, runs: Runs) -> dict[str, tuple[nn.Module, Callable, int]]:
    """What is measured: a network, how it is called, and how often that is needed for one call of ours."""
    ours, theirs, repeats = runs
    subjects = {"diffusers": (reference_for(model), theirs, repeats)}
    if args.compile in ("both", "diffusers"):
        compiled = reference_for(model)
        (compiled.decoder if name == "movq" else compiled).compile()
        subjects["diffusers, compiled"] = (compiled, theirs, repeats)
    subjects["ours"] = (model, ours, 1)
    if name != "zero_image":  # a vector is read
        subjects |= {key: (changed, ours, 1) for key, changed in optimized(args, model).items()}
    return subjects


@torch.no_grad()
def measure_part(args, name: str) -> Result:
    """Seconds of diffusers, ours, and ours optimized, how far each lies from diffusers in float32, and the
    floor of the work that ours does."""
    model, runs = random_part(args, name)
    ours, theirs = runs[:2]
    exact = theirs(reference_for(model)).float()
    subjects = subjects_of(args, name, model.to(getattr(torch, args.dtype)), runs)
    gc.collect()

    def away_from_exact(key: str) -> float:
        subject, call, _ = subjects[key]
        return distance(call(subject).float(), exact)

    with roofline.Work() as work:
        away = {"ours": away_from_exact("ours")}
    away = {key: away[key] if key in away else away_from_exact(key) for key in subjects}
    calls = calls_at_once(args)
    timed = {key: stopwatch(args, subject, call, n, calls) for key, (subject, call, n) in subjects.items()}
    # warm from the call before, but for a graph, which is captured at the second
    seconds = in_turn(args.runs, timed, warm_up=1 if args.device.type == "cuda" else 0)
    result = {"seconds": seconds, "relative_l2": away}
    rates = roofline.machine(args.device, getattr(torch, args.dtype))
    floor = 0.0 if name == "zero_image" else work.seconds(*rates.values())  # it is computed once, then read
    result |= {"floor": floor, **rates}
    if name == "unet":
        timed = {
            key: stopwatch(args, subject, lambda u: prepare(args, u, 50), 1)
            for key, (subject, call, _) in subjects.items()
            if call is ours
        }
        result["prepare"] = in_turn(args.runs, timed)
    return result


def optimized(args, model: nn.Module) -> dict[str, nn.Module]:
    """Copies, rewritten in the ways that are worth a row."""
    ways = {"ours, optimized": {}}
    if args.compile in ("both", "ours"):
        ways["ours, compiled"] = {"compile": True}
    copies = {key: twin(model) for key in ways}
    for key, way in ways.items():
        optimize(copies[key], **way)
    return copies


def twin(model: nn.Module) -> nn.Module:
    """Another network with the same tensors."""
    with torch.device("meta"):
        other = type(model)(model.config)
    return share(other, model).eval()


@torch.no_grad()
def measure_ladder(args, name: str) -> Result:
    """Seconds of a network with different rewrites, in turn, and how far each lies from the plain one."""
    model, (ours, _, _) = random_part(args, name)
    model = model.to(getattr(torch, args.dtype))
    exact, timed, away = ours(model).float(), {}, {}
    on_gpu = args.device.type == "cuda"
    for rung, rewrites in rungs(model, on_gpu).items():

        def once(rung: str = rung, rewrites: tuple[str, ...] = rewrites) -> float:
            restore(model)
            optimize(model, rewrites)
            with choosing(FASTEST in rung):
                for _ in range(2 if on_gpu else 1):  # MoVQ's graph is captured at the second
                    ours(model)
                return stopwatch(args, model, ours, 1, calls_at_once(args))()

        timed[rung] = once
        restore(model)
        optimize(model, rewrites)
        with choosing(FASTEST in rung):
            away[rung] = distance(ours(model).float(), exact)
    return {"seconds": in_turn(args.runs, timed), "relative_l2": away}


@contextmanager
def choosing(fastest: bool) -> Iterator[None]:
    """Whether cuDNN tries its convolutions out, or goes by its rules."""
    torch.backends.cudnn.benchmark = fastest
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


def rungs(model: nn.Module, on_gpu: bool = False) -> dict[str, tuple[str, ...]]:
    """Each rewrite that changes this network, alone, then all up to it; on a GPU all of them with cuDNN's
    fastest convolutions, too. Winograd is of packed layers."""
    changed = [rewrite for rewrite, count in optimize(model).items() if count]
    restore(model)
    needed = {"winograd": ("packed weights", "winograd")}
    alone = {rewrite: needed.get(rewrite, (rewrite,)) for rewrite in changed}
    sums = {f"up to {changed[i]}": tuple(changed[: i + 1]) for i in range(1, len(changed))}
    chosen = {f"all, {FASTEST}": tuple(changed)} if on_gpu else {}
    return {"plain": ()} | alone | sums | chosen


@torch.no_grad()
def measure_kernels(args, name: str) -> Result:
    """Milliseconds of one call of ours with every rewrite (of the prior: a whole loop): by the clock, as one
    of several that follow each other, of all its kernels, of the longest and how many of a kind there are.
    What the kernels do not explain, the GPU waits for."""
    model, (ours, _, _) = random_part(args, name)
    model = model.to(getattr(torch, args.dtype))
    optimize(model)
    timed = {"clock": stopwatch(args, model, ours, 1)}
    timed["in a row"] = stopwatch(args, model, ours, 1, calls_at_once(args))
    seconds = in_turn(args.runs, timed, warm_up=2)  # MoVQ's graph is captured at the second
    with torch.profiler.profile() as profile:
        ours(model)
        roofline.synchronize(args.device)
    on_gpu = args.device.type == "cuda"
    events = [e for e in profile.key_averages() if not on_gpu or e.device_type == DeviceType.CUDA]
    result = {key: round(1e3 * statistics.median(taken), 3) for key, taken in seconds.items()}
    if not events:
        return result | {"error": "the profiler saw no kernel"}
    spent, counts = Counter(), Counter()
    for event in events:
        kernel, micros = shortened(event.key), event.self_device_time_total
        spent[kernel] += (micros if on_gpu else event.self_cpu_time_total) / 1e3
        counts[kernel] += event.count
    return result | {
        "all kernels": round(spent.total(), 3),
        "number of kernels": counts.total(),
        "kernels": {k: [round(time_of, 3), counts[k]] for k, time_of in spent.most_common(KERNELS)},
    }


def shortened(kernel: str) -> str:
    """A kernel's name without what PyTorch's all begin with; what they do stands behind it."""
    return re.sub(r"void |at::native::|\(anonymous namespace\)::", "", kernel)[:200]


def random_part(args, name: str) -> tuple[nn.Module, Runs]:
    network, make_runs = PARTS[name]
    config = getattr(random_weights.SIZES[args.size], FIELDS.get(name, name))
    with torch.device("meta"):
        model = network(config)
    return randomize_there(model.to_empty(device=args.device)), make_runs(args, config)


def randomize_there(model: nn.Module) -> nn.Module:
    """As `random_weights.randomize`, but drawn where the network lies: a GPU takes no time for it."""
    generator = torch.Generator(model.device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        mean, std = random_weights.scale(name, tuple(tensor.shape))
        tensor.normal_(mean, std, generator=generator)
    return model.eval()


def stopwatch(args, subject: Any, call: Callable, times: int, calls: int = 1) -> Callable[[], float]:
    """Seconds of `times` equal calls, by the mean of so many `calls`."""

    def once() -> float:
        roofline.synchronize(args.device)
        start = time.perf_counter()
        for _ in range(calls):
            call(subject)
        roofline.synchronize(args.device)
        return times * (time.perf_counter() - start) / calls

    return once


def calls_at_once(args) -> int:
    """How many follow each other before the device is waited for."""
    return CALLS_ON_A_GPU if args.device.type == "cuda" else 1


def whole_picture(parts: dict[str, Any], steps: int = 50) -> dict[str, list[float]]:
    """The sum of the parts' medians: text, zero image, 25 prior steps, what is prepared once, the U-Net's
    steps, MoVQ."""
    total = {}
    for name in parts["unet"]["seconds"]:
        medians = {
            part: statistics.median(result["seconds"].get(name, result["seconds"]["ours"]))
            for part, result in parts.items()
        }
        once = statistics.median(parts["unet"]["prepare"].get(name, [0.0]))
        total[name] = [sum(medians.values()) + (steps - 1) * medians["unet"] + once]
    return total


@torch.no_grad()
def measure_convolutions(args) -> Iterator[tuple[str, dict[str, float]]]:
    """TFLOP/s of the U-Net's 3×3 convolutions at 512 and 1024 px, of two pictures, in both orders of a map,
    as cuDNN does them by its rules and as the fastest that it finds."""
    widths = random_weights.SIZES[args.size].unet.block_out_channels
    sides = [(width, px // 8 // 2**i) for px in (512, 1024) for i, width in enumerate(widths)]
    for width, side in sides:
        rates = {}
        for order, chosen in product((torch.contiguous_format, torch.channels_last), (False, True)):
            like = {"dtype": getattr(torch, args.dtype), "device": args.device}
            x = torch.randn(2, width, side, side, **like).to(memory_format=order)
            weight = torch.randn(width, width, 3, 3, **like).to(memory_format=order)
            with choosing(chosen):
                call = lambda: nn.functional.conv2d(x, weight, padding=1)  # noqa: E731
                seconds = roofline.fastest(call, args.device, calls=calls_at_once(args))
            kind = str(order).removeprefix("torch.") + f", {FASTEST}" * chosen
            rates[kind] = round(2 * 9 * x.numel() * width / seconds / 1e12, 2)
        yield f"convolution {width} at {side}", rates
