"""Measures a checkpoint trained on shapes: are its pictures right, by the judge, and how good are its parts?

Captions and pictures are of a seed that no training uses. Pictures are drawn with the default settings.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from kandinsky import Kandinsky, cli
from kandinsky.checkpoint import write_json
from kandinsky.clip_training import clip_normalize, load_image_encoder
from kandinsky.datasets import Samples, Shapes
from kandinsky.images import save_image, to_pil
from kandinsky.judge import judge
from kandinsky.movq_training import psnr
from kandinsky.sampling import ImageEmbeds
from kandinsky.training import tile

SEED = 1_000_003  # of the shapes; training uses small ones


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("--weights", type=Path, default=cli.WEIGHTS / "mini-decoder", help="decoder folder")
    parser.add_argument(
        "--prior", type=Path, help="prior folder; default: the one that belongs to the decoder"
    )
    parser.add_argument(
        "--clip", type=Path, help="folder that the decoder's embeddings came from; default: the prior's"
    )
    parser.add_argument(
        "--seen", type=int, default=300, help="captions of colour-shape pairs seen in training"
    )
    parser.add_argument("--held-out", type=int, default=100, help="captions with a pair never trained on")
    parser.add_argument("--true", type=int, default=100, help="of each, drawn from true embeddings too")
    parser.add_argument("--pictures", type=int, default=256, help="that MoVQ and prior are measured on")
    parser.add_argument("--batch-size", type=int, default=50, help="pictures drawn at once")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="cpu", help="cpu, cuda …")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the grid goes beside it")
    return parser.parse_args(argv)


def draw(pipe: Kandinsky, captions: list[str], args, embeds: torch.Tensor | None = None) -> list:
    """One picture for each caption, or for each image embedding."""
    pictures = []
    for start in range(0, len(captions), args.batch_size):
        rows = slice(start, start + args.batch_size)
        given = {"prompt": captions[rows]} if embeds is None else {"embeds": ImageEmbeds(embeds[rows])}
        pictures += pipe.text2img(**given, seed=args.seed + start)
        print(f"{len(pictures)} of {len(captions)} drawn", file=sys.stderr)
    return pictures


def score(pictures: list, samples: Samples) -> dict[str, float]:
    """The share of pictures that are all right, in all and by number of objects, and of each aspect."""
    right, total, aspects = Counter(), Counter(), Counter()
    for picture, caption, scene in zip(pictures, samples.captions, samples.scenes):
        verdict, count = judge(picture, caption), len(scene.objects)
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


def grid_of(pictures: list) -> Image.Image:
    """Twelve in a row."""
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])
    return to_pil(tile(pixels.unflatten(0, (-1, 12)))[None])[0]


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    pipe = Kandinsky.from_pretrained(args.weights, args.prior, args.device)
    image_encoder = load_image_encoder(args.clip or pipe.need_prior())
    size = pipe.unet_config.sample_size * pipe.movq_config.downscale
    sets = {
        "seen": (Shapes(SEED, size), args.seen),
        "held out": (Shapes(SEED, size, "held_out"), args.held_out),
    }
    results, rows = {}, []
    for name, (data, count) in sets.items():
        samples = data.load(list(range(count)))
        pictures = draw(pipe, samples.captions, args)
        results[name] = score(pictures, samples)
        rows += pictures[: 24 if count >= 24 else 0]
        if args.true:
            first = data.load(list(range(min(count, args.true))))
            with torch.no_grad():
                embeds = image_encoder(clip_normalize(first.pixels, size))
            drawn = draw(pipe, first.captions, args, embeds)
            results[f"{name}, from true embeddings"] = score(drawn, first)
    results["parts"] = measure_parts(pipe, image_encoder, Shapes(SEED, size).load(list(range(args.pictures))))
    print(json.dumps(results, indent=2))
    if args.out is not None:
        write_json(results, args.out)
        if rows:
            save_image(grid_of(rows), args.out.with_suffix(".png"), overwrite=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
