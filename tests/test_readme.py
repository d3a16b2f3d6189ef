"""The README's Python runs as written, on small weights."""

import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme_has_the_two_commands_it_promises():
    assert "\npip install -e '.[test]' && pytest\n" in README
    assert '\npip install -e . && python scripts/text2img.py "' in README


def test_the_python_blocks_run_one_after_the_other(decoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(decoder_folder.parent)
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block.replace("1280", "32"), scope)  # the small checkpoint's width
    assert len(scope["images"]) == 2 and scope["pixels"].shape[1] == 3
    assert scope["out"].shape == (1, 8, 64, 64) and (tmp_path / "my-unet" / "config.json").exists()


def test_every_file_of_the_package_is_in_the_table_and_the_other_way_round():
    package = Path(__file__).resolve().parents[1] / "kandinsky"
    table = README[README.index("## Files") : README.index("## Where calls differ")]
    named = set(re.findall(r"`(?:kandinsky/)?(\w+\.py)`", table))
    assert named == {path.name for path in package.glob("*.py")} - {"__init__.py"}
