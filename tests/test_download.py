"""The download against a stand-in of the hub on loopback: what goes right, and each way it goes wrong."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kandinsky import download
from kandinsky.checkpoint import CheckpointError, open_safetensors
from tests.hub import REVISION, Fault, Hub, running
from tests.small import reference_image_encoder, reference_movq, reference_unet
from tests.test_scripts import load

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "download_weights.py"
NAME = "kandinsky-2-2-decoder"
REPOSITORY = f"someone/{NAME}"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = {
    "model_index.json": b'{"_class_name": "KandinskyV22Pipeline"}',
    WEIGHTS: bytes(range(256)) * 40_000,
    "unet/config.json": b'{"a": 1}',
}


def manifest(folder: Path, files: dict[str, bytes], name: str = NAME, **more) -> Path:
    """A manifest that knows bytes and sha256 of every file."""
    known = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    entry = {"repository": f"someone/{name}", "revision": REVISION, "model": "2.2", "part": "decoder"}
    path = folder / "manifest.json"
    path.write_text(json.dumps({"repositories": {name: {**entry, "files": known, **more}}}))
    return path


def hub_with(files: dict[str, bytes], name: str = NAME, revision: str = REVISION) -> Hub:
    return Hub({(f"someone/{name}", revision, n): content for n, content in files.items()})


@pytest.fixture
def hub():
    with running(hub_with(FILES)) as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path, monkeypatch, capfd):
    """The script, in process, against the stand-in; gives exit code, stdout and the lines of an error."""
    monkeypatch.setattr(sys, "argv", ["download_weights.py"])
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def call(*argv, path: Path | None = None, endpoint: str | None = None):
        monkeypatch.setenv("HF_ENDPOINT", endpoint or hub.endpoint)
        capfd.readouterr()
        place = ["--out", tmp_path / "weights", "--manifest", path or manifest(tmp_path, FILES)]
        try:
            code = load("download_weights").main([str(a) for a in ["2.2", *place, *argv]])
        except SystemExit as exit:  # argparse
            code = exit.code
        out, err = capfd.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("download_weights.py:")]

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(result) -> str:
    code, _, errors = result
    assert code == 2 and len(errors) == 1, result
    return errors[0]


def test_every_file_arrives_and_a_second_run_transfers_nothing(run, hub, tmp_path):
    code, out, _ = run()
    assert code == 0 and sorted(hub.transfers()) == sorted(FILES)
    assert contents(tmp_path / "weights" / NAME) == FILES, "no other file may stay"
    assert f"{NAME} 1/3: model_index.json" in out
    hub.log.clear()
    code, out, _ = run()
    assert code == 0 and hub.log == [] and "all 3 files are there and right" in out


def test_a_cut_connection_resumes_where_it_was_cut(run, hub, tmp_path):
    large = {WEIGHTS: bytes(range(256)) * 100_000}  # the library writes pieces of 10 MiB
    hub.files = hub_with(large).files
    hub.faults[WEIGHTS] = Fault(cut_at=15_000_000, times=1)
    assert run(path=manifest(tmp_path, large))[0] == 0
    assert hub.ranges(WEIGHTS) == [None, f"bytes={10 * 2**20}-"]
    assert contents(tmp_path / "weights" / NAME) == large


def test_a_corrupted_file_is_refused_and_removed(run, hub, tmp_path):
    spoiled = bytearray(FILES[WEIGHTS])
    spoiled[5_000_000] ^= 1
    hub.faults[WEIGHTS] = Fault(body=bytes(spoiled))
    line = one_line(run())
    assert "sha256" in line and "it was removed" in line
    assert set(contents(tmp_path / "weights")) == {f"{NAME}/model_index.json"}
    hub.faults.clear()
    assert run()[0] == 0 and contents(tmp_path / "weights" / NAME) == FILES


def test_a_truncated_file_is_refused_and_removed(run, hub, tmp_path):
    hub.faults[WEIGHTS] = Fault(body=FILES[WEIGHTS][:1000])
    line = one_line(run())
    assert WEIGHTS in line and "10240000" in line.replace(",", "") and "run the same command again" in line
    assert set(contents(tmp_path / "weights")) == {f"{NAME}/model_index.json"}


def test_a_spoiled_file_on_disk_is_fetched_again_alone(run, hub, tmp_path):
    run()
    hub.log.clear()
    path = tmp_path / "weights" / NAME / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert run()[0] == 0 and hub.transfers() == [WEIGHTS]
    assert contents(tmp_path / "weights" / NAME) == FILES


def test_a_hub_with_another_file_than_the_manifest_says_transfers_nothing(run, hub):
    hub.files[REPOSITORY, REVISION, WEIGHTS] = FILES[WEIGHTS][::-1]
    assert "not the manifest's file" in one_line(run()) and hub.transfers() == []


def test_too_little_space_is_said_before_anything_is_transferred(run, hub, tmp_path):
    path = manifest(tmp_path, FILES)
    fields = json.loads(path.read_text())
    fields["repositories"][NAME]["files"][WEIGHTS]["bytes"] = 10**16
    path.write_text(json.dumps(fields))
    line = one_line(run(path=path))
    assert "free" in line and "10000000.00 GB are needed" in line and hub.log == []


def test_a_disk_that_fills_up_in_the_middle_is_one_line(hub, tmp_path):
    """A file system of 4 MB in a namespace of its own; the manifest does not know the file's size."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs unshare and user namespaces")
    path = manifest(tmp_path, FILES)
    fields = json.loads(path.read_text())
    fields["repositories"][NAME]["files"] = {WEIGHTS: {"bytes": None, "sha256": None}}
    path.write_text(json.dumps(fields))
    out = tmp_path / "small disk"
    out.mkdir()
    inside = 'mount -t tmpfs -o size=4m none "$0" && "$@"; code=$?; find "$0" -type f; exit $code'
    command = [sys.executable, SCRIPT, "2.2", "--out", out, "--manifest", path]
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside, out, *command], env=env, capture_output=True, text=True
    )
    if "mount:" in done.stderr:
        pytest.skip("no tmpfs can be mounted here")
    errors = [line for line in done.stderr.splitlines() if line.startswith("download_weights.py:")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the disk is full" in errors[0]
    assert str(out) not in done.stdout.splitlines()[-1], "a temporary file stayed"


def test_a_missing_file_is_one_line(run, hub, tmp_path):
    del hub.files[REPOSITORY, REVISION, WEIGHTS]
    line = one_line(run())
    assert "404" in line and WEIGHTS in line and hub.transfers() == []


def test_too_many_requests_is_one_line(run, hub):
    hub.faults[WEIGHTS] = Fault(status=429, method="HEAD")
    assert "too many requests (429)" in one_line(run())


def test_a_passing_429_is_waited_out(run, hub, tmp_path):
    hub.faults[WEIGHTS] = Fault(status=429, times=1)
    assert run()[0] == 0 and contents(tmp_path / "weights" / NAME) == FILES


def test_no_network_is_one_line(run):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert "check the network" in one_line(run(endpoint=endpoint))


def test_a_killed_run_is_finished_by_the_next(run, hub, tmp_path):
    hub.faults[WEIGHTS] = Fault(hang_at=5_000_000, times=1)
    command = [sys.executable, SCRIPT, "2.2", "--out", tmp_path / "weights"]
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(SCRIPT.parents[1])}
    killed = subprocess.Popen(
        [*command, "--manifest", manifest(tmp_path, FILES)], env=env, stdout=subprocess.DEVNULL
    )
    assert hub.reached.wait(30)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = contents(tmp_path / "weights" / NAME)
    assert "model_index.json" in left and WEIGHTS not in left
    assert any(".incomplete" in name for name in left), "the run was not killed in the middle"
    hub.log.clear()
    assert run()[0] == 0
    assert "model_index.json" not in hub.transfers(), "a finished file was fetched again"
    assert contents(tmp_path / "weights" / NAME) == FILES, "a temporary file stayed"


def test_a_second_download_at_the_same_time_is_refused(run, hub, tmp_path):
    with download._exclusive(tmp_path / "weights" / NAME):
        assert "another download" in one_line(run())
    assert run()[0] == 0


OUTSIDE = ("../x.json", "/etc/x.json", "a/../../x", "a\\..\\x", "C:x", "a//x", "./x", "")


@pytest.mark.parametrize("name", OUTSIDE)
def test_file_names_outside_the_folder_are_refused(run, hub, tmp_path, name):
    line = one_line(run(path=manifest(tmp_path, {name: b"x"})))
    assert "no plain path inside a folder" in line and hub.log == []


@pytest.mark.parametrize("name", ("..", "a/b", "/a"))
def test_folder_names_outside_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="no plain path"):
        download.load_manifest(manifest(tmp_path, FILES, name=name))


def test_a_pickle_outside_the_folder_is_refused(tmp_path):
    fallback = {"revision": REVISION, "files": {WEIGHTS: {"bytes": 1, "sha256": None, "pickle": "../x.bin"}}}
    with pytest.raises(CheckpointError, match="no plain path"):
        download.load_manifest(manifest(tmp_path, FILES, fallback=fallback))


def test_verify_names_what_is_wrong_without_a_network(run, hub, tmp_path):
    run()
    hub.log.clear()
    code, out, _ = run("--verify")
    assert code == 0 and "everything is there and right" in out
    folder = tmp_path / "weights" / NAME
    (folder / WEIGHTS).write_bytes(FILES[WEIGHTS][:-1] + b"x")
    (folder / "unet/config.json").write_bytes(b"{}")
    (folder / "model_index.json").unlink()
    code, out, _ = run("--verify")
    assert code == 1 and hub.log == []
    assert f"{WEIGHTS}: has the right size but other content" in out
    assert "unet/config.json: has 2 bytes, needs 8" in out and "model_index.json: missing" in out


def test_what_the_manifest_does_not_know_is_held_against_the_hub_and_kept(run, hub, tmp_path):
    path = manifest(tmp_path, FILES)
    fields = json.loads(path.read_text())
    for facts in fields["repositories"][NAME]["files"].values():
        facts.update(bytes=None, sha256=None)
    path.write_text(json.dumps(fields))
    assert run(path=path)[0] == 0
    assert set(contents(tmp_path / "weights" / NAME)) == {*FILES, download.RECORD}
    hub.log.clear()
    assert run(path=path)[0] == 0 and hub.log == []
    (tmp_path / "weights" / NAME / "unet/config.json").write_bytes(b'{"a": 2}')
    code, out, _ = run("--verify", path=path)
    assert code == 1 and "unet/config.json" in out
    hub.faults["unet/config.json"] = Fault(body=b'{"a": 3}')  # the right size, but not what the hub announces
    assert "git sha1" in one_line(run(path=path))


def pickled(model: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def test_where_the_revision_is_gone_the_pickles_are_converted(run, hub, tmp_path):
    unet, movq = reference_unet(8, hint=True), reference_movq()
    small = {"unet/config.json": unet.to_json_string().encode()}
    small["movq/config.json"] = movq.to_json_string().encode()
    pickles = {"unet": pickled(unet), "movq": pickled(movq)}
    names = {part: f"{part}/diffusion_pytorch_model" for part in pickles}
    files = {**small, **{f"{names[part]}.safetensors": b"never there" for part in pickles}}
    old = {**small, **{f"{names[part]}.bin": content for part, content in pickles.items()}}
    hub.files = hub_with(old, revision="b" * 40).files
    facts = {
        f"{names[part]}.safetensors": {"pickle": f"{names[part]}.bin", "bytes": len(content), "sha256": None}
        for part, content in pickles.items()
    }
    path = manifest(tmp_path, files, fallback={"revision": "b" * 40, "files": facts})
    code, out, _ = run(path=path)
    assert code == 0 and "is gone" in out
    folder = tmp_path / "weights" / NAME
    assert set(contents(folder)) == {*files, download.RECORD}
    for part, model in (("unet", unet), ("movq", movq)):
        written = open_safetensors(folder / f"{names[part]}.safetensors")
        expected = model.state_dict()
        assert set(written.keys()) == set(expected)
        assert all(torch.equal(written.get_tensor(n), expected[n]) for n in expected)
    hub.log.clear()
    assert run(path=path)[0] == 0 and hub.transfers() == []
    assert run("--verify", path=path)[0] == 0


def test_the_zero_image_is_computed_once_and_kept(run, hub, tmp_path):
    name, model = "kandinsky-2-2-prior", reference_image_encoder()
    model.save_pretrained(tmp_path / "saved")
    saved = contents(tmp_path / "saved")
    files = {f"image_encoder/{n}": saved[n] for n in ("config.json", "model.safetensors")}
    hub.files = hub_with(files, name).files
    path = manifest(tmp_path, files, name)
    assert run(path=path)[0] == 0
    stored = tmp_path / "weights" / name / download.ZERO_IMAGE
    with torch.no_grad():
        theirs = model(torch.zeros(1, 3, 24, 24)).image_embeds
    torch.testing.assert_close(open_safetensors(stored).get_tensor("zero_image_embeds"), theirs)
    before = stored.stat().st_mtime_ns
    code, out, _ = run(path=path)
    assert code == 0 and stored.stat().st_mtime_ns == before and "computing" not in out


def test_the_official_manifest_is_read_and_selected():
    repositories = download.load_manifest(SCRIPT.parents[1] / "weights" / "manifest.json")
    names = [r.name for r in download.select(repositories, "2.2")]
    decoders = ["kandinsky-2-2-decoder", "kandinsky-2-2-decoder-inpaint", "kandinsky-2-2-controlnet-depth"]
    assert names == ["kandinsky-2-2-prior", *decoders]
    assert [r.name for r in download.select(repositories, "2.2", "inpaint")] == [decoders[1]]
    with pytest.raises(ValueError, match="2.1 has no controlnet-depth"):
        download.select(repositories, "2.1", "controlnet-depth")


@pytest.mark.parametrize("argv", ([], ["2.3"], ["2.2", "--convert", "x.bin"]))
def test_a_command_that_makes_no_sense_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        load("download_weights").main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
