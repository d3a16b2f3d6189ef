"""Makes a CLIP tokenizer from captions: byte-pair merges until the captions' words are whole tokens.

The files are the published ones, `vocab.json` and `merges.txt`. Ids: 256 bytes, the same bytes at a word's
end, the merges in their order, and the two special tokens last: CLIP reads a prompt at its largest id.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kandinsky.checkpoint import atomic_file, write_json

START, END = "<|startoftext|>", "<|endoftext|>"


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
    merges = learn_merges(captions, most)
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *map("".join, merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {**special, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    write_json(vocabulary, folder / "vocab.json")
    with atomic_file(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *map(" ".join, merges)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(special, folder / "special_tokens_map.json")
    write_json(settings, folder / "tokenizer_config.json")
    return len(vocabulary)
