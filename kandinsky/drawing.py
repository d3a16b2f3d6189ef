"""What the drawing scripts share: from flags, or a picture's settings, to a call, and from it to files."""

import itertools
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from kandinsky import arguments, cli, images, metadata
from kandinsky.pipeline import Kandinsky
from kandinsky.sampling import ImageEmbeds

# what a call's repetition may be given beside --from-png: where things lie, never what was drawn
_BESIDE_FROM_PNG = {"from_png", "image", "mask", "hint", "lora", "weights", "prior", "device", "low_memory"}
_BESIDE_FROM_PNG |= {"out", "overwrite", "no_metadata", "animation"}
_FLAGS = {"image": "--image", "mask_image": "--mask", "hint": "--hint", "lora": "--lora"}

Pictures = dict[str, list[Image.Image]]


class Job(NamedTuple):
    """How a script checks a call, and draws it."""

    # raises what is wrong with it, before weights are read
    check: Callable[[Kandinsky, dict[str, Any], Pictures], None]
    run: Callable[[Kandinsky, dict[str, Any], Pictures], list[Image.Image]]


class Batch(NamedTuple):
    """A part of a call, which is a call by itself."""

    prompts: slice
    images_per_prompt: int
    seeds: list[int]

    def of(self, items: list) -> list:
        """Of the call's prompts, or of its pictures of a kind, this batch's; one alone goes with all."""
        return items if len(items) == 1 else items[self.prompts]

    def pictures(self, whole: Pictures) -> Pictures:
        return {name: self.of(items) for name, items in whole.items()}

    def call(self, whole: dict[str, Any]) -> dict[str, Any]:
        """The whole call's arguments, for this batch."""
        prompts = whole["prompt"] and self.of(whole["prompt"])
        own = {"prompt": prompts, "num_images_per_prompt": self.images_per_prompt, "seed": self.seeds}
        return whole | own

    def settings(self, whole: dict[str, Any]) -> dict[str, Any]:
        """What `metadata.describe` tells of the whole call, for this batch."""
        inputs = {n: files if n == "lora" else self.of(files) for n, files in whole["inputs"].items()}
        return whole | {"call": self.call(whole["call"]), "inputs": inputs}


def batches(num_prompts: int, images_per_prompt: int, seeds: list[int], size: int) -> Iterator[Batch]:
    """A call's images, prompt by prompt, in batches of at most `size`, as equal as may be."""
    prompts_at_once = _even_share(num_prompts, max(1, size // images_per_prompt))
    images_at_once, left = _even_share(images_per_prompt, size), iter(seeds)
    for start in range(0, num_prompts, prompts_at_once):
        count = min(prompts_at_once, num_prompts - start)
        prompts = slice(None) if count == num_prompts else slice(start, start + count)
        for first in range(0, images_per_prompt, images_at_once):
            each = min(images_at_once, images_per_prompt - first)
            yield Batch(prompts, each, list(itertools.islice(left, count * each)))


def _even_share(count: int, most: int) -> int:
    """The size of as few groups as hold `count`, none above `most`: packed weights are for one size."""
    return -(-count // -(-count // most))


def parse(parser: cli.OneLineParser, task: str, argv: Sequence[str] | None) -> tuple[Namespace, dict | None]:
    """The flags, and the settings of --from-png where it is given."""
    args = parser.parse_args(argv)
    if args.from_png is None:
        cli.needs(parser, argv, "lora_scale", "lora")
        return args, None
    extra = sorted(cli.given(parser, argv) - _BESIDE_FROM_PNG)
    if extra:
        name = extra[0].replace("_", "-")
        parser.error(f"--from-png repeats a whole call; it takes no {name} beside it")
    settings = metadata.read(args.from_png)
    if settings["task"] != task:
        parser.error(f"{args.from_png} was made by {settings['task']}.py, which repeats it")
    args.dtype, args.lora_scale = settings["dtype"], settings["lora_scale"]
    args.optimize = settings["optimisation"] == "exact"
    if "device" not in cli.given(parser, argv):
        args.device = settings["device"]
        try:
            arguments.device(args.device)
        except ValueError as error:
            parser.error(f"{args.from_png}: {error}; another --device may be given, and bits may differ")
    return args, settings


def prompts(args: Namespace) -> list[str] | None:
    """From the command line or --prompts FILE; None where neither is given."""
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("give a prompt or --prompts FILE, not both")
    if args.prompts is None:
        return None if args.prompt is None else [args.prompt]
    if not args.prompts.is_file():
        raise ValueError(f"--prompts: no file {args.prompts}; a prompt by itself stands without a flag")
    if args.prompts.stat().st_size > 2**20:
        raise ValueError(f"{args.prompts} is larger than 1 MiB; a prompt a line is needed")
    try:
        lines = args.prompts.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{args.prompts} is not UTF-8 text; a prompt a line is needed") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{args.prompts} holds no prompt")
    return lines


def need_prompts(args: Namespace) -> list[str]:
    listed = prompts(args)
    if listed is None:
        raise ValueError("give a prompt, --prompts FILE or --from-png FILE; see --help")
    return listed


def call_of(args: Namespace) -> dict[str, Any]:
    """The arguments that every task has."""
    return {
        "negative_prompt": args.negative_prompt,
        "num_images_per_prompt": args.num_images,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.steps,
        "sampler": args.sampler,
        "guidance_interval": args.guidance_interval,
        "cache_every": args.cache_every,
        "prior_num_inference_steps": args.prior_steps,
        "prior_guidance_scale": args.prior_guidance_scale,
        "seed": args.seed,
        "height": args.height,
        "width": args.width,
    }


def job(task: str) -> Job:
    """Calls the pipeline's method; one picture goes with every prompt, several go one with each."""

    def check(pipe: Kandinsky, call: dict[str, Any], pictures: Pictures) -> None:
        pipe.check(task, **call, **pictures)

    def run(pipe: Kandinsky, call: dict[str, Any], pictures: Pictures) -> list[Image.Image]:
        return getattr(pipe, task)(**call, **pictures, progress=True)

    return Job(check, run)


def beside_embeds(pipe: Kandinsky, call: dict[str, Any]) -> dict[str, Any]:
    """The words that go with embeddings: none, but 2.1's decoder reads some itself."""
    return {"prompt": "", "negative_prompt": call["negative_prompt"]} if pipe.unet_config.text else {}


def any_embeds(pipe: Kandinsky, count: int, has_negative: bool = False) -> ImageEmbeds:
    """In the place of those to come, for `pipe.check`, before weights are read to make them."""
    rows = torch.zeros(count, pipe.unet_config.image_dim)
    return ImageEmbeds(rows, rows if has_negative else None)


def draw(task: str, call: dict[str, Any], args: Namespace, settings: dict | None, job: Job) -> None:
    """Opens the checkpoint, draws and writes batch by batch; prints a line for each picture.

    Args:
        call: the arguments, or with settings those of the picture to be made again.
    """
    images.check_writable(args.out)
    files = {"image": args.image, "mask_image": args.mask, "hint": args.hint, "lora": args.lora}
    files = {name: paths for name, paths in files.items() if paths}
    decoder = cli.decoder_folder(args.weights, cli.decoder_kind(task, "hint" in files))
    pictures = {name: [images.open_image(p) for p in files[name]] for name in files if name != "lora"}
    keep_loaded = not args.low_memory
    dtype = getattr(torch, args.dtype)
    pipe = Kandinsky.from_pretrained(decoder, args.prior, args.device, dtype, keep_loaded)
    if settings is not None:
        _compare(settings, pipe, files)
    whole = Batch(slice(None), call["num_images_per_prompt"], call["seed"])
    drawn = [whole] if settings is not None else _batches(task, call, pictures, args.batch_size)
    for batch in drawn if pictures else [whole]:  # pictures by batches, as what they are checked as is large
        job.check(pipe, batch.call(call), batch.pictures(pictures))
    for path in args.lora or []:
        pipe.load_lora(path, args.lora_scale)
    if args.optimize:
        pipe.optimize()
    with _threads(settings):
        described = None
        if images.check_suffix(args.out) == "PNG" and not args.no_metadata:
            # before it is drawn: files may be moved meanwhile
            described = metadata.describe(pipe, task, call, 0, files, args.lora_scale)
        names = iter(cli.numbered(args.out, 1 if settings else sum(len(batch.seeds) for batch in drawn)))
        for batch in drawn:
            made = dict(enumerate(job.run(pipe, batch.call(call), batch.pictures(pictures))))
            if settings is not None:
                made = {settings["index"]: made[settings["index"]]}
            _write(made, batch.seeds, described and batch.settings(described), names, args)


def _batches(task: str, call: dict[str, Any], pictures: Pictures, size: int) -> list[Batch]:
    """Draws the call's seeds, too."""
    lengths = {_FLAGS[name]: len(items) for name, items in pictures.items()}
    lengths |= {"prompts": len(call["prompt"])} if call["prompt"] else {}
    # a mixture's prompts and pictures are one thing to draw
    num_prompts = 1 if task == "mix" else arguments.batch(**lengths)
    images_per_prompt = arguments.whole(call["num_images_per_prompt"], "--num-images")
    seeds = arguments.seeds(call["seed"], num_prompts * images_per_prompt)
    return list(batches(num_prompts, images_per_prompt, seeds, size))


def write(
    name: Path, size: tuple[int, int], overwrite: bool, save: Callable[..., None], instead: str = ".png"
) -> Path:
    """Saves pictures of a size under a free name; returns it. What takes the place of a name whose format has
    no pictures so large overwrites nothing: nobody named it."""
    fitting = images.fitting_name(name, size, instead)
    overwrite = overwrite and fitting == name
    return cli.write_free(fitting, overwrite, partial(save, overwrite=overwrite))


def _write(
    pictures: dict[int, Image.Image],
    seeds: list[int],
    described: dict | None,
    names: Iterator[Path],
    args: Namespace,
) -> None:
    """Writes a call's pictures, by their numbers in it, and what makes them again."""
    problem = described and metadata.problem(described)
    if problem:
        warnings.warn(f"the picture cannot be made again from its PNG: {problem}", stacklevel=2)
    for number, picture in pictures.items():
        texts = None
        if described is not None:
            texts = metadata.texts(described | {"index": number}, picture.size)
            if problem:  # `parameters` alone is kept
                del texts[metadata.KEY]
        save = partial(images.save_image, picture, texts=texts)
        path = write(next(names), picture.size, args.overwrite, save)
        print(f"{path} (seed {seeds[number % len(seeds)]})")


def _compare(settings: dict, pipe: Kandinsky, files: dict[str, list[Path]]) -> None:
    """What was given again must be what the picture was made from."""
    needed, given = ({name: len(of) for name, of in all_of.items()} for all_of in (settings["inputs"], files))
    if needed != given:
        wanted = [f"{_FLAGS[n]} ({', '.join(f['name'] for f in fs)})" for n, fs in settings["inputs"].items()]
        if not wanted:
            extra = " and ".join(_FLAGS[name] for name in files)
            raise ValueError(f"the picture was made from no other file; leave {extra} out")
        raise ValueError(f"the picture was made from {' and '.join(wanted)}; give the same again")
    fixed = [settings[name] for name in ("task", "call", "index")]
    now = metadata.describe(pipe, *fixed, files, settings["lora_scale"])
    for half, was in settings["checkpoint"].items():
        found = now["checkpoint"][half]
        if was is not None and (found is None or found["hash"] != was["hash"]):
            there = "none" if found is None else f"{found['name']} ({found['hash'][:10]})"
            flag = "--weights" if half == "decoder" else "--prior"
            made = f"the picture was made with the {half} {was['name']} ({was['hash'][:10]}), found {there}"
            raise ValueError(f"{made}; pass its folder with {flag}")
    for name, was in settings["inputs"].items():
        if [f["sha256"] for f in was] != [f["sha256"] for f in now["inputs"][name]]:
            warnings.warn(f"{_FLAGS[name]} is another file than the picture was made from", stacklevel=2)
    for name in ("versions", "device"):
        if settings[name] != now[name]:
            warnings.warn(
                f"made with {name} {settings[name]}, now {now[name]}: bits may differ", stacklevel=2
            )


@contextmanager
def _threads(settings: dict | None) -> Iterator[None]:
    """Sums are split among threads, so their number changes the last bits."""
    before = torch.get_num_threads()
    try:
        if settings is not None:
            torch.set_num_threads(settings["threads"])
        yield
    finally:
        torch.set_num_threads(before)
