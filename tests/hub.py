"""A stand-in of the hub on loopback: what huggingface_hub asks of it, and the ways in which it can fail.

Small files are answered at once, named by their git sha1. Large ones (weights) are redirected to another
host name, as the real hub redirects to its storage, and offered through Xet too, which nobody here serves.
"""

import hashlib
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".model")


@dataclass
class Fault:
    """What goes wrong with a file's transfer, the next `times` times."""

    cut_after: int | None = None  # the connection closes after so many bytes
    reset_after: int | None = None  # it is reset instead
    hold_after: int | None = None  # nothing more comes until `Hub.release`
    content: bytes | None = None  # sent instead of the file's
    status: int | None = None
    method: str = "GET"
    times: int = 10**6


@dataclass
class Hub:
    """Repositories by name and revision; `requests` are (method, file, range) in their order."""

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    revisions: set[str] = field(default_factory=set)  # of which bodies were asked
    sent: int = 0  # bytes of bodies
    commits: dict[str, str] = field(default_factory=dict)  # what a branch's name stands for

    def __post_init__(self):
        self.held, self.released = threading.Event(), threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bodies(self) -> list[str]:
        """The files whose content was asked for, one entry a transfer or piece of it."""
        return [name for method, name, _ in self.requests if method == "GET"]

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fault(self, name: str, method: str) -> Fault | None:
        fault = self.faults.get(name)
        if fault is None or fault.method != method or fault.times == 0:
            return None
        fault.times -= 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, method: str) -> None:
        storage = self.path.startswith("/storage/")
        sent = self.requestline.split()[1]  # in `path` two slashes at the start are one
        match = re.fullmatch(r"(?:/storage)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(sent))
        repository, revision, name = match.groups() if match else ("", "", self.path)
        content = self.hub.files.get((repository, revision), {}).get(name)
        is_large = name.endswith(LARGE)
        if not (method == "GET" and is_large and not storage):  # its redirect has no body
            self.hub.requests.append((method, name, self.headers.get("Range")))
            self.hub.revisions |= {revision} if method == "GET" else set()
        fault = self.hub.fault(name, method) if storage or not is_large or method == "HEAD" else None
        if fault and fault.status:
            self.reply(fault.status, {})
        elif content is None:
            code = "EntryNotFound" if (repository, revision) in self.hub.files else "RevisionNotFound"
            self.reply(404, {"X-Error-Code": code})
        elif is_large and not storage:
            self.redirect(repository, revision, content)
        else:
            self.transfer(method, revision, content, fault)

    def redirect(self, repository: str, revision: str, content: bytes) -> None:
        self.reply(
            302,
            {
                "Location": f"http://localhost:{self.hub.port}/storage{self.path}",
                "X-Repo-Commit": self.hub.commits.get(revision, revision),
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Xet-Hash": "0" * 64,
                "X-Xet-Refresh-Route": f"/api/models/{repository}/xet-read-token/{revision}",
            },
        )

    def transfer(self, method: str, revision: str, content: bytes, fault: Fault | None) -> None:
        git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        headers = {"ETag": f'"{git_sha1}"', "X-Repo-Commit": self.hub.commits.get(revision, revision)}
        content = content if fault is None or fault.content is None else fault.content
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, headers, content[start:], fault, with_body=method == "GET")

    def reply(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes = b"",
        fault: Fault | None = None,
        with_body: bool = True,
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.send(body, fault or Fault())

    def send(self, body: bytes, fault: Fault) -> None:
        stops = [n for n in (fault.cut_after, fault.reset_after, fault.hold_after) if n is not None]
        try:
            self.wfile.write(body[: stops[0]] if stops else body)
            self.wfile.flush()
            self.hub.sent += len(body[: stops[0]] if stops else body)
            if fault.reset_after is not None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            elif fault.hold_after is not None:
                self.hub.held.set()
                self.hub.released.wait(60)
        except OSError:  # the other side was killed, or gave up
            pass
