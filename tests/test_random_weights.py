"""Random checkpoints: official byte counts, official meaning, and files that load everywhere."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kandinsky import Kandinsky, random_weights
from kandinsky.checkpoint import atomic_file, open_safetensors
from kandinsky.cli import WEIGHTS
from kandinsky.config import read_config
from kandinsky.encoders import CLIPImageEncoder
from kandinsky.prompts import MultilingualTokenizer, PromptTokenizer
from kandinsky.zero_image import zero_image_embeds
from tests.helpers import SHARED, relative_l2, slow
from tests.test_scripts import load

OFFICIAL = SHARED / "checkpoints" / "official_small_files"
REFERENCES = {
    "prior": PriorTransformer,
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
    "unet": UNet2DConditionModel,
    "movq": VQModel,
}


REPOSITORIES = {r.folder: (r, model) for model, (rs, _) in random_weights.MODELS.items() for r in rs.values()}
SOME = [*list(REPOSITORIES)[:2], *slow(*list(REPOSITORIES)[2:])]


def networks_of(name: str, size: str):
    repository, model = REPOSITORIES[name]
    return random_weights.networks_of(repository, random_weights.MODELS[model][1][size])


@pytest.fixture(scope="module")
def released_small_files(tmp_path_factory):
    """The released layout without its weights."""
    out = tmp_path_factory.mktemp("released")
    for name, (repository, model) in REPOSITORIES.items():
        random_weights.write_small_files(out / name, repository, random_weights.MODELS[model][1]["released"])
        for subfolder, _, config in networks_of(name, "released"):
            (out / name / subfolder).mkdir(parents=True, exist_ok=True)
            (out / name / subfolder / "config.json").write_text(json.dumps(config.published()))
    return out


def test_every_released_file_has_the_official_byte_count():
    """2.1's were written by a safetensors whose headers were not filled up to eight bytes."""
    manifest = json.loads((WEIGHTS / "manifest.json").read_text())["repositories"]
    seen = 0
    for name, (_, model) in REPOSITORIES.items():
        for subfolder, network, config in networks_of(name, "released"):
            predicted = random_weights.file_size(random_weights.layout(network, config))
            official = manifest[name]["files"][f"{subfolder}/{network.weights_name}"]["bytes"]
            allowed = 0 if model == "2.2" else 7
            assert official is None or abs(predicted - official) <= allowed, (name, subfolder)
            seen += official is not None
    assert seen >= 16


@pytest.mark.parametrize("name", SOME)
def test_written_files_have_the_predicted_size_and_the_official_library_writes_the_same(
    name, random_folder, tmp_path
):
    for subfolder, network, config in networks_of(name, "small"):
        path = random_folder / name / subfolder / network.weights_name
        assert path.stat().st_size == random_weights.file_size(random_weights.layout(network, config))
        save_file(load_file(path), tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", SOME)
def test_diffusers_loads_every_network(random_folder, name):
    for subfolder, network, _ in networks_of(name, "small"):
        ours = network.from_pretrained(random_folder / name / subfolder)
        if network.__name__ == "MultilingualCLIP":
            settings = {"config": MCLIPConfig.from_pretrained(random_folder / name / subfolder)}
            theirs = MultilingualCLIP.from_pretrained(random_folder / name / subfolder, **settings)
        else:
            theirs = REFERENCES[subfolder].from_pretrained(random_folder / name / subfolder)
        state = theirs.state_dict()
        for key, tensor in ours.state_dict().items():
            assert torch.equal(tensor, state[key].float()), key


def test_the_network_in_memory_is_the_one_on_disk(random_folder):
    for subfolder, network, config in networks_of("kandinsky-2-2-decoder", "small"):
        on_disk = network.from_pretrained(random_folder / "kandinsky-2-2-decoder" / subfolder).state_dict()
        in_memory = random_weights.randomize(network(config)).state_dict()
        assert all(torch.equal(on_disk[name], in_memory[name]) for name in on_disk)


def test_values_depend_on_the_seed_and_have_the_scale_that_was_asked_for():
    pieces = [list(random_weights.draw("UNet", "a.weight", (3000, 2000), seed)) for seed in (0, 0, 1)]
    assert len(pieces[0]) == 2, "larger than one piece"
    first, again, other = (torch.cat(p) for p in pieces)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[:1000], first[random_weights.PIECE :][:1000]), "pieces must differ"
    assert abs(first.std().item() * 2000**0.5 - 1) < 0.01
    assert random_weights.scale("norm.weight", (8,)) == (1.0, 0.3)
    assert random_weights.scale("norm.bias", (8,)) == (0.0, 0.3)
    assert random_weights.scale("conv.weight", (8, 4, 3, 3)) == (0.0, 36**-0.5)
    assert random_weights.scale("positional_embedding", (1, 81, 8)) == (0.0, 0.3)


def test_the_zero_image_read_layer_by_layer_is_the_towers(random_folder):
    prior = random_folder / "kandinsky-2-2-prior"
    stored = open_safetensors(prior / "zero_image_embeds.safetensors").get_tensor("zero_image_embeds")
    tower = CLIPImageEncoder.from_pretrained(prior / "image_encoder")
    assert relative_l2(stored, zero_image_embeds(tower)) < 1e-6


@pytest.mark.parametrize("decoder", ["kandinsky-2-2-decoder", "kandinsky-2-1"])
def test_a_picture_comes_out(random_folder, decoder):
    pipe = Kandinsky.from_pretrained(random_folder / decoder)
    sizes = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "height": 32, "width": 32}
    pixels = pipe.text2img("a red cat", seed=0, output_type="pt", **sizes)
    assert pixels.isfinite().all() and pixels.std() > 0.05


def test_a_part_that_a_model_lacks_is_named(tmp_path, capsys):
    argv = ["2.1", "--size", "small", "--only", "controlnet-depth", "--out", str(tmp_path)]
    assert load("make_random_checkpoint").main(argv) == 2
    assert "2.1 has no controlnet-depth; it has prior, decoder, inpaint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_multilingual_vocabulary_knows_letters_of_three_scripts(tmp_path):
    tokenizer = MultilingualTokenizer.from_pretrained(random_weights.write_multilingual_tokenizer(tmp_path))
    ids = tokenizer(["red кот あ", "猫"])
    assert ids.shape == (2, 77) and ids.max() < 300
    assert 3 not in ids[0] and 3 in ids[1], "the unknown token"


@pytest.mark.parametrize("vocab_size", (519, 49408))
def test_the_vocabulary_cuts_words_and_keeps_the_specials_last(tmp_path, vocab_size):
    ids, mask = PromptTokenizer.from_pretrained(random_weights.write_tokenizer(tmp_path, vocab_size))(
        ["a red Cat", "é猫 !"]
    )
    theirs = CLIPTokenizer.from_pretrained(tmp_path)(["a red Cat", "é猫 !"], padding="longest")["input_ids"]
    assert ids.tolist() == theirs and ids.max() == vocab_size - 1
    assert (ids[:, 0] == vocab_size - 2).all()
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    words = [vocab["a</w>"], vocab["red</w>"], vocab["cat</w>"]]
    assert ids[0, mask[0]].tolist() == [vocab_size - 2, *words, vocab_size - 1]
    with pytest.raises(ValueError, match="at least 519"):
        random_weights.write_tokenizer(tmp_path, 518)


def official(*names: str):
    path = OFFICIAL.joinpath(*names)
    if not path.exists():
        pytest.skip("the official small files are not here")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", REPOSITORIES)
def test_index_and_configs_mean_what_the_official_ones_mean(name, released_small_files):
    def written(*names):
        return json.loads(released_small_files.joinpath(name, *names).read_text(encoding="utf-8"))

    assert written("model_index.json") == official(name, "model_index.json")
    for subfolder, network, config in networks_of(name, "released"):
        theirs = official(name, subfolder, "config.json")
        assert read_config(network.config_class, theirs) == config
        if network.__name__ == "MultilingualCLIP":
            ours, same = written(subfolder, "config.json"), ARCHITECTURE
        elif "encoder" in subfolder:
            reference = CLIPTextConfig if subfolder == "text_encoder" else CLIPVisionConfig
            ours, theirs = (reference(**c).to_dict() for c in (written(subfolder, "config.json"), theirs))
            same = (ours.keys() & theirs.keys()) - OTHER_FIELDS
        else:
            ours, same = written(subfolder, "config.json"), theirs.keys() - {"_diffusers_version"}
        assert len(same) > 5 and {k: ours.get(k) for k in same} == {k: theirs[k] for k in same}


# what diffusers' MultilingualCLIP is made from
ARCHITECTURE = {"transformerDimensions", "numDims", "vocab_size", "hidden_size", "intermediate_size"}
ARCHITECTURE |= {"num_attention_heads", "num_hidden_layers", "layer_norm_eps", "max_position_embeddings"}
ARCHITECTURE |= {"pad_token_id", "hidden_act", "type_vocab_size", "model_type"}
# the class's name, the library's version, the form of outputs: nothing that a tower computes with
OTHER_FIELDS = {"architectures", "transformers_version", "dtype", "return_dict", "_name_or_path"}


SCHEDULERS = [(name, folder) for name, (r, _) in REPOSITORIES.items() for folder in r.schedulers]


@pytest.mark.parametrize("name, folder", SCHEDULERS)
def test_schedulers_mean_what_the_official_ones_mean(name, folder, released_small_files):
    ours = released_small_files / name / folder / "scheduler_config.json"
    configs = [json.loads(ours.read_text()), official(name, folder, "scheduler_config.json")]
    assert configs[0]["_class_name"] == configs[1]["_class_name"]
    reference = {s.__name__: s for s in (DDIMScheduler, DDPMScheduler, UnCLIPScheduler)}[
        configs[1]["_class_name"]
    ]
    ours, theirs = (dict(reference.from_config(config).config) for config in configs)
    ignored = {"_class_name", "_diffusers_version", "_use_default_values"}
    ignored |= {"set_alpha_to_one"} if reference is DDPMScheduler else set()
    assert {k: v for k, v in ours.items() if k not in ignored} == {
        k: v for k, v in theirs.items() if k not in ignored
    }


def content(token) -> str:
    """A file may write a token as text, or as a table of it and how it is matched."""
    return token if isinstance(token, str) else token["content"]


@pytest.mark.parametrize("name", ["kandinsky-2-2-prior", "kandinsky-2-1-prior"])
def test_preprocessor_and_tokenizer_settings_mean_what_the_official_ones_mean(name, released_small_files):
    theirs = official(name, "image_processor", "preprocessor_config.json")
    ours = random_weights.preprocessor(224)
    assert CLIPImageProcessor(**ours).to_dict() == CLIPImageProcessor(**theirs).to_dict()
    ours = json.loads((released_small_files / name / "tokenizer" / "tokenizer_config.json").read_text())
    assert ours["pad_token"] == content(official(name, "tokenizer", "special_tokens_map.json")["pad_token"])
    if not (OFFICIAL / name / "tokenizer" / "vocab.json").exists():
        pytest.skip("the official vocabulary is not here")
    ours, theirs = (
        CLIPTokenizer.from_pretrained(folder / name / "tokenizer")
        for folder in (released_small_files, OFFICIAL)
    )
    for setting in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{setting}_token_id") == getattr(theirs, f"{setting}_token_id")
        assert getattr(ours, f"{setting}_token") == getattr(theirs, f"{setting}_token")
    assert ours.model_max_length == theirs.model_max_length == 77


def test_a_second_run_keeps_files_and_a_killed_one_is_finished(tmp_path, capsys):
    make = load("make_random_checkpoint").main
    argv = ["2.2", "--size", "small", "--only", "decoder", "--out", str(tmp_path)]
    assert make(argv) == 0
    folder = tmp_path / "kandinsky-2-2-decoder"
    movq = folder / "movq" / "diffusion_pytorch_model.safetensors"
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole, before = unet.read_bytes(), movq.stat().st_mtime_ns
    unet.unlink()
    with atomic_file(unet) as orphan:
        pass
    unet.unlink()
    orphan.write_bytes(whole[:1000])  # what a killed run leaves
    assert make(argv) == 0
    assert unet.read_bytes() == whole and movq.stat().st_mtime_ns == before
    assert not list(folder.rglob(".*"))
    capsys.readouterr()
    assert make([*argv, "--seed", "1"]) == 2
    assert "name another --out" in capsys.readouterr().err and unet.read_bytes() == whole


def test_a_folder_made_by_others_is_refused(tmp_path, capsys):
    theirs = tmp_path / "kandinsky-2-2-decoder" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    argv = ["2.2", "--size", "small", "--out", str(tmp_path)]
    assert load("make_random_checkpoint").main(argv) == 2
    assert "was not made here" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["kandinsky-2-2-decoder", "notes.txt"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # no disk of that size is at hand
    with pytest.raises(OSError, match="10.00 GB free, 15.86 GB are needed"):
        random_weights.make(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
