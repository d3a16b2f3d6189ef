"""Draws the README's pictures again, with the embedded checkpoint.

recipes  runs the section "Change it" as it is written
tasks    one picture for each task, beside what it was made from
"""

import os
import re
import sys
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from kandinsky import ImageEmbeds, Kandinsky, cli, images
from kandinsky.captions import caption
from kandinsky.shapes import depth_hint, random_scene

ROOT = Path(__file__).resolve().parents[1]
SCALE, MARGIN = 2, 4
PROMPT = "a red circle above a small blue square on a yellow background"
RECIPES = {  # by the name that a recipe gives its picture
    "picture": "as it is",
    "by_hand": "by hand",
    "without_attention": "no attention",
    "without_mid": "no mid block",
    "steered": "steered",
    "typical": "own prior",
    "churned": "own scheduler",
    "guided": "shared: hint",
    "painted": "shared: inpaint",
}


def parse_args(argv=None):
    parser = cli.OneLineParser(__doc__)
    parser.add_argument("what", choices=tuple(SHEETS), help="see above")
    parser.add_argument("--out", type=Path, help="picture to write; default: the README's, which is replaced")
    return parser.parse_args(argv)


def recipes() -> list[tuple[str, Image.Image]]:
    """What the recipes draw, by its label."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Change it") : readme.index("## Train")]
    scope = {}
    before = Path.cwd()
    os.chdir(ROOT)  # where its paths lead from
    try:
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            exec(block, scope)
    finally:
        os.chdir(before)
    return [(label, scope[name]) for name, label in RECIPES.items()]


def tasks() -> list[tuple[str, Image.Image]]:
    """What each task draws from a picture, and from a hole in it, a depth map or two prompts."""
    pipe, inpainter, hinted = map(
        open_embedded, ("mini-decoder", "mini-decoder-inpaint", "mini-controlnet-depth")
    )
    photo = pipe.text2img(PROMPT, seed=3)[0]
    hole = np.zeros((64, 64), np.float32)
    hole[:30, 32:] = 1
    shown = Image.fromarray(np.where(hole[..., None] > 0, 127, np.asarray(photo)).astype(np.uint8))
    scene = random_scene(0, 4)
    depth = Image.fromarray(depth_hint(scene, 64)).convert("RGB")
    ends = ["a large red circle on a white background", "a large red circle on a blue background"]
    mixed = pipe.mix(ends, [0.5, 0.5], seed=1)
    return [
        ("text2img", photo),
        ("img2img", pipe.img2img(PROMPT.replace("yellow", "pink"), photo, 0.7, seed=3)[0]),
        ("with a hole", shown),
        ("inpaint", inpainter.inpaint(PROMPT.replace("red circle", "green star"), photo, hole, seed=1)[0]),
        ("depth map", depth),
        ("hint", hinted.text2img(caption(scene, Random(0)), hint=depth, seed=0)[0]),
        ("variation", pipe.text2img(embeds=ImageEmbeds(pipe.embed_image(photo)), seed=5)[0]),
        ("mix", pipe.text2img(embeds=mixed, seed=1)[0]),
    ]


def open_embedded(name: str) -> Kandinsky:
    return Kandinsky.from_pretrained(cli.WEIGHTS / name)


def labelled(cells: list[tuple[str, Image.Image]]) -> Image.Image:
    """The pictures in a row, each enlarged above its label."""
    side = SCALE * cells[0][1].width
    sheet = Image.new("RGB", ((side + MARGIN) * len(cells), side + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, picture) in enumerate(cells):
        left = (side + MARGIN) * number
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, 0))
        draw.text((left, side + 2), label, fill="black")
    return sheet


SHEETS = {"recipes": recipes, "tasks": tasks}


@cli.one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    path = args.out or cli.WEIGHTS / f"mini-{args.what}.png"
    images.check_writable(path)
    images.save_image(labelled(SHEETS[args.what]()), path, overwrite=True)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
