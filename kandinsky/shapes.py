"""Captioned abstract compositions after Kandinsky: an endless, seeded data set for training a small model.

    random_scene(seed, index) → Scene ─ render → picture (size, size, 3)
                                  ├─ depth_hint, object_masks
                                  └─ caption → str ─ parse → Claim, what the caption says

A scene is one to three flat shapes on a plain ground. Everything follows from (seed, index), through a
generator of its own. Nothing depends on the resolution: positions and radii are in units of the picture's
side, x to the right and y down. A caption says only true things, and always the colour and shape of every
object; `kandinsky.judge` tells from a picture's pixels whether it shows what a caption says.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # directions

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


@dataclass(frozen=True)
class ObjectClaim:
    shape: str
    color: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a caption says. A relation (i, "above", j) is between objects by index; None is left unsaid."""

    objects: tuple[ObjectClaim, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


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


def batch(
    seed: int,
    indices: Iterable[int],
    size: int = 64,
    split: str = "train",
    object_weights: Sequence[float] = OBJECT_WEIGHTS,
) -> tuple[Tensor, list[str], list[Scene]]:
    """Pixels (b, 3, size, size) float32 in [-1, 1], one caption each, and the scenes."""
    indices = list(indices)
    scenes = [random_scene(seed, index, split, object_weights) for index in indices]
    captions = [
        caption(scene, Random(f"{seed} {index} {split} caption")) for scene, index in zip(scenes, indices)
    ]
    return torch.stack([as_pixels(render(scene, size)) for scene in scenes]), captions, scenes


def as_pixels(picture: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) -> (3, h, w) in [-1, 1]"""
    return rearrange(torch.from_numpy(picture), "h w c -> c h w").float() / 127.5 - 1


# Words, the usual one first. Every one of them is both said and understood.
SHAPE_WORDS = {shape: (shape,) for shape in SHAPES} | {
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
    "semicircle": ("semicircle", "half circle"),
}
COLOR_WORDS = {color: (color,) for color in COLORS} | {
    "purple": ("purple", "violet"),
    "grey": ("grey", "gray"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
PLACE_WORDS = {
    "top": ("at the top", "at the top centre"),
    "left": ("on the left", "at the left"),
    "centre": ("in the centre", "in the middle", "in the center"),
    "right": ("on the right", "at the right"),
    "bottom": ("at the bottom", "at the bottom centre"),
}
for _row, _other in (("top", "upper"), ("bottom", "lower")):
    for _side in ("left", "right"):
        _corner = f"{_row} {_side}"
        PLACE_WORDS[_corner] = f"at the {_corner}", f"in the {_corner} corner", f"in the {_other} {_side}"
OPENINGS = ("a picture of", "a painting of", "an abstract painting of", "an abstract composition with")


def _word(rng: Random, words: tuple[str, ...]) -> str:
    return words[0] if rng.random() < 0.6 else rng.choice(words)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(scene: Scene, rng: Random) -> str:
    """A true description in varied English: "a red circle above a small blue square on a grey background"."""
    return say(describe(scene, rng), rng)


def describe(scene: Scene, rng: Random) -> Claim:
    """Chooses what to say of a scene, and in what order. Places are said of every object or of none: whose
    would it be in "a star and a ring at the top"?"""
    objects = rng.sample(scene.objects, len(scene.objects))
    background = scene.background if rng.random() < 0.7 else None
    sizes = [item.size if rng.random() < 0.4 else None for item in objects]
    clear = [name for name in RELATIONS if len(objects) > 1 and _is_clear(objects[0], name, objects[1])]
    if clear and rng.random() < 0.5:
        relations = ((0, rng.choice(clear), 1),)
        places = [None, None] + [item.place if rng.random() < 0.5 else None for item in objects[2:]]
    else:
        relations = ()
        places = [item.place for item in objects] if rng.random() < 0.6 else [None] * len(objects)
    claims = [ObjectClaim(o.shape, o.color, size, place) for o, size, place in zip(objects, sizes, places)]
    return Claim(tuple(claims), relations, background)


def offset(a: Object, relation: str, b: Object) -> tuple[float, float]:
    """How far a lies from b in the direction of the relation, and how far off it sideways."""
    x, y = a.x - b.x, a.y - b.y
    dx, dy = RELATIONS[relation]
    return dx * x + dy * y, abs(dy * x - dx * y)


def _is_clear(a: Object, relation: str, b: Object) -> bool:
    along, sideways = offset(a, relation, b)
    return along > 0.15 and along > 0.75 * sideways


def say(claim: Claim, rng: Random) -> str:
    """Puts a claim into words. `parse` gives the claim back, whatever words are drawn."""
    place_first = not claim.relations and claim.objects[0].place is not None and rng.random() < 0.2
    phrases = [_say_object(item, place_first, rng) for item in claim.objects]
    if claim.relations:  # between the first two; after "and" a third would seem to be in the relation too
        phrases[:2] = [f"{phrases[0]} {_word(rng, RELATION_WORDS[claim.relations[0][1]])} {phrases[1]}"]
        text = f", {rng.choice(('and also', 'plus'))} ".join(phrases)
    else:
        text = ", ".join(phrases[:-1]) + " and " * (len(phrases) > 1) + phrases[-1]
    opening = f"{rng.choice(OPENINGS)} " if not place_first and rng.random() < 0.25 else ""
    if claim.background is None:
        return opening + text
    ground = _with_article(_word(rng, COLOR_WORDS[claim.background])) + " background"
    style = rng.random()
    if style < 0.15:
        return f"on {ground}, {text}"
    if style < 0.25 and not place_first:
        return f"{ground} with {text}"
    return f"{opening}{text} {_word(rng, ('on', 'against'))} {ground}"


def _say_object(item: ObjectClaim, place_first: bool, rng: Random) -> str:
    words = [_word(rng, SIZE_WORDS[item.size])] if item.size else []
    words += [_word(rng, COLOR_WORDS[item.color]), _word(rng, SHAPE_WORDS[item.shape])]
    phrases = [_with_article(" ".join(words))]
    if item.place:
        phrases.insert(0 if place_first else 1, _word(rng, PLACE_WORDS[item.place]))
    return " ".join(phrases)


def _meanings(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: meaning for meaning, words in table.items() for word in words}


_COLORS, _SHAPES, _SIZES = _meanings(COLOR_WORDS), _meanings(SHAPE_WORDS), _meanings(SIZE_WORDS)
_PLACES, _RELATIONS = _meanings(PLACE_WORDS), _meanings(RELATION_WORDS)


def _any_of(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))  # "at the top left" before "at the top"


_PHRASE = re.compile(
    rf"(?P<opening>{_any_of(OPENINGS)})\b"
    rf"|(?P<relation>{_any_of(_RELATIONS)})\b"
    rf"|(?P<place>{_any_of(_PLACES)})\b"
    rf"|(?:(?:on|against) )?(?:(?:an?|the) )?(?P<ground>{_any_of(_COLORS)}) background\b"
    rf"|(?:(?:an?|one|the) )?(?:(?P<size>{_any_of(_SIZES)}) )?"
    rf"(?P<color>{_any_of(_COLORS)}) (?P<shape>{_any_of(_SHAPES)})\b"
    r"|(?P<joint>(?:and also|and|plus|with)\b|,)"
)


def parse(text: str) -> Claim:
    """What a caption says. Raises ValueError, naming the words, for one that is not of the captions' kind."""
    objects: list[ObjectClaim] = []
    relations, background = [], None
    place = relation = None  # said before the object they belong to
    follows = False  # right after an object, whose place may come next
    for words, said in _phrases(text):
        if said["shape"]:
            shape, color, size = _SHAPES[said["shape"]], _COLORS[said["color"]], _SIZES.get(said["size"])
            objects.append(ObjectClaim(shape, color, size, place))
            if relation:
                relations.append((len(objects) - 2, relation, len(objects) - 1))
            place, relation, follows = None, None, True
        elif said["place"] and follows and objects[-1].place is None:
            objects[-1] = replace(objects[-1], place=_PLACES[said["place"]])
        elif said["place"] and not follows and place is None:
            place = _PLACES[said["place"]]
        elif said["relation"] and objects and relation is None:
            relation = _RELATIONS[said["relation"]]
        elif said["ground"] and background is None:
            background = _COLORS[said["ground"]]
        elif said["joint"]:
            follows = False
        elif not said["opening"]:
            raise ValueError(f"{words!r} stands where it means nothing in {text!r}")
    if not objects or place or relation:
        raise ValueError(f"an object is missing at the end of {text!r}")
    return Claim(tuple(objects), tuple(relations), background)


def _phrases(text: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    rest = " ".join(text.lower().strip(" .").split())
    while rest:
        match = _PHRASE.match(rest)
        if match is None:
            known = f"the colours {', '.join(COLORS)} and the shapes {', '.join(SHAPES)}"
            raise ValueError(
                f"cannot read {rest!r} in {text!r}; say objects as 'a small red circle', with {known}"
            )
        yield match.group(), match.groupdict()
        rest = rest[match.end() :].lstrip()
