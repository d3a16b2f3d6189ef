"""The README's Python runs as written, on small weights."""

import inspect
import re
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

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme_has_the_two_commands_it_promises():
    assert "\npip install -e '.[test]' && pytest\n" in README
    assert '\npip install -e . && python scripts/text2img.py "' in README


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
