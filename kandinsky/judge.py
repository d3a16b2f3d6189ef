"""The judge: does a picture show what a caption says? Decided from pixels alone, the same every time.

    picture ─ 64 px ─ regions unlike the ground → colour, shape, size and place of each → Scene ┐
                                                                caption ─ parse → Claim ─ compare → Verdict

It judges what a small model painted, so it reads soft edges by area: a region's area and centroid, which blur
and noise leave alone, give every shape the radius and position that it would have, and the one that then
covers the region best is the shape. A region that none covers well has no shape.
"""

from dataclasses import astuple, dataclass, replace
from itertools import permutations
from random import Random

import numpy as np
from PIL import Image

from kandinsky.captions import Claim, ObjectClaim, describe, offset, parse, say
from kandinsky.shapes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    OBJECT_COLORS,
    PLACES,
    RADII,
    SHAPES,
    Object,
    Scene,
    coverage,
    geometry,
)

SIDE = 64
LEAST_CONTRAST = 30  # levels from the ground, over the three channels: five times noise of 6
LEAST_AREA = 16  # pixels of 64 × 64; the smallest object has 80
MOST_MISFIT = 0.35  # of the region's area; small stars after JPEG reach it
LEAST_OFFSET = 0.08  # of the picture's side, for a relation; said are those above 0.15


@dataclass(frozen=True)
class Verdict:
    """Which parts of a claim hold. `objects`: there are as many as claimed. What is left unsaid holds."""

    objects: bool
    colour: bool
    shape: bool
    size: bool
    place: bool
    relation: bool
    background: bool

    @property
    def right(self) -> bool:
        return all(astuple(self))


def judge(picture: Image.Image | np.ndarray, caption: str) -> Verdict:
    """picture: PIL or uint8 (h, w, 3), square, of any size. Raises ValueError for another array, and for a
    caption that `parse` cannot read."""
    return compare(parse(caption), see(picture))


def compare(claim: Claim, scene: Scene) -> Verdict:
    """Whether a scene shows what is claimed, its objects matched so that most of the claim holds."""
    background = claim.background in (None, scene.background)
    if len(claim.objects) > len(scene.objects):
        return Verdict(False, False, False, False, False, False, background)
    facts = (_facts(claim, objects) for objects in permutations(scene.objects, len(claim.objects)))
    best = max(facts, key=lambda columns: sum(map(sum, columns)))
    return Verdict(len(claim.objects) == len(scene.objects), *map(all, best), background)


def shows(picture: Image.Image | np.ndarray, scene: Scene, ground: bool = False) -> bool:
    """Whether a picture shows every object of a scene: colour, shape, size and place; and its ground."""
    claims = [ObjectClaim(item.shape, item.color, item.size, item.place) for item in scene.objects]
    seen = see(picture)
    claim = Claim(tuple(claims), (), scene.background if ground else None)
    # noise falls into dozens of regions, which compare would match in all ways
    return len(seen.objects) == len(claims) and compare(claim, seen).right


def _facts(claim: Claim, objects: tuple[Object, ...]) -> list[list[bool]]:
    pairs = list(zip(claim.objects, objects))
    return [
        [said.color == seen.color for said, seen in pairs],
        [said.shape == seen.shape for said, seen in pairs],
        [said.size in (None, seen.size) for said, seen in pairs],
        [said.place in (None, seen.place) for said, seen in pairs],
        [offset(objects[i], relation, objects[j])[0] > LEAST_OFFSET for i, relation, j in claim.relations],
    ]


def hard_negative(scene: Scene, rng: Random) -> str:
    """A caption that is wrong in one respect: colours, shapes or places of two objects exchanged, a relation
    reversed, or one word changed. It names a held-out pair only where the scene has one: seen as a negative
    alone, such a pair would seem never to occur."""
    has_held_out = any((item.color, item.shape) in HELD_OUT for item in scene.objects)
    while True:
        claim = _with_one_change(describe(scene, rng), rng)
        pairs = {(item.color, item.shape) for item in claim.objects}
        usual = len(pairs) == len(claim.objects) and all(color != claim.background for color, _ in pairs)
        if usual and (has_held_out or not pairs & HELD_OUT) and not compare(claim, scene).right:
            return say(claim, rng)


def _with_one_change(claim: Claim, rng: Random) -> Claim:
    """The claim itself where the change drawn is of something it does not say."""
    values = {"color": OBJECT_COLORS, "shape": tuple(SHAPES), "size": tuple(RADII), "place": PLACES}
    changes = [*values, "background", "relation"]
    if len(claim.objects) > 1:
        changes += ["exchange color", "exchange shape", "exchange place"] * 2
    exchange, _, name = rng.choice(changes).rpartition("exchange ")
    objects = list(claim.objects)
    if name == "background":
        return replace(claim, background=claim.background and rng.choice(BACKGROUNDS))
    if name == "relation":
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return replace(
            claim, relations=tuple((i, opposite[relation], j) for i, relation, j in claim.relations)
        )
    first, *others = rng.sample(range(len(objects)), 2 if exchange else 1)
    before = getattr(objects[first], name)
    after = getattr(objects[others[0]], name) if others else rng.choice(values[name])
    if before is None or after is None:
        return claim
    for index, value in zip([first, *others], (after, before)):
        objects[index] = replace(objects[index], **{name: value})
    return replace(claim, objects=tuple(objects))


def see(picture: Image.Image | np.ndarray) -> Scene:
    """The scene in a picture. An object that looks like no shape has shape ""."""
    pixels = _as_pixels(picture)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(frame, axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=2)
    objects = [_recognise(pixels, ground, region) for region in _find_regions(contrast)]
    return Scene(_nearest_color(ground), _as_rgb(ground), tuple(objects))


def _as_pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    """float32 (64, 64, 3)"""
    if not isinstance(picture, Image.Image):
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                f"the picture must be PIL or uint8 (h, w, 3), not {picture.dtype} {picture.shape}"
            )
        picture = Image.fromarray(picture)
    if picture.width != picture.height:
        raise ValueError(f"the picture must be square, not {picture.width} × {picture.height}")
    picture = picture.convert("RGB")
    if picture.width != SIDE:
        picture = picture.resize(
            (SIDE, SIDE), Image.Resampling.BOX if picture.width > SIDE else Image.Resampling.BICUBIC
        )
    return np.asarray(picture, np.float32)


def _find_regions(contrast: np.ndarray) -> list[np.ndarray]:
    """Boolean (h, w) masks of what stands out, each cut at half its own contrast: that parts objects whose
    soft edges touch."""
    regions = []
    for region in _connected(contrast > LEAST_CONTRAST):
        half = np.quantile(contrast[region], 0.8) / 2
        regions += _connected(region & (contrast > half))
    return regions


def _connected(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected parts of a mask, without specks."""
    height, width = mask.shape
    width += 1  # a column of False: no pixel neighbours the next row's end
    padded = np.zeros((height, width), bool)
    padded[:, :-1] = mask
    left = set(np.flatnonzero(padded).tolist())
    steps = (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1)
    parts = []
    while left:
        part = [left.pop()]
        for at in part:  # grows while it is walked
            for step in steps:
                if at + step in left:
                    left.remove(at + step)
                    part.append(at + step)
        if len(part) >= LEAST_AREA:
            found = np.zeros(height * width, bool)
            found[part] = True
            parts.append(found.reshape(height, width)[:, :-1])
    return sorted(parts, key=lambda part: int(part.argmax()))  # a set has no order to rely on


def _recognise(pixels: np.ndarray, ground: np.ndarray, region: np.ndarray) -> Object:
    contrast = np.linalg.norm(pixels[region] - ground, axis=1)
    rgb = np.median(
        pixels[region][contrast >= np.quantile(contrast, 0.6)], axis=0
    )  # the inside, not the soft edge
    direction = rgb - ground
    alpha = np.clip((pixels - ground) @ direction / (direction @ direction), 0, 1) * _grown(region)
    misfit, shape, x, y, radius = min(_fit(shape, alpha) for shape in SHAPES)
    return Object(shape if misfit < MOST_MISFIT else "", _nearest_color(rgb), x, y, radius, _as_rgb(rgb))


def _grown(mask: np.ndarray) -> np.ndarray:
    grown = np.pad(mask, 1)
    for axis in (0, 1):
        grown = grown | np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
    return grown[1:-1, 1:-1]


def _fit(shape: str, alpha: np.ndarray) -> tuple[float, str, float, float, float]:
    """(misfit, shape, x, y, radius): the object of this shape that has the region's area and centroid. Misfit
    is what it leaves uncovered or covers wrongly, as a part of the area."""
    unit = geometry(shape)
    total = float(alpha.sum())
    radius = (total / unit.area) ** 0.5 / SIDE
    at = np.arange(0.5, SIDE) / SIDE
    x = float(alpha.sum(axis=0) @ at) / total - radius * unit.centroid[0]
    y = float(alpha.sum(axis=1) @ at) / total - radius * unit.centroid[1]
    window, covered = coverage(Object(shape, "", x, y, radius, (0, 0, 0)), SIDE)
    misfit = np.abs(alpha[window] - covered).sum() + total - alpha[window].sum()
    return float(misfit) / total, shape, x, y, radius


def _nearest_color(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.square(rgb - COLORS[name]).sum()))


def _as_rgb(rgb: np.ndarray) -> tuple[int, int, int]:
    return tuple(int(level) for level in rgb)
