"""Measures a checkpoint trained on shapes: are its pictures right, by the judge, and how good are its parts?

Captions and pictures are of a seed that no training uses. Pictures are drawn with the default settings, where
--steps, --sampler, --guidance-interval and --cache-every give no others.

--clip, --seen, --held-out, --true and --pictures are of text2img, --cases of inpaint and hint.

--task inpaint: one object of a picture is exchanged for another, by a mask around it and the new picture's
caption; right is a picture that shows every object asked for, and the ground where the caption says it.

--task hint: a caption, and the objects' depths; right likewise, size and place of all being the hint's.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from kandinsky import Kandinsky, cli
from kandinsky.captions import caption
from kandinsky.checkpoint import write_json
from kandinsky.clip_training import clip_normalize, load_image_encoder
from kandinsky.datasets import Samples, Shapes
from kandinsky.images import check_writable, save_image, to_pil
from kandinsky.judge import judge, shows
from kandinsky.movq_training import psnr
from kandinsky.sampling import ImageEmbeds
from kandinsky.shapes import Scene, depth_hint, hole_of, random_scene, render, with_another_object
from kandinsky.training import tile

SEED = 1_000_003  # of the shapes; training uses small ones


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("--task", choices=tuple(EVALUATE), default="text2img", help="see above")
    parser.add_argument("--weights", help="2.2 or a decoder folder; default: the task's embedded one")
    parser.add_argument(
        "--prior", type=Path, help="prior folder; default: the one that belongs to the decoder"
    )
    parser.add_argument(
        "--clip",
        type=Path,
        help="folder of the CLIP pair whose embeddings the decoder was trained on; default: the prior's",
    )
    parser.add_argument(
        "--seen", type=cli.whole(1), default=300, help="captions of colour-shape pairs seen in training"
    )
    parser.add_argument(
        "--held-out", type=cli.whole(1), default=100, help="captions with a pair never trained on"
    )
    parser.add_argument(
        "--true", type=cli.whole(0), default=100, help="of each, drawn from true embeddings too"
    )
    parser.add_argument(
        "--pictures", type=cli.whole(1), default=256, help="that MoVQ and prior are measured on"
    )
    parser.add_argument("--cases", type=cli.whole(1), default=200, help="pictures of inpaint or hint")
    parser.add_argument("--batch-size", type=cli.whole(1), default=50, help="pictures drawn at once")
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="of the noise")
    cli.add_sampler_flags(parser)
    cli.add_approximate_flags(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda …")
    parser.add_argument(
        "--out", type=Path, help=".json file for the figures; a grid of the first pictures goes beside it"
    )
    args = parser.parse_args(argv)
    if args.task == "text2img":
        cli.refuse(parser, argv, ("cases",), "--task inpaint and hint")
    else:
        cli.refuse(parser, argv, ("clip", "seen", "held_out", "true", "pictures"), "--task text2img")
    if args.out is not None:
        check_writable(args.out, {".json": "JSON"})
    args.weights = cli.decoder_folder(args.weights, args.task)
    return args


def draw(method: Callable, count: int, args, **given: list) -> list:
    """A picture for each of `count` rows of what is given."""
    pictures, settings = [], settings_of(args)
    for start in range(0, count, args.batch_size):
        rows = {name: values[start : start + args.batch_size] for name, values in given.items()}
        pictures += method(**rows, **settings, seed=args.seed + start)
        print(f"{len(pictures)} of {count} drawn", file=sys.stderr)
    return pictures


def settings_of(args) -> dict:
    settings = {"num_inference_steps": args.steps, "sampler": args.sampler}
    return settings | {"guidance_interval": args.guidance_interval, "cache_every": args.cache_every}


def from_embeds(pipe: Kandinsky) -> Callable:
    return lambda image_embeds, **settings: pipe.text2img(embeds=ImageEmbeds(image_embeds), **settings)


def score(pictures: list, samples: Samples) -> dict[str, float]:
    """The share of pictures that are all right, in all and by number of objects, and of each aspect."""
    right, total, aspects = Counter(), Counter(), Counter()
    for picture, text, scene in zip(pictures, samples.captions, samples.scenes):
        verdict, count = judge(picture, text), len(scene.objects)
        for group in ("all", f"{count} object{'s' * (count > 1)}"):
            right[group] += verdict.right
            total[group] += 1
        for name in verdict.__dataclass_fields__:
            aspects[name] += getattr(verdict, name)
    shares = {group: round(right[group] / total[group], 4) for group in sorted(total)}
    counts = {f"{group}, number": total[group] for group in sorted(total)}
    return shares | counts | {f"{name} right": round(n / total["all"], 4) for name, n in aspects.items()}


@torch.no_grad()
def measure_parts(pipe: Kandinsky, image_encoder: nn.Module, samples: Samples) -> dict[str, float]:
    """MoVQ's reconstruction, and how near the prior comes to the embeddings of its captions' pictures."""
    pixels = samples.pixels.to(pipe.device)
    restored = pipe.movq.decode(pipe.movq.encode(pixels))
    true = image_encoder(clip_normalize(pixels, image_encoder.config.image_size))
    tower = pipe.image_encoder(clip_normalize(pixels, image_encoder.config.image_size))
    drawn = pipe.embed(samples.captions, seed=0).image_embeds
    mean = true.mean(dim=0)  # cosines of raw embeddings would flatter: all share this part

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return round(F.cosine_similarity(a - mean, b - mean).mean().item(), 4)

    return {
        "movq psnr": round(psnr(restored, pixels), 2),
        "prior cosine to its caption's picture": cosine(drawn, true),
        "prior cosine to another caption's picture": cosine(drawn, true.roll(1, dims=0)),
        "image tower cosine to what the decoder was trained on": cosine(tower, true),
    }


def full_rows(pictures: list) -> list:
    """White ones more, up to the next dozen."""
    return pictures + [np.full_like(np.array(pictures[0]), 255)] * (-len(pictures) % 12)


def grid_of(pictures: list) -> Image.Image:
    """Twelve in a row."""
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])
    return to_pil(tile(pixels.unflatten(0, (-1, 12)))[None])[0]


def evaluate_text(pipe: Kandinsky, size: int, args) -> tuple[dict, list]:
    """The figures, and pictures for a grid."""
    image_encoder = load_image_encoder(args.clip or pipe.need_prior()).to(pipe.device)
    sets = {
        "seen": (Shapes(SEED, size), args.seen),
        "held out": (Shapes(SEED, size, "held_out"), args.held_out),
    }
    results, rows = {}, []
    for name, (data, count) in sets.items():
        samples = data.load(list(range(count)))
        pictures = draw(pipe.text2img, count, args, prompt=samples.captions)
        results[name] = score(pictures, samples)
        rows += full_rows(pictures[:24])
        if args.true:
            first = data.load(list(range(min(count, args.true))))
            with torch.no_grad():
                pixels = clip_normalize(first.pixels.to(pipe.device), image_encoder.config.image_size)
                embeds = image_encoder(pixels)
            drawn = draw(from_embeds(pipe), len(embeds), args, image_embeds=embeds)
            results[f"{name}, from true embeddings"] = score(drawn, first)
    results["parts"] = measure_parts(pipe, image_encoder, Shapes(SEED, size).load(list(range(args.pictures))))
    return results, rows


def evaluate_inpaint(pipe: Kandinsky, size: int, args) -> tuple[dict, list]:
    scenes, captions, given, boxes = [], [], [], []
    for index in range(args.cases):
        rng, before = Random(f"{SEED} {index} inpaint"), random_scene(SEED, index)
        scene, changed = with_another_object(before, rng)
        scenes.append(scene)
        captions.append(caption(scene, rng))
        given.append(render(before, size))
        boxes.append(hole_of(before, scene, changed, size))
    masks = [box.astype(np.float32) for box in boxes]
    pictures = draw(pipe.inpaint, args.cases, args, prompt=captions, image=given, mask_image=masks)
    kept = [np.array_equal(np.array(p)[~box], x[~box]) for p, x, box in zip(pictures, given, boxes)]
    untouched = sum(kept) / args.cases
    shown = [np.where(box[..., None], 127, x).astype(np.uint8) for x, box in zip(given, boxes)]
    return score_tasks(pictures, captions, scenes) | {"rest untouched": untouched}, pairs(shown, pictures)


def evaluate_hint(pipe: Kandinsky, size: int, args) -> tuple[dict, list]:
    scenes = [random_scene(SEED, index) for index in range(args.cases)]
    captions = [caption(scene, Random(f"{SEED} {index} hint")) for index, scene in enumerate(scenes)]
    hints = [np.repeat(depth_hint(scene, size)[..., None], 3, axis=2) for scene in scenes]
    pictures = draw(pipe.text2img, args.cases, args, prompt=captions, hint=hints)
    return score_tasks(pictures, captions, scenes), pairs(hints, pictures)


def score_tasks(pictures: list, captions: list[str], scenes: list[Scene]) -> dict[str, float]:
    """Right: all that the caption says, and colour, shape, size and place of every object. Beside it, "as
    captioned": all that the caption says."""
    right, said, total = Counter(), Counter(), Counter()
    for picture, text, scene in zip(pictures, captions, scenes):
        count, as_said = len(scene.objects), judge(picture, text).right
        for group in ("all", f"{count} object{'s' * (count > 1)}"):
            right[group] += as_said and shows(picture, scene)
            said[group] += as_said
            total[group] += 1
    shares = {group: round(right[group] / total[group], 4) for group in sorted(total)}
    shares |= {f"{group}, as captioned": round(said[group] / total[group], 4) for group in total}
    return shares | {f"{group}, number": total[group] for group in sorted(total)}


def pairs(given: list, pictures: list) -> list:
    """What was given and what was drawn, side by side, 24 pictures at most."""
    return full_rows([x for pair in zip(given[:12], pictures[:12]) for x in pair])


EVALUATE = {"text2img": evaluate_text, "inpaint": evaluate_inpaint, "hint": evaluate_hint}


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    pipe = Kandinsky.from_pretrained(args.weights, args.prior, args.device)
    size = pipe.unet_config.sample_size * pipe.movq_config.downscale
    results, rows = EVALUATE[args.task](pipe, size, args)
    results["settings"] = settings_of(args)
    print(json.dumps(results, indent=2))
    if args.out is not None:
        write_json(results, args.out)
        save_image(grid_of(rows), args.out.with_suffix(".png"), overwrite=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
