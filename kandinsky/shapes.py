"""Abstract compositions after Kandinsky: an endless, seeded data set for training a small model.

    random_scene(seed, index) → Scene ─ render → picture (size, size, 3)
                                  ├─ depth_hint, object_masks
                                  └─ kandinsky.captions → str

A scene is one to three flat shapes on a plain ground. Everything follows from (seed, index), through a
generator of its own. Nothing depends on the resolution: positions and radii are in units of the picture's
side, x to the right and y down. `kandinsky.judge` tells from a picture's pixels whether it shows what a
caption says.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from random import Random

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

COLORS = {
    "red": (212, 38, 42),
    "orange": (242, 126, 28),
    "yellow": (250, 210, 56),
    "green": (36, 136, 78),
    "blue": (34, 78, 176),
    "purple": (124, 52, 150),
    "pink": (242, 156, 190),
    "brown": (120, 74, 42),
    "black": (26, 24, 30),
    "white": (250, 247, 238),
    "grey": (160, 164, 168),  # a ground only: what a blurred black-and-white edge looks like
}
OBJECT_COLORS = tuple(COLORS)[:-1]
BACKGROUNDS = ("white", "black", "grey", "yellow", "blue", "pink")
COLOR_JITTER, BACKGROUND_JITTER = 12, 6  # levels; the closest two colours are 80 apart

RADII = {"small": (0.13, 0.145), "large": (0.19, 0.22)}  # 17 to 18 and 24 to 28 pixels across at 64
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
ANCHORS = (0.2, 0.5, 0.8)  # of the three columns, and of the three rows
PLACE_JITTER = 0.05
OBJECT_WEIGHTS = (9, 9, 2)  # how often a scene has one, two and three objects
MARGIN, GAP = 0.025, 0.05  # least distance to the picture's edge, and between two objects

HELD_OUT = frozenset(
    zip(
        ("red", "orange", "yellow", "green", "blue", "purple"),
        ("star", "square", "triangle", "ring", "cross", "circle"),
    )
)
"""Colour-shape pairs that no training scene contains."""


def _star(x: np.ndarray, y: np.ndarray, tip: float = 1.15, notch: float = 0.52) -> np.ndarray:
    turn = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + turn) % (2 * turn) - turn)  # folded onto half a spike, tip at angle 0
    radius = np.hypot(x, y)
    rise, run = notch * np.sin(turn), tip - notch * np.cos(turn)
    return ((radius * np.cos(angle) - tip) * rise + radius * np.sin(angle) * run) / np.hypot(rise, run)


def _cross(x: np.ndarray, y: np.ndarray, arm: float = 0.34) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - arm), np.maximum(x - arm, y - 1))


# Signed distance to the outline, negative inside, for radius 1 around the middle of the bounding box.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.9,
    "triangle": lambda x, y: np.maximum(0.871 * np.abs(x) - 0.491 * (y + 0.95), y - 0.95),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.78) - 0.24,
    "star": _star,
    "cross": _cross,
    "diamond": lambda x, y: 0.82 * np.abs(x) + 0.572 * np.abs(y) - 0.65,
    "semicircle": lambda x, y: np.maximum(np.hypot(x, y - 0.55) - 1.1, y - 0.55),
}
REACH = 1.2  # no shape reaches farther than this many radii


@dataclass(frozen=True)
class Object:
    """One flat shape. (x, y) is the middle of its bounding box, `rgb` its own shade of `color`."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def size(self) -> str:
        return "small" if self.radius < (RADII["small"][1] + RADII["large"][0]) / 2 else "large"

    @property
    def place(self) -> str:
        column, row = (min(range(3), key=lambda i: abs(ANCHORS[i] - at)) for at in (self.x, self.y))
        return PLACES[3 * row + column]


@dataclass(frozen=True)
class Scene:
    """A plain ground and the objects on it, nearest first."""

    background: str
    rgb: tuple[int, int, int]
    objects: tuple[Object, ...]


def check_object_weights(weights: Sequence[float]) -> None:
    if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"object_weights are {tuple(weights)}; three are needed, none below 0, not all 0")


def random_scene(
    seed: int, index: int, split: str = "train", object_weights: Sequence[float] = OBJECT_WEIGHTS
) -> Scene:
    """The index-th scene of a seed. split "train" never has a held-out colour-shape pair, "held_out" always
    has one. object_weights: how often a scene has one, two and three objects. Raises ValueError."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    check_object_weights(object_weights)
    rng = Random(f"{seed} {index} {split}")
    count = rng.choices((1, 2, 3), object_weights)[0]
    background = rng.choice(BACKGROUNDS)
    pairs = _random_pairs(rng, count, background, split)
    objects = None
    while objects is None:
        cells = rng.sample(range(9), count)
        tries = (_arrange(rng, pairs, cells) for _ in range(6))  # fewer, and the middle becomes rare
        objects = next(filter(None, tries), None)
    return Scene(background, _shade(rng, background, BACKGROUND_JITTER), objects)


def _random_pairs(rng: Random, count: int, background: str, split: str) -> list[tuple[str, str]]:
    colors = [color for color in OBJECT_COLORS if color != background]
    pairs: list[tuple[str, str]] = []
    if split == "held_out":
        pairs.append(rng.choice([pair for pair in sorted(HELD_OUT) if pair[0] != background]))
    while len(pairs) < count:
        pair = rng.choice(colors), rng.choice(tuple(SHAPES))
        if pair not in pairs and (split == "held_out" or pair not in HELD_OUT):
            pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def _arrange(rng: Random, pairs: list[tuple[str, str]], cells: list[int]) -> tuple[Object, ...] | None:
    """Sizes and exact places at random; None where two objects would come too close."""
    objects = []
    for (color, shape), cell in zip(pairs, cells):
        radius = rng.uniform(*RADII[rng.choice(("small", "large"))])
        center = []
        for anchor, extent in zip((ANCHORS[cell % 3], ANCHORS[cell // 3]), geometry(shape).extents):
            room = radius * extent + MARGIN
            center.append(min(max(anchor + rng.uniform(-PLACE_JITTER, PLACE_JITTER), room), 1 - room))
        objects.append(Object(shape, color, *center, radius, _shade(rng, color, COLOR_JITTER)))
    return None if any(_too_close(a, b) for a, b in combinations(objects, 2)) else tuple(objects)


def _too_close(a: Object, b: Object) -> bool:
    """Whether the bounding boxes lie nearer than GAP."""
    reach = [
        a.radius * ea + b.radius * eb for ea, eb in zip(geometry(a.shape).extents, geometry(b.shape).extents)
    ]
    return abs(a.x - b.x) < reach[0] + GAP and abs(a.y - b.y) < reach[1] + GAP


def _shade(rng: Random, color: str, jitter: int) -> tuple[int, int, int]:
    """Mostly lighter or darker: free channels would turn brown into olive."""
    light = rng.randint(-jitter, jitter)
    return tuple(min(max(level + light + rng.randint(-4, 4), 0), 255) for level in COLORS[color])


@dataclass(frozen=True)
class Geometry:
    """A shape of radius 1: area, the centroid's offset from the middle of the bounding box, and that box."""

    area: float
    centroid: tuple[float, float]
    extents: tuple[float, float]  # half the width and half the height


@lru_cache
def geometry(shape: str) -> Geometry:
    at = (np.arange(480) + 0.5) / 480 * 2 * REACH - REACH
    inside = SHAPES[shape](at[None, :], at[:, None]) <= 0
    y, x = at[np.nonzero(inside)[0]], at[np.nonzero(inside)[1]]
    area = float(inside.mean() * (2 * REACH) ** 2)
    return Geometry(
        area, (float(x.mean()), float(y.mean())), (float(np.abs(x).max()), float(np.abs(y).max()))
    )


def coverage(item: Object, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """How much of each pixel an object covers, in [0, 1], for a window (rows, columns) of the picture. The
    outline is one pixel soft at every size."""
    half = REACH * item.radius + 1 / size
    window, grids = [], []
    for at in (item.y, item.x):
        start, stop = max(int((at - half) * size), 0), min(int((at + half) * size) + 1, size)
        window.append(slice(start, stop))
        grids.append((np.arange(start + 0.5, stop, dtype=np.float32) / size - at) / item.radius)
    distance = SHAPES[item.shape](grids[1][None, :], grids[0][:, None]) * (item.radius * size)
    return tuple(window), np.clip(0.5 - distance, 0, 1)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """uint8 (size, size, 3), anti-aliased."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = scene.rgb
    for item in scene.objects:
        window, alpha = coverage(item, size)
        picture[window] += alpha[..., None] * (np.array(item.rgb, np.float32) - picture[window])
    return (picture + 0.5).astype(np.uint8)


def object_masks(scene: Scene, size: int = 64) -> list[np.ndarray]:
    """One boolean (size, size) for each object, True where it covers at least half the pixel."""
    masks = [np.zeros((size, size), bool) for _ in scene.objects]
    for mask, item in zip(masks, scene.objects):
        window, alpha = coverage(item, size)
        mask[window] = alpha >= 0.5
    return masks


def with_another_object(scene: Scene, rng: Random) -> tuple[Scene, int]:
    """One object exchanged for another of its size, of another colour and shape, where it was or as near as
    it has room, and its index. The new pair is no held-out one."""
    taken = {scene.background, *(other.color for other in scene.objects)}
    pairs = [(c, s) for c in OBJECT_COLORS if c not in taken for s in SHAPES if (c, s) not in HELD_OUT]
    choices = [(index, *pair) for index in range(len(scene.objects)) for pair in pairs]
    rng.shuffle(choices)
    for index, color, shape in choices:
        item, others = scene.objects[index], [*scene.objects]
        others.remove(item)
        rooms = (item.radius * extent + MARGIN for extent in geometry(shape).extents)
        x, y = (min(max(at, room), 1 - room) for at, room in zip((item.x, item.y), rooms))
        new = Object(shape, color, x, y, item.radius, _shade(rng, color, COLOR_JITTER))
        if shape != item.shape and not any(_too_close(new, other) for other in others):
            break
    return replace(scene, objects=(*scene.objects[:index], new, *scene.objects[index + 1 :])), index


def box_mask(item: Object, size: int = 64) -> np.ndarray:
    """Boolean (size, size): a square around an object, in which any shape of its radius has room."""
    reach, at = REACH * item.radius + 1 / 64, np.arange(0.5, size) / size
    return (np.abs(at - item.y) < reach)[:, None] & (np.abs(at - item.x) < reach)[None]


def hole_of(before: Scene, after: Scene, changed: int, size: int = 64) -> np.ndarray:
    """Boolean (size, size): squares around what was exchanged, and around what is there now."""
    return box_mask(before.objects[changed], size) | box_mask(after.objects[changed], size)


def depth_hint(scene: Scene, size: int = 64) -> np.ndarray:
    """uint8 (size, size): the ground is black, the first object white, each further one a step darker."""
    hint = np.zeros((size, size), np.uint8)
    for depth, mask in enumerate(object_masks(scene, size)):
        hint[mask] = 255 - 70 * depth
    return hint


def as_pixels(picture: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) -> (3, h, w) in [-1, 1]"""
    return rearrange(torch.from_numpy(picture), "h w c -> c h w").float() / 127.5 - 1
