"""Makes a CLIP tokenizer from captions: byte-pair merges until the captions' words are whole tokens.

The files are the published ones, `vocab.json` and `merges.txt`. Ids: 256 bytes, the same bytes at a word's
end, the merges in their order, and the two special tokens last: CLIP reads a prompt at its largest id.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kandinsky.checkpoint import atomic_file, write_json
from kandinsky.prompts import END, LONGEST, SPECIAL, START


def byte_symbols() -> list[str]:
    """One printable character for each byte, in the published order: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def learn_merges(captions: Iterable[str], most: int) -> list[tuple[str, str]]:
    """The most frequent neighbours within words, one merge after the other (arXiv:1508.07909, algorithm 1).
    Captions are lower case ASCII words here; whatever else occurs stays bytes."""
    counts = Counter(
        word for text in captions for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower())
    )
    words = {(*word[:-1], f"{word[-1]}</w>"): n for word, n in counts.items() if word.isascii()}
    merges = []
    while len(merges) < most:
        pairs = Counter()
        for symbols, n in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merge(symbols, best): n for symbols, n in words.items()}
    return merges


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out, i = [], 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            out.append("".join(pair))
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return tuple(out)


def write_tokenizer(captions: Iterable[str], folder: Path, most: int = 1000) -> int:
    """Learns from the captions and writes the tokenizer's folder -> the size of its vocabulary"""
    return write_vocabulary(learn_merges(captions, most), folder)


def write_vocabulary(
    merges: Iterable[tuple[str, str]], folder: Path, size: int | None = None, pad: str = END
) -> int:
    """Writes the tokenizer's folder, `vocab.json` last -> the size of its vocabulary

    size: of a larger one, in which the ids between the merges and the two specials stand for nothing. A
        ValueError where it is too small.
    pad: what short prompts are filled with; 2.1's file says "!", the token of id 0.
    """
    merges, symbols = list(merges), byte_symbols()
    tokens = dict.fromkeys([*symbols, *(f"{s}</w>" for s in symbols), *map("".join, merges)])
    size = len(tokens) + 2 if size is None else size
    if size < len(tokens) + 2:
        raise ValueError(f"the vocabulary's size is {size}; at least {len(tokens) + 2} are needed")
    vocabulary = {token: i for i, token in enumerate(tokens)} | {START: size - 2, END: size - 1}
    special = SPECIAL | {"pad_token": pad}
    settings = {**special, "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    settings |= {"model_max_length": LONGEST, "tokenizer_class": "CLIPTokenizer"}
    with atomic_file(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *map(" ".join, merges)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(special, folder / "special_tokens_map.json")
    write_json(settings, folder / "tokenizer_config.json")
    write_json(vocabulary, folder / "vocab.json")
    return size
