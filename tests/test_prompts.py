"""CLIP's tokenizer against transformers' own; 2.1's is tested in test_multilingual.py."""

import json
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from kandinsky.checkpoint import CheckpointError
from kandinsky.cli import WEIGHTS
from kandinsky.prompts import PromptTokenizer
from kandinsky.random_weights import write_tokenizer
from tests.helpers import SHARED, slow

END = 518

PIECES = ["a red cat", "<|endoftext|>", "<|STARTOFTEXT|>", "it's we'll i'm you're I've he'd can't", "ǅ", "猫"]
PIECES += ["\u2028", "\u00a0", "\u0000", "e\u0301"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=12), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def compare(tokenizer: PromptTokenizer, theirs: CLIPTokenizer, texts: list[str]) -> None:
    given = {"padding": "longest", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    wanted = theirs(texts, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, mask = tokenizer(texts)
    assert torch.equal(ids, wanted["input_ids"]) and torch.equal(mask, wanted["attention_mask"].bool())


def vocabularies() -> list:
    official = SHARED / "checkpoints" / "official_small_files" / "kandinsky-2-2-prior" / "tokenizer"
    return [WEIGHTS / "mini-prior" / "tokenizer", *([official] if (official / "vocab.json").exists() else [])]


@pytest.mark.parametrize("kind", ["vocab.json", *slow("tokenizer.json", "transformers")])
@pytest.mark.parametrize("folder", vocabularies(), ids=lambda folder: folder.parent.name)
def test_tokens_are_transformers(folder, kind, tmp_path):
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs(["a", "a b c"], padding="longest", max_length=3, truncation=True)  # its settings are not ours
    if kind == "transformers":
        tokenizer = PromptTokenizer.from_transformers(theirs)
    elif kind == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
        assert not (tmp_path / "vocab.json").exists()
        tokenizer = PromptTokenizer.from_pretrained(tmp_path)
    else:
        tokenizer = PromptTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(theirs)
    ids = theirs("a red <|endoftext|>☂").input_ids
    assert tokenizer.tokens(ids) == theirs.convert_ids_to_tokens(ids)
    compare(
        tokenizer,
        theirs,
        ["a red cat", "", "I'm sure he'd've", "Ünïcode, 4k ☂  spaces", " ".join(["ca"] * 75), "x" * 500],
    )
    given(st.lists(TEXTS, min_size=1, max_size=4))(
        settings(max_examples=60, deadline=None)(lambda texts: compare(tokenizer, theirs, texts))
    )()


@pytest.mark.parametrize("pads", [("!", "<|endoftext|>"), ("<|endoftext|>", "!")])
def test_padding_is_what_transformers_reads_from_two_files(tokenizer_folder, pads, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    for name, pad in zip(("tokenizer_config.json", "special_tokens_map.json"), pads):
        said = json.loads((tmp_path / "tokenizer" / name).read_text()) | {"pad_token": pad}
        (tmp_path / "tokenizer" / name).write_text(json.dumps(said))
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer = PromptTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.pad == theirs.pad_token_id == tokenizer.engine.token_to_id(pads[1])
    compare(tokenizer, theirs, ["a red cat", "cat"])


def test_padding_ends_with_the_longest_prompt(tokenizer_folder):
    tokenizer = PromptTokenizer.from_pretrained(tokenizer_folder)
    ids, mask = tokenizer(["a red cat", ""])
    assert ids.shape == mask.shape and mask.sum(dim=1).tolist() == [ids.shape[1], 2]
    assert ids[1].tolist() == [END - 1, *[END] * (ids.shape[1] - 1)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.json", "{", "holds no readable tokenizer"),
        ("merges.txt", "zz qq\n", "holds no readable tokenizer"),
        ("tokenizer.json", "[]", "holds no readable tokenizer"),
        ("tokenizer_config.json", "[]", "holds a JSON list"),
        (
            "tokenizer_config.json",
            '{"model_max_length": 1}',
            "model_max_length is 1; a start and an end need 2",
        ),
        ("tokenizer_config.json", '{"model_max_length": [1]}', "TypeError"),
        ("special_tokens_map.json", '{"pad_token": [1]}', "TypeError"),
        ("special_tokens_map.json", '{"pad_token": {"lstrip": true}}', "KeyError: 'content'"),
        ("special_tokens_map.json", '{"pad_token": "<no>"}', "its pad_token '<no>' is not in vocab.json"),
        ("special_tokens_map.json", '{"bos_token": "<no>"}', "its bos_token '<no>' is not in vocab.json"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tokenizer_folder, tmp_path, name, content, message):
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        PromptTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_merges_that_were_cut_are_refused(tokenizer_folder, tmp_path, kept):
    """At the end of a line: each that is left is right."""
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "merges.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    with pytest.raises(CheckpointError, match="merges.txt makes .* tokens of vocab.json; fetch it again"):
        PromptTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_tokens_that_were_added_are_read_as_transformers_reads_them(tokenizer_folder, tmp_path, file):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    if file == "added_tokens.json":
        (folder / file).write_text('{"<my-cat>": 519}')
    elif (
        file == "tokenizer_config.json"
    ):  # where it lists added tokens, the other file's padding does not count
        said = json.loads((folder / file).read_text()) | {"pad_token": "!"}
        token = {
            "content": "<my-cat>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "special": False,
        }
        token |= {"single_word": False}
        (folder / file).write_text(json.dumps(said | {"added_tokens_decoder": {"519": token}}))
    else:
        theirs = CLIPTokenizer.from_pretrained(folder)
        theirs.add_tokens("<my-cat>")
        theirs.save_pretrained(folder)
    theirs, tokenizer = CLIPTokenizer.from_pretrained(folder), PromptTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(theirs) == 520 and tokenizer.pad == theirs.pad_token_id
    compare(tokenizer, theirs, ["a red <my-cat>", "cat"])
    assert 519 in tokenizer(["a red <my-cat>"])[0]


def test_what_cannot_be_read_or_padded_is_refused(tokenizer_folder):
    with pytest.raises(ValueError, match="no prompts were given"):
        PromptTokenizer.from_pretrained(tokenizer_folder)([])
    theirs = CLIPTokenizer.from_pretrained(tokenizer_folder)
    theirs.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer has no token to pad with"):
        PromptTokenizer.from_transformers(theirs)


@pytest.mark.parametrize("words, dropped", [(75, None), (76, "cat"), (80, "cat cat cat cat cat")])
def test_what_77_tokens_do_not_hold_is_reported_to_the_letter(tokenizer_folder, words, dropped):
    tokenizer = PromptTokenizer.from_pretrained(tokenizer_folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids, _ = tokenizer([" ".join(["cat"] * words), "red"])
    messages = [str(w.message) for w in caught]
    wanted = f"the prompt is longer than 77 tokens; this part was dropped: {dropped!r}"
    assert messages == ([] if dropped is None else [wanted])
    assert ids.shape == (2, 77) and ids[0, -1] == END


@pytest.mark.parametrize(
    "text, warns", [("красный кот", True), ("ein röter Kätzchen", False), ("4k, ☂!", False)]
)
def test_a_prompt_in_another_script_is_warned_of(tokenizer_folder, text, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PromptTokenizer.from_pretrained(tokenizer_folder)([text])
    assert [("knows English" in str(w.message)) for w in caught] == [True] * warns


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file: .*vocab.json"):
        PromptTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("said", [{}, {"model_max_length": None}, {"model_max_length": 1000}])
def test_at_most_77_tokens_are_read_whatever_the_files_say(tokenizer_folder, tmp_path, said):
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(said))
    assert PromptTokenizer.from_pretrained(tmp_path / "tokenizer").max_length == 77


def test_the_official_settings_cut_at_77():
    folder = SHARED / "checkpoints" / "official_small_files" / "kandinsky-2-2-prior" / "tokenizer"
    if not (folder / "vocab.json").exists():
        pytest.skip("needs the official vocabulary")
    ids, _ = PromptTokenizer.from_pretrained(folder)(["a red cat"])
    assert ids.tolist() == [[49406, 320, 736, 2368, 49407]]
