"""The README's Python runs as written, on small weights."""

import inspect
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from draw_readme import RECIPES

from kandinsky import MoVQ, Prior, UNet
from kandinsky.cli import WEIGHTS
from kandinsky.config import (
    HINT_UNET,
    TEXT_UNET,
    CLIPImageConfig,
    CLIPTextConfig,
    MoVQConfig,
    MultilingualConfig,
    PriorConfig,
    UNetConfig,
)
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder, MultilingualCLIP
from kandinsky.judge import judge, see
from tests.helpers import picture
from tests.test_scripts import load

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme_has_the_two_commands_it_promises():
    assert "\npip install -e '.[test]' && pytest\n" in README
    assert '\npip install -e . && python scripts/text2img.py "' in README


@pytest.mark.slow
def test_the_python_blocks_run_one_after_the_other(decoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for folder in (*decoder_folder.parent.glob("kandinsky-*"), *WEIGHTS.glob("mini-*")):
        (tmp_path / "weights" / folder.name).symlink_to(folder)
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block.replace("1280", "32"), scope)  # the small checkpoint's width
    assert len(scope["images"]) == 2 and scope["pixels"].shape[1] == 3
    assert scope["z0"].shape == (1, 4, 16, 16) and scope["hinted"].prior is scope["pipe"].prior
    drawn = {name: np.asarray(scope[name]) for name in RECIPES}
    assert all((a != b).any() for a, b in combinations(drawn.values(), 2))
    for name in ("by_hand", "without_mid", "churned"):  # these change little: the picture stays right
        assert judge(drawn[name], scope["prompt"]).right
    assert see(drawn["steered"]).background == "pink"
    assert scope["out"].shape == (1, 8, 64, 64) and (tmp_path / "my-unet" / "config.json").exists()


SKIPPED = {  # what is in a command -> why it is only parsed
    "pip install": "continuous integration runs it, in a new environment",
    "pytest": "this is it",
    "download_weights.py": "needs the network; test_download.py runs it on a hub of its own",
    "--weights 2.2": "needs the official weights",
    "make_random_checkpoint.py": "writes 15.9 GB; test_random_weights.py runs it on small sizes",
    "random/": "needs those 15.9 GB",
    "check_parity.py": "test_parity.py runs it",
    "train_decoder.py": "takes a minute or more; test_training_scripts.py runs it on small networks",
}
DRAWING = {
    "text2img": "decoder",
    "img2img": "decoder",
    "mix": "decoder",
    "explain_run": "decoder",
    "inpaint": "inpaint",
}


def shell_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("  #")[0].split(" && ")]


@pytest.mark.slow
def test_the_shell_blocks_run_or_are_skipped_for_a_reason(
    decoder_folder, inpaint_folder, hint_folder, tmp_path, monkeypatch, capfd
):
    """Drawing on small random weights, in few steps: the last of two equal flags counts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(WEIGHTS)
    for name in ("photo", "starry", "a", "b", "depth", "mask"):
        picture(32, 32).convert("L" if name == "mask" else "RGB").save(f"{name}.png")
    Path("prompts.txt").write_text("a cat\na dog\n")
    folders, ran = {"decoder": decoder_folder, "inpaint": inpaint_folder}, []
    for command in shell_commands():
        reason = next((why for what, why in SKIPPED.items() if what in command), None)
        if not command.startswith("python "):
            if reason is None:
                subprocess.run(shlex.split(command), check=True)
            continue
        _, script, *given = shlex.split(command)
        module = load(Path(script).stem)
        parse = module.parse_args if hasattr(module, "parse_args") else module.make_parser().parse_args
        parse(given)
        if reason is not None:
            continue
        if module.__name__ in DRAWING:
            folder = hint_folder if "--hint" in given else folders[DRAWING[module.__name__]]
            given += ["--weights", str(folder)]
            given += [] if "--from-png" in given else ["--steps", "2", "--prior-steps", "2"]
        assert module.main(given) == 0, command + capfd.readouterr().err
        ran.append(module.__name__)
    assert set(DRAWING) | {"inspect_model"} == set(ran)
    assert Path("out.png").read_bytes() in [p.read_bytes() for p in Path().glob("out-*.png")]


def test_every_file_of_the_package_is_in_the_table_and_the_other_way_round():
    package = Path(__file__).resolve().parents[1] / "kandinsky"
    table = README[README.index("## Files") : README.index("## Which weight")]
    named = set(re.findall(r"`(?:kandinsky/)?(\w+\.py)`", table))
    assert named == {path.name for path in package.glob("*.py")} - {"__init__.py"}


ROWS = [
    [part.strip() for part in line.strip("|").split(" | ")]
    for line in README[README.index("## Which weight") : README.index("## Where calls differ")].splitlines()
    if line.startswith("| ") and "names begin with" not in line
]
NETWORKS = {
    "prior": [(Prior, PriorConfig())],
    "unet": [(UNet, UNetConfig()), (UNet, HINT_UNET), (UNet, TEXT_UNET)],
    "movq": [(MoVQ, MoVQConfig())],
    "text_encoder": [(CLIPTextEncoder, CLIPTextConfig())],
    "image_encoder": [(CLIPImageEncoder, CLIPImageConfig())],
    "text_encoder, 2.1's decoder": [(MultilingualCLIP, MultilingualConfig())],
}


def without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def quoted(text: str) -> list[str]:
    return re.findall("`([^`]+)`", text)


@pytest.mark.parametrize("folder", NETWORKS)
def test_every_published_name_is_mapped_to_its_class_and_the_line_that_uses_it(folder):
    """The networks' names are the published ones, tested elsewhere."""
    rows, fits = [row[1:] for row in ROWS if row[0] == folder], {}
    for network, config in NETWORKS[folder]:
        with torch.device("meta"):
            model = network(config)
        modules = dict(model.named_modules()) | dict(model.named_parameters())
        kinds_of = {without_numbers(name): type(found).__name__ for name, found in modules.items()}
        known = [prefix for prefixes, *_ in rows for prefix in quoted(prefixes)]
        for key in map(without_numbers, model.state_dict()):
            assert any(fnmatchcase(key, p) or fnmatchcase(key, f"{p}.*") for p in known), key
        for prefixes, *_ in rows:
            for prefix in quoted(prefixes):
                kinds = {kind for name, kind in kinds_of.items() if fnmatchcase(name, prefix)}
                fits[prefix] = fits.get(prefix, set()) | kinds
    module = sys.modules[NETWORKS[folder][0][0].__module__]
    for prefixes, classes, used in rows:
        given = set().union(*(fits[prefix] for prefix in quoted(prefixes)))
        assert given == set(quoted(classes)), prefixes
        for place in quoted(used):
            owner, method = place.split(".")
            source = inspect.getsource(getattr(getattr(module, owner), method))
            for prefix in quoted(prefixes):
                attribute = prefix.removesuffix(".N").split(".")[-1]
                assert attribute in source, (place, prefix)
