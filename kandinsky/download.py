"""Fetches the official checkpoints and says whether a folder holds them.

A manifest lists repositories, revisions and, for every file, what is known of it: bytes and sha256. A file
counts only when it agrees: what is there and right is never transferred again, what arrives and is wrong is
removed. What the manifest does not know is held against what the hub says of the file, and kept in the
folder's `downloaded.json`, so that `verify` needs no network.

huggingface_hub does the transfer: it resumes a connection that was cut, and starts a file again whose
transfer was killed. It is imported when used, and told to use plain HTTP.
"""

import errno
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from kandinsky.checkpoint import (
    CheckpointError,
    open_safetensors,
    read_json,
    temporaries,
    write_json,
    write_safetensors,
)

RECORD = "downloaded.json"
ZERO_IMAGE = "zero_image_embeds.safetensors"
_LEFTOVERS = Path(".cache", "huggingface")  # where the hub library keeps its temporaries
_SPARE = 2**26  # bytes kept free beside the files

Say = Callable[[str], Any]


class DownloadError(OSError):
    """A transfer that failed: what happened, and what to do."""


@dataclass(frozen=True)
class File:
    """What is known of a file; None, or a sha256 shorter than 64 digits, where all of it is not."""

    bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # the hub's name for small files
    pickle: str | None = None  # its name in the repository, where it is to be converted after its arrival

    @property
    def is_known(self) -> bool:
        return bool(self.sha256 or self.git_sha1)

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file at `path`, or None."""
        if not path.is_file():
            return "missing"
        size = path.stat().st_size
        if self.bytes is not None and size != self.bytes:
            return f"has {size:,} bytes, needs {self.bytes:,}"
        if self.sha256 and not _sha256(path).startswith(self.sha256):
            return "has the right size but other content (sha256)"
        if self.git_sha1 and _git_sha1(path) != self.git_sha1:
            return "has other content than the hub's (git sha1)"
        return None


@dataclass(frozen=True)
class Repository:
    """One repository of the manifest; `name` is also its folder's."""

    name: str
    repository: str
    revision: str
    model: str
    part: str
    files: dict[str, File]
    fallback: "Repository | None" = None  # where the revision is gone

    def with_record(self, folder: Path) -> "Repository":
        """The same, with what the folder's record knows besides: of files the manifest knows less of."""
        record = _read_record(folder)
        return replace(self, files={n: _recorded(file, record.get(n), n) for n, file in self.files.items()})


def load_manifest(path: Path) -> list[Repository]:
    """Reads a manifest; a name that points outside its folder, or a malformed value, is a CheckpointError."""
    repositories = read_json(path).get("repositories")
    if not isinstance(repositories, dict) or not repositories:
        raise CheckpointError(f"{path} lists no repositories")
    try:
        return [_repository(name, entry) for name, entry in repositories.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a manifest ({type(error).__name__}: {error})") from None


def select(
    repositories: list[Repository], model: str, parts: Sequence[str] | None = None
) -> list[Repository]:
    """Those of a model ("2.2", "2.1" or "all") and, where given, of some parts."""
    of_model = [r for r in repositories if model in ("all", r.model)]
    known = list(dict.fromkeys(r.part for r in of_model))
    if not known:
        raise ValueError(f"no model {model!r}")
    for part in parts or ():
        if part not in known:
            raise ValueError(f"{model} has no {part}; it has {', '.join(known)}")
    return [r for r in of_model if parts is None or r.part in parts]


def verify(repositories: list[Repository], out: Path, say: Say = print) -> list[str]:
    """What is wrong with the downloaded folders in `out`, one line each; uses no network."""
    problems = []
    for repository in repositories:
        folder = Path(out) / repository.name
        if not folder.is_dir():
            problems.append(f"{folder}: not downloaded")
            continue
        known = repository.with_record(folder)
        say(f"{folder}: checking {len(known.files)} files")
        for name, file in known.files.items():
            problem = file.problem(folder / name)
            if problem:
                problems.append(f"{folder / name}: {problem}")
            elif not file.is_known:
                say(f"{folder / name}: no hash is known of it; only that it is there was checked")
        if (folder / ZERO_IMAGE).exists() and not _has_zero_image(folder):
            problems.append(f"{folder / ZERO_IMAGE}: damaged; remove it and download again")
    return problems


def download(
    repositories: list[Repository], out: Path, endpoint: str | None = None, say: Say = print
) -> None:
    """Brings every file of the repositories into `out`/<repository name>, and each prior's zero image.

    Args:
        endpoint: another hub than the official one.
        say: takes a line of progress.

    Raises:
        DownloadError: no space, no network, a file that is gone, or one that is not the manifest's.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for repository in repositories:  # what killed runs left takes room
        _sweep(out / repository.name, [*repository.files, RECORD, ZERO_IMAGE])
    _check_disks(repositories, out)
    for repository in repositories:
        fetch = _Fetch(repository, out / repository.name, endpoint and endpoint.rstrip("/"), say)
        wanted = fetch.wanted()
        if wanted:  # a whole folder may be read-only
            with _exclusive(fetch.folder):
                fetch.run(wanted)
    for repository in repositories:
        if "image_encoder/config.json" in repository.files:
            store_zero_image_embeds(out / repository.name, say)


def store_zero_image_embeds(prior: Path, say: Say = print) -> None:
    """Computes the embedding of the zero image and keeps it in the prior's folder, unless it is there."""
    path = prior / ZERO_IMAGE
    if _has_zero_image(prior):
        return
    from kandinsky.zero_image import compute_zero_image_embeds

    say(f"{path}: computing it, once")
    try:
        embeds = compute_zero_image_embeds(prior)
    except (RuntimeError, MemoryError) as error:  # the CPU's lack of memory has no class of its own
        raise MemoryError(
            f"{path} was not computed ({_first_line(error)}); all files are downloaded, and the "
            "pipeline computes it when it is needed"
        ) from error
    write_safetensors({"zero_image_embeds": embeds}, path)


class _Fetch:
    """One repository's transfer."""

    def __init__(self, repository: Repository, folder: Path, endpoint: str | None, say: Say):
        self.repository, self.folder, self.endpoint, self.say = repository, folder, endpoint, say
        self.files, self.revision = repository.files, repository.revision

    def wanted(self) -> list[str]:
        """The files that are not there, or wrong, or of which nothing is known."""
        known = self.repository.with_record(self.folder).files
        if any((self.folder / name).exists() for name in known):
            self.say(f"{self.folder}: checking what is there")
        wanted = [n for n, file in known.items() if not file.is_known or file.problem(self.folder / n)]
        if not wanted:
            self.say(f"{self.folder}: all {len(known)} files are there and right")
        return wanted

    def run(self, wanted: list[str]) -> None:
        sources = self._ask(wanted)
        wrong = [name for name in wanted if sources[name].problem(self.folder / name)]
        for i, name in enumerate(wrong, start=1):
            size = sources[name].bytes
            self.say(
                f"{self.repository.name} {i}/{len(wrong)}: {name}" + (f", {_human(size)}" if size else "")
            )
            self._bring(name, sources[name])
        for name in set(wanted).difference(wrong):
            self._record(name, sources[name])

    def _ask(self, names: list[str]) -> dict[str, File]:
        """What the manifest and the hub together know of each file, before anything is transferred."""
        try:
            return {name: self._ask_one(name) for name in names}
        except _Gone:
            if self.repository.fallback is None:
                raise
        fallback = self.repository.fallback
        self.say(
            f"{self.repository.name}: {self.revision[:8]} is gone; pickles of {fallback.revision[:8]} instead"
        )
        self.files, self.revision = fallback.files, fallback.revision
        return {name: self._ask_one(name) for name in names}

    def _ask_one(self, name: str) -> File:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        file = self.files[name]
        where = {"revision": self.revision, "endpoint": self.endpoint}
        url = hf_hub_url(self.repository.repository, file.pickle or name, **where)
        with _explained(url):
            hub = get_hf_file_metadata(url, endpoint=self.endpoint)
        if hub.commit_hash and hub.commit_hash != self.revision:
            if re.fullmatch("[0-9a-f]{40}", self.revision):
                raise DownloadError(f"{url} is of another commit, {hub.commit_hash}; nothing was fetched")
            self.say(f"{self.repository.name}: no commit is pinned; {self.revision} is now {hub.commit_hash}")
            self.revision = hub.commit_hash  # so that every file comes from the same commit
        return _combined(file, hub, url)

    def _bring(self, name: str, file: File) -> None:
        """One file: transferred, held against what is known of it, converted where it is a pickle."""
        from huggingface_hub import hf_hub_download

        source = self.folder / (file.pickle or name)
        if name.startswith("image_encoder/"):
            (self.folder / ZERO_IMAGE).unlink(missing_ok=True)  # the former tower's
        if file.problem(source):  # a pickle may be there and right, its conversion killed
            source.unlink(missing_ok=True)
            where = {"revision": self.revision, "endpoint": self.endpoint, "local_dir": self.folder}
            with _explained(str(source)):
                hf_hub_download(self.repository.repository, file.pickle or name, **where)
        problem = file.problem(source)
        if problem:
            source.unlink(missing_ok=True)
            raise DownloadError(f"{source} {problem}; it was removed: run the same command again")
        if file.pickle:
            self._convert(source, name)
        self._record(name, file)

    def _convert(self, source: Path, name: str) -> None:
        from kandinsky.convert import convert

        self.say(f"{self.repository.name}: converting {source.name}")
        check_space(self.folder, source.stat().st_size)
        convert(source, (self.folder / name).parent, overwrite=True)
        source.unlink()

    def _record(self, name: str, file: File) -> None:
        """Keeps what the manifest does not know of a file that was found right."""
        if len(self.files[name].sha256 or "") == 64 and not file.pickle:
            return
        target, record = self.folder / name, _read_record(self.folder)
        is_hashed = len(file.sha256 or "") == 64 and not file.pickle
        entry = {"bytes": target.stat().st_size, "sha256": file.sha256 if is_hashed else _sha256(target)}
        record[name] = entry | ({"converted": True} if file.pickle else {})
        write_json({"files": record}, self.folder / RECORD)


class _Gone(DownloadError):
    """The hub has no such file or revision."""


def _repository(name: str, entry: dict[str, Any]) -> Repository:
    _check_name(name, single=True)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", entry["repository"]):
        raise CheckpointError(f"{entry['repository']!r} is not a repository's name, owner/name")
    files = {_check_name(n): _file(n, facts) for n, facts in entry["files"].items()}
    known = (name, entry["repository"], entry["revision"], entry["model"], entry["part"])
    if "fallback" not in entry:
        return Repository(*known, files)
    pickles = {_check_name(n): _file(n, facts) for n, facts in entry["fallback"]["files"].items()}
    fallback = replace(Repository(*known, files | pickles), revision=entry["fallback"]["revision"])
    return Repository(*known, files, fallback)


def _file(name: str, facts: dict[str, Any]) -> File:
    size, sha256, pickle = facts["bytes"], facts["sha256"], facts.get("pickle")
    if not (size is None or (type(size) is int and size >= 0)):
        raise CheckpointError(f"{name}: bytes is {size!r}; a whole number or null is needed")
    if not (sha256 is None or re.fullmatch("[0-9a-f]{8,64}", sha256)):
        raise CheckpointError(f"{name}: sha256 is {sha256!r}; 8 to 64 hexadecimal digits or null are needed")
    return File(size, sha256, pickle=None if pickle is None else _check_name(pickle))


def _check_name(name: str, single: bool = False) -> str:
    """A relative path with no way out of its folder, on any system."""
    parts = name.split("/")
    anchored = PurePosixPath(name).is_absolute() or any(PureWindowsPath(p).anchor for p in [name, *parts])
    if anchored or "\\" in name or ":" in name or {"", ".", ".."} & set(parts) or (single and len(parts) > 1):
        raise CheckpointError(f"the manifest names {name!r}, which is no plain path inside a folder")
    return name


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """What the folder's record says of each file; nothing where there is none."""
    path = folder / RECORD
    files = read_json(path).get("files") if path.exists() else {}
    keys = {"bytes", "sha256"}
    if not isinstance(files, dict) or not all(isinstance(e, dict) and keys <= set(e) for e in files.values()):
        raise CheckpointError(f"{path} is no record of a download; remove it and download again")
    return files


def _has_zero_image(prior: Path) -> bool:
    try:
        return list(open_safetensors(prior / ZERO_IMAGE).keys()) == ["zero_image_embeds"]
    except CheckpointError:
        return False


def _recorded(file: File, entry: dict[str, Any] | None, name: str) -> File:
    """Of a converted file the record alone knows; of others it completes what the manifest knows."""
    if entry is None:
        return file
    noted = _file(name, entry)
    if entry.get("converted"):
        return noted
    agrees = file.bytes in (None, noted.bytes) and (noted.sha256 or "").startswith(file.sha256 or "")
    return noted if agrees else file


def _combined(file: File, hub: Any, what: str) -> File:
    """What the manifest and the hub's own metadata know; where they contradict each other, an error."""
    etag = hub.etag or ""
    sha256 = etag if re.fullmatch("[0-9a-f]{64}", etag) else None
    if None not in (file.bytes, hub.size) and file.bytes != hub.size:
        found, wanted = f"{hub.size:,} bytes", f"{file.bytes:,}"
    elif sha256 and file.sha256 and not sha256.startswith(file.sha256):
        found, wanted = f"sha256 {sha256[:8]}…", f"{file.sha256[:8]}…"
    else:
        git_sha1 = etag if re.fullmatch("[0-9a-f]{40}", etag) else None
        size = hub.size if file.bytes is None else file.bytes
        return replace(file, bytes=size, sha256=sha256 or file.sha256, git_sha1=git_sha1)
    raise DownloadError(f"{what} is not the manifest's file: {found}, needs {wanted}; nothing was fetched")


def _missing_bytes(repository: Repository, folder: Path) -> int:
    """Of the files that are not there in the right size; one to be replaced frees its own."""
    sizes = [(file.bytes, folder / name) for name, file in repository.files.items() if file.bytes]
    there = [(size, path.stat().st_size if path.is_file() else 0) for size, path in sizes]
    return sum(max(size - found, 0) for size, found in there)


def _check_disks(repositories: list[Repository], out: Path) -> None:
    """Whether there is room for all that is missing; a repository's folder may be a link to another disk."""
    places: dict[int, Path] = {}
    needed: dict[int, int] = {}
    for repository in repositories:
        folder = out / repository.name
        place = folder if folder.is_dir() else out
        disk = place.stat().st_dev
        places[disk] = place
        needed[disk] = needed.get(disk, 0) + _missing_bytes(repository.with_record(folder), folder)
    for disk, place in places.items():
        check_space(place, needed[disk])


def check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed and needed + _SPARE > free:
        raise DownloadError(
            f"{folder.resolve()} has {_human(free)} free, {_human(needed)} are needed; make room, fetch one "
            "part at a time with --only, or name a folder on another disk with --out"
        )


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keeps a second download out of the folder, and leaves none of the hub library's temporaries in it."""
    from filelock import FileLock, Timeout

    leftovers = folder / _LEFTOVERS
    leftovers.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(leftovers / "kandinsky.lock", timeout=0):
            try:
                with _plain_http():
                    yield
            finally:
                shutil.rmtree(leftovers, ignore_errors=True)
                for empty in (leftovers.parent, folder):
                    with suppress(OSError):  # it is not empty, or a link, or another disk is mounted there
                        empty.rmdir()
    except Timeout:
        raise DownloadError(f"another download into {folder} is running; wait for its end") from None


def _sweep(folder: Path, names: list[str]) -> None:
    """Removes what killed runs left: the hub library's temporaries, and `atomic_file`'s of these files."""
    orphans = [orphan for name in names for orphan in temporaries(folder / name)]
    if orphans or (folder / _LEFTOVERS).exists():
        with _exclusive(folder):
            for orphan in orphans:
                orphan.unlink(missing_ok=True)


@contextmanager
def _plain_http() -> Iterator[None]:
    """Plain HTTP and no warnings from huggingface_hub, whether or not it was imported before."""
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    constants.HF_HUB_DISABLE_XET = True
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # the library's own line on little space; ours stands in the error, where it comes to that
            warnings.filterwarnings("ignore", "Not enough free disk space")
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what the hub library raises into a DownloadError of one line."""
    try:
        yield
    except DownloadError:
        raise
    except Exception as error:
        # the library wraps a failed look-up of a file's metadata; the reason is the cause
        reason = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        kind = (
            _Gone if getattr(getattr(reason, "response", None), "status_code", None) == 404 else DownloadError
        )
        message = _explanation(reason, what)
        if message is None:
            raise
        raise kind(message) from error


def _explanation(error: BaseException, what: str) -> str | None:
    again = "run the same command again: finished files are kept"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk is full at {what}; make room and {again}"
    if status == 404:
        return f"the hub has no {what} (404); see whether the repository was moved or renamed"
    if status == 429:
        return f"the hub refuses {what} for now: too many requests (429); wait some minutes and {again}"
    if status in (401, 403):
        return f"the hub refuses {what} ({status}): it is gone, not public, or a saved token has expired"
    if status is not None:
        return f"the hub answers {status} for {what}; {again}"
    # httpx or httpx2, by the hub library's version
    if any(base.__name__ == "TransportError" for base in type(error).__mro__):
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        return f"no connection for {what} ({reason}); check the network or HTTPS_PROXY and {again}"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"{what} is not fetched: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it"
    if isinstance(error, OSError):
        return f"{what}: {_first_line(error).rstrip('.')}; {again}"
    return None


def _first_line(error: BaseException) -> str:
    """What it says, or its name: Python's own lack of memory and some time-outs say nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _git_sha1(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    digest.update(path.read_bytes())
    return digest.hexdigest()


def _human(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:  # which three digits do not round to 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
