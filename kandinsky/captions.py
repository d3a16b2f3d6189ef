"""What is said of a scene of `kandinsky.shapes`, and what a caption says.

    Scene ─ describe → Claim ─ say → str ─ parse → Claim

A caption says only true things, and always the colour and shape of every object.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

from kandinsky.shapes import COLORS, SHAPES, Object, Scene

RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # directions


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
