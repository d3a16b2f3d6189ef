"""The download, against a stand-in of the hub: what arrives, what is refused, what a failure leaves."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from kandinsky import Kandinsky, cli, download, zero_image
from kandinsky.checkpoint import CheckpointError, atomic_file
from kandinsky.unet import UNet
from tests.helpers import SHARED, largest_file, relative_l2
from tests.hub import Fault, Hub
from tests.small import reference_movq, reference_unet
from tests.test_checkpoint import OFFICIAL, predicted_bytes
from tests.test_scripts import SCRIPTS, run

COMMIT, OTHER = "c0ffee" + "0" * 34, "decade" + "0" * 34
NAME = "kandinsky-2-2-decoder"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = {
    "model_index.json": b"{}",
    WEIGHTS: random.Random(0).randbytes(100_000),
    "unet/config.json": b'{"in_channels": 4}',
}


def facts(content: bytes) -> dict:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Place:
    """A hub, a manifest of what is on it, and a folder to download into."""

    def __init__(self, hub: Hub, folder: Path):
        self.hub, self.out, self.manifest = hub, folder / "weights", folder / "manifest.json"
        self.repositories: dict[str, dict] = {}

    def publish(self, name: str, files: dict[str, bytes], part: str = "decoder", **changes) -> dict:
        """Puts a repository on the hub and in the manifest; returns its entry there, to be edited."""
        entry = {"repository": f"someone/{name}", "revision": COMMIT, "model": "2.2", "part": part, **changes}
        self.hub.files[entry["repository"], entry["revision"]] = dict(files)
        entry["files"] = {file: facts(content) for file, content in files.items()}
        self.repositories[name] = entry
        return entry

    def run(self, *argv: str) -> int:
        self.manifest.write_text(json.dumps({"repositories": self.repositories}))
        return run("download_weights", *(argv or ("2.2",)), "--manifest", self.manifest, "--out", self.out)

    def there(self) -> dict[str, bytes]:
        return contents(self.out / NAME) if (self.out / NAME).exists() else {}


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def place(hub, tmp_path) -> Place:
    """With one small decoder published."""
    place = Place(hub, tmp_path)
    place.publish(NAME, FILES)
    return place


@pytest.fixture
def patience(monkeypatch):
    """Seconds the hub library would have waited between its retries, without the waiting."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    waited: list[float] = []
    clock = type("Clock", (), {"sleep": staticmethod(waited.append), "time": staticmethod(lambda: 0.0)})
    monkeypatch.setattr(file_download, "time", clock)
    monkeypatch.setattr(_http, "time", clock)
    return waited


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.fixture
def whole(decoder_folder, hub, tmp_path) -> Place:
    """A whole small Kandinsky, prior and decoder, as diffusers writes them."""
    place = Place(hub, tmp_path)
    place.publish("kandinsky-2-2-prior", contents(decoder_folder.parent / "kandinsky-2-2-prior"), "prior")
    place.publish(NAME, contents(decoder_folder))
    return place


@torch.no_grad()
def test_one_command_brings_a_model_that_draws_and_a_second_transfers_nothing(whole, decoder_folder, capsys):
    assert whole.run() == 0
    prior, decoder = (whole.out / name for name in whole.repositories)
    published = contents(decoder_folder.parent / prior.name)
    assert contents(decoder) == contents(decoder_folder)
    assert contents(prior).keys() == published.keys() | {download.ZERO_IMAGE}
    assert all(contents(prior)[name] == content for name, content in published.items())

    tower = CLIPVisionModelWithProjection.from_pretrained(prior / "image_encoder").eval()
    expected = tower(torch.zeros(1, 3, 24, 24)).image_embeds
    stored = load_file(prior / download.ZERO_IMAGE)
    assert stored.keys() == {"zero_image_embeds"}
    assert relative_l2(stored["zero_image_embeds"], expected) <= 1e-5
    steps = {"num_inference_steps": 1, "prior_num_inference_steps": 1}
    assert Kandinsky.from_pretrained(decoder).text2img("cat", height=16, width=16, seed=0, **steps)

    assert sorted(whole.hub.bodies) == sorted([*published, *contents(decoder_folder)])
    whole.hub.requests.clear()
    times = {path: path.stat().st_mtime_ns for path in whole.out.rglob("*.*")}
    assert whole.run() == 0
    assert whole.hub.requests == [] and times == {p: p.stat().st_mtime_ns for p in whole.out.rglob("*.*")}
    assert "files are there and right" in capsys.readouterr().out


def test_a_whole_folder_is_not_written_to(place):
    """As when it is read-only, which the tests' user may not mind."""
    assert place.run() == 0
    folder = place.out / NAME
    before = folder.stat().st_mtime_ns
    folder.chmod(0o555)
    assert place.run() == 0 and folder.stat().st_mtime_ns == before
    folder.chmod(0o755)


def test_only_brings_one_part(whole):
    assert whole.run("2.2", "--only", "decoder") == 0
    assert [path.name for path in whole.out.iterdir()] == [NAME]
    assert {repository for repository, _ in whole.hub.files} == {f"someone/{n}" for n in whole.repositories}
    assert set(whole.hub.bodies) == set(whole.repositories[NAME]["files"])


def test_only_may_be_repeated(tmp_path, capsys):
    parts = ["--only", "controlnet-depth", "--only", "prior"]
    assert run("download_weights", "2.2", *parts, "--verify", "--out", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    missing = ("kandinsky-2-2-prior", "kandinsky-2-2-controlnet-depth")
    assert lines == [f"{tmp_path / name}: not downloaded" for name in missing]


def test_verify_needs_no_network_and_lists_what_is_wrong(place, capsys):
    assert place.run("2.2", "--verify") == 1
    assert f"{place.out / NAME}: not downloaded" in capsys.readouterr().out
    assert place.run() == 0
    place.hub.requests.clear()
    assert place.run("2.2", "--verify") == 0
    assert "everything is there and right" in capsys.readouterr().out

    folder = place.out / NAME
    (folder / "model_index.json").unlink()
    (folder / "unet" / "config.json").write_bytes(FILES["unet/config.json"][:-1])
    (folder / WEIGHTS).write_bytes(FILES[WEIGHTS][:-1] + bytes([FILES[WEIGHTS][-1] ^ 1]))
    (folder / download.ZERO_IMAGE).write_bytes(b"half")
    assert place.run("2.2", "--verify") == 1
    problems = capsys.readouterr().out.splitlines()[1:]
    assert problems == [
        f"{folder / 'model_index.json'}: missing",
        f"{folder / WEIGHTS}: has the right size but other content (sha256)",
        f"{folder / 'unet/config.json'}: has 17 bytes, needs 18",
        f"{folder / download.ZERO_IMAGE}: damaged; remove it and download again",
    ]
    assert place.hub.requests == []
    (folder / download.ZERO_IMAGE).unlink()
    assert place.run() == 0 and place.there() == FILES  # and a download mends it
    assert download.File(bytes=9).problem(folder / WEIGHTS) == "has 100,000 bytes, needs 9"


@pytest.mark.parametrize("known", ["nothing", "the start"])
@pytest.mark.parametrize("damaged, hash_name", [(WEIGHTS, "sha256"), ("unet/config.json", "git sha1")])
def test_what_the_manifest_does_not_know_is_taken_from_the_hub_and_kept(
    place, capsys, known, damaged, hash_name
):
    for entry in place.repositories[NAME]["files"].values():
        entry["sha256"] = None if known == "nothing" else entry["sha256"][:8]
        entry["bytes"] = None if known == "nothing" else entry["bytes"]
    place.hub.faults[damaged] = Fault(content=b"x" * len(FILES[damaged]), times=1)
    assert place.run() == 2
    assert f"({hash_name if known == 'nothing' else 'sha256'}); it was removed" in one_line(capsys)
    assert place.run() == 0
    record = json.loads((place.out / NAME / download.RECORD).read_text())
    assert record == {"files": {name: facts(content) for name, content in FILES.items()}}
    place.hub.requests.clear()
    assert place.run() == 0 and place.hub.requests == []
    (place.out / NAME / "model_index.json").write_bytes(b"[]")
    assert place.run("2.2", "--verify") == 1
    assert "model_index.json: has the right size but other content" in capsys.readouterr().out
    (place.out / NAME / download.RECORD).unlink()  # then the hub is asked of what is there, too
    assert place.run() == 0 and place.hub.bodies == ["model_index.json"]
    names = FILES if known == "nothing" else ["model_index.json"]
    record = {"files": {name: record["files"][name] for name in names}}
    assert json.loads((place.out / NAME / download.RECORD).read_text()) == record


@pytest.mark.parametrize(
    "broken", ["{", "[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}']
)
def test_a_broken_record_is_one_line(place, capsys, broken):
    (place.out / NAME).mkdir(parents=True)
    (place.out / NAME / download.RECORD).write_text(broken)
    assert place.run() == 2
    assert download.RECORD in one_line(capsys)


def test_a_cut_connection_resumes_where_it_was_cut(place, patience):
    content = random.Random(1).randbytes(25 * 2**20)
    place.publish(NAME, {**FILES, WEIGHTS: content})
    place.hub.faults[WEIGHTS] = Fault(cut_after=22 * 2**20, times=1)
    assert place.run() == 0
    assert place.there() == {**FILES, WEIGHTS: content}
    pieces = [r for method, name, r in place.hub.requests if (method, name) == ("GET", WEIGHTS)]
    assert pieces == [None, f"bytes={20 * 2**20}-"]  # the library writes pieces of 10 MiB
    assert place.hub.sent < 1.15 * len(content) + 2**20


DAMAGES = {
    "corrupted": (Fault(content=b"x" * len(FILES[WEIGHTS])), "has the right size but other content (sha256)"),
    "shorter": (Fault(content=FILES[WEIGHTS][:-1]), "should be of size 100000 but has size 99999"),
    "longer": (Fault(content=FILES[WEIGHTS] + b"x"), "should be of size 100000 but has size 100001"),
    "always cut": (Fault(cut_after=1000), "no connection for"),
    "reset": (Fault(reset_after=1000), "no connection for"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_transfer_is_refused_and_removed(place, patience, capsys, damage):
    place.hub.faults[WEIGHTS], message = DAMAGES[damage]
    assert place.run() == 2
    err = one_line(capsys)
    assert message in err and "run the same command again" in err and WEIGHTS in err
    assert place.there() == {"model_index.json": FILES["model_index.json"]}  # finished files stay, no others
    place.hub.faults.clear()
    place.hub.requests.clear()
    assert place.run() == 0 and place.there() == FILES
    assert "model_index.json" not in place.hub.bodies


def test_a_hub_with_another_file_is_refused_before_any_transfer(place, capsys):
    files = place.hub.files[f"someone/{NAME}", COMMIT]
    for content, found in (b"x" * 100_000, "sha256"), (b"x" * 7, "7 bytes, needs 100,000"):
        files[WEIGHTS] = content
        assert place.run() == 2
        err = one_line(capsys)
        assert "is not the manifest's file" in err and found in err and "nothing was fetched" in err
        assert place.hub.bodies == [] and place.there() == {}


def test_a_file_of_another_commit_is_refused(place, capsys):
    place.hub.commits[COMMIT] = OTHER
    assert place.run() == 2
    assert f"is of another commit, {OTHER}; nothing was fetched" in one_line(capsys)
    assert place.hub.bodies == [] and place.there() == {}


def test_without_a_pinned_commit_all_files_come_from_the_one_that_is_named(place, capsys):
    entry = place.publish(NAME, FILES, revision="main")
    place.hub.commits["main"] = COMMIT
    place.hub.files[entry["repository"], COMMIT] = FILES
    assert place.run() == 0 and place.there() == FILES
    assert place.hub.revisions == {COMMIT}
    assert f"no commit is pinned; main is now {COMMIT}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "status, message",
    [
        (401, "is gone, not public"),
        (403, "is gone, not public"),
        (404, "(404); see whether the repository was moved or renamed"),
        (429, "too many requests (429); wait some minutes"),
        (500, "the hub answers 500"),
        (503, "the hub answers 503"),
    ],
)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_what_the_hub_refuses_is_one_line(place, patience, capsys, method, status, message):
    place.hub.faults[WEIGHTS] = Fault(status=status, method=method)
    assert place.run() == 2
    err = one_line(capsys)
    assert message in err and WEIGHTS in err
    assert set(place.there()) == ({"model_index.json"} if method == "GET" else set())
    assert sum(patience) <= 60


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(place, patience):
    place.hub.faults[WEIGHTS] = Fault(status=429, times=2)
    assert place.run() == 0 and place.there() == FILES
    assert len(patience) == 2


def test_the_hubs_address_may_end_in_a_slash(place, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{place.hub.endpoint}/")
    assert place.run() == 0 and place.there() == FILES


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("endpoint", ["closed", "nonsense", "http://"])
def test_no_network_is_one_line_and_leaves_nothing(place, monkeypatch, capsys, endpoint):
    endpoint = f"http://127.0.0.1:{closed_port()}" if endpoint == "closed" else endpoint
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert place.run() == 2
    err = one_line(capsys)
    assert "no connection for" in err and "check the network" in err
    assert list(place.out.iterdir()) == []


def test_the_hub_librarys_offline_mode_is_named(place, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import
    assert place.run() == 2
    err = one_line(capsys)
    assert err.endswith(
        "/model_index.json is not fetched: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it\n"
    ), err
    assert place.hub.requests == []


@pytest.mark.parametrize(
    "error, reason",
    [(OSError("The quota is used up."), "The quota is used up"), (TimeoutError(), "TimeoutError")],
)
def test_a_failure_of_another_kind_keeps_its_reason(place, monkeypatch, capsys, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert place.run() == 2
    assert f": {reason}; run the same command again" in one_line(capsys)


@pytest.mark.parametrize(
    "size, said", [(999, "999 bytes"), (999_600, "1 MB"), (999_400, "999 kB"), (999_600_000, "1.00 GB")]
)
def test_sizes_are_said_in_three_digits(size, said):
    assert download._human(size) == said


def test_a_disk_that_is_too_small_is_found_before_anything_is_asked(place, capsys):
    place.repositories[NAME]["files"][WEIGHTS]["bytes"] = 10**18
    assert place.run() == 2
    err = one_line(capsys)
    assert "free, 1000000000.00 GB are needed" in err and "--only" in err
    assert place.hub.requests == [] and place.there() == {}


def linked(place: Place) -> Path:
    """The repository's folder as a link to an empty one elsewhere."""
    elsewhere = place.out.parent / "elsewhere"
    elsewhere.mkdir()
    place.out.mkdir()
    (place.out / NAME).symlink_to(elsewhere)
    return elsewhere


def test_a_folder_may_be_a_link_to_an_empty_one(place, capsys):
    elsewhere = linked(place)
    assert place.run() == 0 and contents(elsewhere) == FILES


def test_room_is_looked_for_where_the_folder_lies(place, monkeypatch, capsys):
    elsewhere, usage = linked(place), shutil.disk_usage(place.out)
    full = {"at": place.out}
    room = lambda path: usage._replace(free=0) if path.resolve() == full["at"] else usage  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", room)  # no second disk is at hand
    assert place.run() == 0
    (elsewhere / WEIGHTS).unlink()
    full["at"] = elsewhere
    assert place.run() == 2 and f"{elsewhere} has 0 bytes free" in one_line(capsys)


def test_what_a_killed_run_left_is_gone_before_room_is_looked_for(place, capsys):
    place.repositories[NAME]["files"][WEIGHTS]["bytes"] = 10**18
    left = place.out / NAME / ".cache" / "huggingface" / "download" / "x.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert place.run() == 2 and place.there() == {}
    assert "are needed" in one_line(capsys)


def test_files_that_are_there_need_no_more_room(place):
    assert place.run() == 0
    folder = place.out / NAME
    (repository,) = download.load_manifest(place.manifest)
    assert download._missing_bytes(repository, folder) == 0
    (folder / WEIGHTS).write_bytes(b"x" * 1000)
    assert download._missing_bytes(repository, folder) == 99_000


def test_a_disk_that_fills_up_on_the_way_is_one_line(place, monkeypatch, capsys):
    from huggingface_hub import file_download

    class FullDisk:
        """A file on a disk with room for so many bytes more."""

        def __init__(self, file, room: int):
            self.file, self.room = file, room

        def write(self, data: bytes) -> int:
            self.file.write(data[: self.room])
            self.file.flush()
            if len(data) > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(data)

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    transfer = file_download.http_get
    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", lambda url, f, **k: transfer(url, FullDisk(f, 5000), **k))
        assert place.run() == 2
    assert f"the disk is full at {place.out / NAME / WEIGHTS}; make room and run" in one_line(capsys)
    assert place.there() == {"model_index.json": FILES["model_index.json"]}
    assert place.run() == 0 and place.there() == FILES


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_it_ends_well_the_next_time(place, how):
    place.hub.faults[WEIGHTS] = Fault(hold_after=50_000, times=1)
    place.manifest.write_text(json.dumps({"repositories": place.repositories}))
    command = [sys.executable, SCRIPTS / "download_weights.py", "2.2", "--manifest", place.manifest]
    process = subprocess.Popen(
        [*command, "--out", place.out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
    )
    try:
        assert place.hub.held.wait(60)
        process.send_signal(how)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 130 and err.endswith(b"stopped\n") and err.count(b"\n") == 1
        assert set(place.there()) == {"model_index.json"}
    else:
        assert process.returncode == -signal.SIGKILL
        assert any(name.endswith(".incomplete") for name in place.there())  # the test is not idle
    place.hub.requests.clear()
    assert place.run() == 0 and place.there() == FILES
    assert place.hub.bodies == [WEIGHTS, "unet/config.json"]


def test_a_write_that_was_killed_leaves_no_orphan_after_the_next_run(place):
    orphans = []
    for name in (WEIGHTS, download.RECORD, download.ZERO_IMAGE):
        with atomic_file(place.out / NAME / name) as temporary:
            pass
        (place.out / NAME / name).unlink()
        temporary.write_bytes(b"half")  # as if the process had died before the rename
        orphans.append(temporary)
    assert place.run() == 0 and place.there() == FILES
    assert not any(orphan.exists() for orphan in orphans)


def test_two_downloads_into_one_folder_do_not_meet(place, capsys):
    with download._exclusive(place.out / NAME):
        assert place.run() == 2
        assert "another download into" in one_line(capsys)
    assert place.hub.requests == []
    assert place.run() == 0 and place.there() == FILES


OUTSIDE = [
    "../x",
    "a/../../x",
    "/etc/x",
    "a//x",
    "./x",
    "",
    "a/",
    "..",
    "C:/x",
    "C:x",
    "a\\..\\x",
    "\\\\x\\y",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["file", "folder", "pickle", "fallback"])
def test_names_that_point_outside_the_folder_are_refused(place, capsys, name, where):
    entry = place.repositories[NAME]
    if where == "file":
        entry["files"][name] = facts(b"")
    elif where == "folder":
        place.repositories = {name: entry}
    elif where == "pickle":
        entry["files"][WEIGHTS]["pickle"] = name
    else:
        entry["fallback"] = {"revision": OTHER, "files": {name: facts(b"")}}
    assert place.run() == 2
    assert "which is no plain path inside a folder" in one_line(capsys)
    assert place.hub.requests == [] and not place.out.exists()


@given(st.text(alphabet="ab./\\: C~\0", max_size=12))
@example("a..b/c")
def test_no_accepted_name_leaves_the_folder(name):
    try:
        download._check_name(name)
    except CheckpointError:
        return
    inside = os.path.normpath(f"/folder/{name}")
    assert inside == f"/folder/{name}" and name


def malformed(entry: dict, files: dict) -> list[dict]:
    first = next(iter(files))
    return [
        {},
        {"repositories": []},
        {"repositories": {NAME: 3}},
        {"repositories": {NAME: {}}},
        {"repositories": {NAME: entry | {"files": 3}}},
        {"repositories": {NAME: entry | {"repository": "no owner"}}},
        {"repositories": {NAME: entry | {"files": {first: {}}}}},
        {"repositories": {NAME: entry | {"files": {first: {"bytes": -1, "sha256": None}}}}},
        {"repositories": {NAME: entry | {"files": {first: {"bytes": "7", "sha256": None}}}}},
        {"repositories": {NAME: entry | {"files": {first: {"bytes": 7, "sha256": "xyz"}}}}},
        {"repositories": {NAME: entry | {"files": {first: {"bytes": 7, "sha256": 7}}}}},
        {"repositories": {NAME: entry | {"files": {first: {"bytes": 7, "sha256": None, "pickle": 7}}}}},
        {"repositories": {NAME: entry | {"revision": 7}}},
        {"repositories": {NAME: entry | {"fallback": 7}}},
    ]


def test_a_malformed_manifest_is_one_line(place, capsys):
    for broken in malformed(place.repositories[NAME], FILES):
        place.manifest.write_text(json.dumps(broken))
        assert run("download_weights", "2.2", "--manifest", place.manifest, "--out", place.out) == 2, broken
        one_line(capsys)
    assert place.hub.requests == []


def pickled(model: torch.nn.Module, path: Path) -> bytes:
    torch.save(model.state_dict(), path)
    return path.read_bytes()


@pytest.fixture
def depth(hub, tmp_path) -> Place:
    """A hint checkpoint of which only the fallback's pickles are on the hub."""
    reference_unet(8, hint=True).save_pretrained(tmp_path / "made" / "unet")
    reference_movq(3).save_pretrained(tmp_path / "made" / "movq")
    unet, movq = reference_unet(8, hint=True, seed=1), reference_movq(3, seed=1)  # other content
    place = Place(hub, tmp_path)
    files = contents(tmp_path / "made")
    pickles = {
        "movq/diffusion_pytorch_model.bin": pickled(movq, tmp_path / "movq.bin"),
        "unet/diffusion_pytorch_model.bin": pickled(unet, tmp_path / "unet.bin"),
    }
    entry = place.publish(NAME, files, "controlnet-depth")
    fallback = {
        name.replace(".bin", ".safetensors"): {"pickle": name, **facts(content)}
        for name, content in pickles.items()
    }
    entry["fallback"] = {"revision": OTHER, "files": fallback}
    configs = {name: content for name, content in files.items() if name.endswith(".json")}
    hub.files = {(entry["repository"], OTHER): configs | pickles}
    return place


@pytest.mark.slow
def test_where_the_pinned_commit_is_gone_the_fallbacks_pickles_are_converted(depth, tmp_path, capsys):
    assert depth.run("2.2", "--only", "controlnet-depth") == 0
    assert f"{COMMIT[:8]} is gone; pickles of {OTHER[:8]} instead" in capsys.readouterr().out
    assert depth.there().keys() == {download.RECORD, *depth.repositories[NAME]["files"]}
    for part in ("unet", "movq"):
        converted = load_file(depth.out / NAME / part / "diffusion_pytorch_model.safetensors")
        pickle = torch.load(tmp_path / f"{part}.bin", weights_only=True)
        assert converted.keys() == pickle.keys()
        assert all(torch.equal(converted[key], tensor) for key, tensor in pickle.items())
    UNet.from_pretrained(depth.out / NAME / "unet")

    depth.hub.requests.clear()
    assert depth.run() == 0 and depth.run("2.2", "--verify") == 0 and depth.hub.requests == []
    weights = depth.out / NAME / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert depth.run("2.2", "--verify") == 1
    assert depth.run() == 0 and depth.run("2.2", "--verify") == 0
    assert depth.hub.bodies == ["unet/diffusion_pytorch_model.bin"]


def test_where_the_pinned_commit_is_there_no_pickle_is_fetched(depth, tmp_path):
    repository = depth.repositories[NAME]["repository"]
    depth.hub.files[repository, COMMIT] = contents(tmp_path / "made")
    assert depth.run() == 0 and depth.there() == contents(tmp_path / "made")
    assert not any(name.endswith(".bin") for name in depth.hub.bodies)


def test_a_pickle_whose_conversion_was_killed_is_not_fetched_again(depth):
    assert depth.run() == 0
    name = "unet/diffusion_pytorch_model.bin"
    (content,) = (files[name] for files in depth.hub.files.values())
    (depth.out / NAME / WEIGHTS).unlink()
    (depth.out / NAME / name).write_bytes(content)
    depth.hub.requests.clear()
    assert depth.run() == 0 and depth.hub.bodies == []
    assert WEIGHTS in depth.there() and name not in depth.there()


def test_without_a_fallback_a_commit_that_is_gone_is_one_line(place, capsys):
    place.hub.files.clear()
    assert place.run() == 2
    assert "(404)" in one_line(capsys)


def test_another_image_tower_takes_its_zero_image_along(whole):
    assert whole.run() == 0
    prior = whole.out / "kandinsky-2-2-prior"
    stored = (prior / download.ZERO_IMAGE).read_bytes()
    (prior / download.ZERO_IMAGE).write_bytes(b"damaged")
    assert whole.run() == 0 and (prior / download.ZERO_IMAGE).read_bytes() == stored

    (prior / download.ZERO_IMAGE).unlink()
    tower = prior / "image_encoder" / "model.safetensors"
    other = {name: tensor * 2 for name, tensor in load_file(tower).items()}
    download.write_safetensors(other, tower)
    download.store_zero_image_embeds(prior, say=lambda line: None)
    assert (prior / download.ZERO_IMAGE).read_bytes() != stored
    assert whole.run() == 0  # fetches the tower again
    assert (prior / download.ZERO_IMAGE).read_bytes() == stored


def test_a_full_disk_under_the_zero_image_is_one_line(whole, capsys):
    assert whole.run() == 0
    stored = whole.out / "kandinsky-2-2-prior" / download.ZERO_IMAGE
    content = stored.read_bytes()
    stored.unlink()
    with largest_file(100):
        manifest = ("--manifest", whole.manifest, "--out", whole.out)
        assert run("download_weights", "2.2", *manifest) == 2
    assert f"{stored} was not written" in one_line(capsys)
    assert whole.run() == 0 and stored.read_bytes() == content
    assert not [path for path in stored.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "error, reason",
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a trace"),
            "DefaultCPUAllocator: .* memory",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_too_little_memory_for_the_zero_image_says_that_all_files_are_there(
    tmp_path, monkeypatch, error, reason
):
    def fail(prior):
        raise error

    monkeypatch.setattr(zero_image, "compute_zero_image_embeds", fail)
    with pytest.raises(MemoryError, match=rf"\({reason}\); all files are downloaded"):
        download.store_zero_image_embeds(tmp_path, say=lambda line: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give either a model (2.2, 2.1 or all) or --convert FILE; see --help"),
        (
            ["2.2", "--convert", "x.bin"],
            "give either a model (2.2, 2.1 or all) or --convert FILE; see --help",
        ),
        (["3.0"], "invalid choice: '3.0'"),
        (["--convert", "x", "--verify"], "--verify goes with a model (2.2, 2.1 or all) only; see --help"),
        (["--convert", "x", "--only", "prior"], "--only goes with a model (2.2, 2.1 or all) only"),
        (["--convert", "x", "--manifest", "m"], "--manifest goes with a model (2.2, 2.1 or all) only"),
        (["2.2", "--clip-stats", "nofile"], "--clip-stats goes with --convert FILE only; see --help"),
        (["2.2", "--overwrite"], "--overwrite goes with --convert FILE only"),
        (["2.2", "--out", ""], "--out is empty; a folder is needed"),
        (["2.2", "--only", "unet"], "argument --only: invalid choice: 'unet'"),
        (
            ["2.1", "--only", "controlnet-depth"],
            "2.1 has no controlnet-depth; it has prior, decoder, inpaint",
        ),
        (["2.2", "--manifest", "nowhere.json"], "no such file: nowhere.json"),
    ],
)
def test_wrong_arguments_are_one_line_with_exit_code_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert run("download_weights", *argv) == 2
    assert message in one_line(capsys) and not list(tmp_path.iterdir())


def test_help_explains_every_flag(capsys):
    assert run("download_weights", "--help") == 0
    shown = capsys.readouterr().out
    flags = "--only --verify --convert --clip-stats --out --overwrite --manifest".split()
    assert all(re.search(rf"^  {flag}( |$)", shown, re.MULTILINE) for flag in flags)
    assert "{prior,decoder,inpaint,controlnet-depth}" in shown and "{2.2,2.1,all}" in shown


MANIFEST = json.loads((cli.WEIGHTS / "manifest.json").read_text())["repositories"]


def document(*parts: str) -> Path:
    path = SHARED.joinpath("checkpoints", *parts)
    if not path.exists():
        pytest.skip("needs the project's documents")
    return path


def test_the_manifest_is_read_and_every_model_and_part_is_in_it():
    repositories = download.load_manifest(cli.WEIGHTS / "manifest.json")
    assert {r.name for r in repositories} == set(MANIFEST)
    parts = ["prior", "decoder", "inpaint"]
    assert sorted(r.part for r in download.select(repositories, "2.1")) == sorted(parts)
    assert sorted(r.part for r in download.select(repositories, "2.2")) == sorted(
        [*parts, "controlnet-depth"]
    )
    assert download.select(repositories, "all") == repositories
    assert all(r.repository == f"kandinsky-community/{r.name}" for r in repositories)


@pytest.mark.parametrize("name", MANIFEST)
def test_the_manifests_small_files_are_the_official_ones(name):
    folder = document("official_small_files", name)
    known = {n: f for n, f in MANIFEST[name]["files"].items() if not n.endswith((".safetensors", ".model"))}
    is_exact = name.startswith("kandinsky-2-2")  # the others are retyped, so their hashes are not known
    official = {n for n in contents(folder) if n != "README.md"}
    assert not is_exact or official == set(known)
    for file, entry in known.items():
        if is_exact:
            assert entry == facts((folder / file).read_bytes()), file
        else:
            assert entry["sha256"] is None


@pytest.mark.parametrize("name", MANIFEST)
def test_the_manifests_weights_and_commits_are_those_of_the_facts(name):
    text = document("FACTS.md").read_text(encoding="utf-8")
    entry = MANIFEST[name]
    (row,) = re.findall(rf"^\| {name} \|.*$", text, re.MULTILINE)
    commits = re.findall(r"\b[0-9a-f]{40}\b", row)
    fallback = [entry["fallback"]["revision"]] if "fallback" in entry else []
    assert [*fallback, entry["revision"]] == (commits or ["main"])
    for pickle in entry.get("fallback", {"files": {}})["files"].values():
        assert f"{pickle['bytes']:,} (sha {pickle['sha256']}..." in text
    for file, known in entry["files"].items():
        if not file.endswith(".safetensors"):
            continue
        keys = document("keys", f"{name}__{file.split('/')[0]}.keys.txt").read_text()
        sizes = json.loads(re.search(r"official size\(s\)=(\[[\d, ]+\])", keys)[1])
        assert known["bytes"] == sizes[0]  # the first is main's
        if known["sha256"]:
            lines = [line for line in text.splitlines() if f"{known['bytes']:,}" in line]
            assert any(known["sha256"] in line for line in lines), file


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_manifests_sizes_are_those_of_our_networks(name):
    repository, part = name.split("__")
    sizes = {n.split("/")[0]: f["bytes"] for n, f in MANIFEST[repository]["files"].items() if "safet" in n}
    network, config = OFFICIAL[name]
    with torch.device("meta"):
        tensors = network(config).state_dict()
    positions = {"text_encoder": ("text_model", 77), "image_encoder": ("vision_model", 257)}
    tower, count = positions.get(part, (None, None))
    stale = {f"{tower}.embeddings.position_ids": [1, count]} if tower else {}
    assert sizes[part] == predicted_bytes(tensors, stale, "F16" if part == "image_encoder" else "F32")
