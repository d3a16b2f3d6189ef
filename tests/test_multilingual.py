"""2.1's own text tower and tokenizer against transformers' XLM-RoBERTa under diffusers' wrapper."""

import json
import warnings

import pytest
import torch

from kandinsky.checkpoint import CheckpointError
from kandinsky.config import MultilingualConfig, read_config
from kandinsky.convert import convert
from kandinsky.encoders import MultilingualCLIP
from kandinsky.inspection import attention_maps
from kandinsky.optimize import optimize, restore
from kandinsky.prompts import MultilingualTokenizer
from tests.helpers import relative_l2
from tests.small import ours, reference_multilingual, write_multilingual_tokenizer


def padded_ids(lengths: list[int], n: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(4, 299, (len(lengths), n), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    for row, length in zip(ids, lengths):
        row[length - 1], row[length:] = 2, 1
    return ids


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("token_types", [1, 2])
@pytest.mark.parametrize("lengths, n", [([77], 77), ([2, 20, 77], 77), ([3, 128], 128)])
def test_the_tower_matches_diffusers(lengths, n, token_types, seed):
    """Padded rows included: the U-Net reads them."""
    reference = reference_multilingual(seed, type_vocab_size=token_types)
    tower, ids = ours(MultilingualCLIP, reference), padded_ids(lengths, n, seed)
    pooled, hidden = reference(ids, (ids != 1).long())
    states, embeds = tower(ids)
    assert relative_l2(states, hidden) <= 1e-5 and relative_l2(embeds, pooled) <= 1e-5
    longest = max(lengths)
    if longest < n:
        assert torch.equal(states[0, -1], states[0, -2])
    double = tower.double()(ids)[1]
    assert relative_l2(double, reference.double()(ids, (ids != 1).long())[0].float()) <= 1e-6


@torch.no_grad()
def test_padding_is_counted_by_its_id_wherever_it_stands():
    reference = reference_multilingual()
    ids = torch.tensor([[0, 5, 1, 6, 2, 1], [1, 0, 7, 2, 1, 1]])
    pooled, hidden = reference(ids, (ids != 1).long())
    states, embeds = ours(MultilingualCLIP, reference)(ids)
    assert relative_l2(states, hidden) <= 1e-5 and relative_l2(embeds, pooled) <= 1e-5


@torch.no_grad()
def test_the_tower_is_optimized_inspected_saved_and_read_back(tmp_path):
    tower, ids = ours(MultilingualCLIP, reference_multilingual()), padded_ids([4, 9], 12)
    states, embeds = tower(ids)
    optimize(tower)
    assert relative_l2(tower(ids)[0], states) <= 1e-5
    restore(tower)
    with attention_maps(tower, "*") as maps:
        tower(ids)
    assert len(maps) == 3 and all(m[0].shape == (2, 4, 12, 12) for m in maps.values())
    assert all(m[0][0, ..., 4:].eq(0).all() for m in maps.values())  # nobody sees padding
    tower.save_pretrained(tmp_path / "ours")
    type(reference_multilingual()).from_pretrained(tmp_path / "ours")
    assert torch.equal(MultilingualCLIP.from_pretrained(tmp_path / "ours")(ids)[1], embeds)
    reference_multilingual().save_pretrained(tmp_path / "theirs")
    assert torch.equal(MultilingualCLIP.from_pretrained(tmp_path / "theirs")(ids)[1], embeds)
    with pytest.raises(ValueError, match="with n from 1 to 128"):
        tower(padded_ids([129], 129))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("pad_token_id", 0, "pad_token_id is 0; this implementation models only 1"),
        ("layer_norm_eps", 1e-12, "layer_norm_eps is 1e-12"),
        ("transformerDimensions", 512, "transformerDimensions is 512"),
        ("hidden_act", "relu", "hidden_act is 'relu'"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("model_type", "bert", "model_type is 'bert'; 'xlm-roberta' or 'M-CLIP' is needed here"),
    ],
)
def test_a_config_of_another_tower_is_refused(field, value, message):
    published = json.loads(reference_multilingual().config.to_json_string())
    read_config(MultilingualConfig, published)
    with pytest.raises(CheckpointError, match=message):
        read_config(MultilingualConfig, published | {field: value})


def test_prompts_in_any_script_are_cut_and_padded_to_77(tmp_path):
    folder = write_multilingual_tokenizer(tmp_path / "tokenizer")
    tokenizer = MultilingualTokenizer.from_pretrained(folder)
    texts = ["a red cat", "", "красный кот", "あか"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenizer(texts)
    wanted = tokenizer.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    assert torch.equal(ids, wanted.input_ids) and ids.shape == (4, 77)
    assert torch.equal(ids != 1, wanted.attention_mask.bool())
    assert ids[1].tolist() == [0, 2] + [1] * 75 and 3 not in ids
    with pytest.warns(UserWarning, match="longer than 77 tokens; this part was dropped: 'cat'"):
        long = tokenizer(["a " * 75 + "cat"])
    assert long.shape == (1, 77) and long[0, -1] == 2
    with pytest.raises(CheckpointError, match="no such file"):
        MultilingualTokenizer.from_pretrained(tmp_path)


def test_a_broken_tokenizer_is_one_line(tmp_path):
    folder = write_multilingual_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="holds no readable tokenizer") as error:
        MultilingualTokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_the_published_pickle_of_the_tower_is_converted(tmp_path):
    reference = reference_multilingual()
    reference.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    convert(tmp_path / "pytorch_model.bin")
    tower, weights = MultilingualCLIP.from_pretrained(tmp_path), reference.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in tower.state_dict().items())
