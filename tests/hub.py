"""A stand-in of the hub on loopback: what huggingface_hub asks for, and the faults a network has."""

import hashlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

REVISION = "a" * 40


@dataclass
class Fault:
    """What goes wrong with a file's transfer; `times` limits how often."""

    status: int | None = None  # answer this instead
    method: str = "GET"
    cut_at: int | None = None  # close the connection after so many bytes
    hang_at: int | None = None  # send so many bytes, then nothing
    body: bytes | None = None  # send this instead
    times: int = 10**6


@dataclass
class Hub:
    """Files by (repository, revision, name); `log` lists (method, name, range) of every request answered."""

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    reached: threading.Event = field(default_factory=threading.Event)  # a transfer hangs
    closing: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""

    def transfers(self) -> list[str]:
        return [name for method, name, _ in self.log if method == "GET"]

    def ranges(self, wanted: str) -> list[str | None]:
        return [asked for method, name, asked in self.log if method == "GET" and name == wanted]

    def fault(self, method: str, name: str) -> Fault | None:
        fault = self.faults.get(name)
        if fault is None or fault.method != method or fault.times == 0:
            return None
        fault.times -= 1
        return fault


def is_large(name: str) -> bool:
    """What the real hub keeps in another storage, to which it redirects."""
    return name.endswith((".safetensors", ".bin"))


def etag(name: str, content: bytes) -> str:
    """sha256 for large files, git's name for small ones, as on the real hub."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer("HEAD")

    def do_GET(self):
        self._answer("GET")

    def _answer(self, method: str) -> None:
        path = unquote(self.path).lstrip("/")
        in_storage = path.startswith("storage/")
        repository, _, rest = path.removeprefix("storage/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        content = self.hub.files.get((repository, revision, name))
        if content is None:
            return self._say(404, {"X-Error-Code": "RevisionNotFound"})
        redirects = is_large(name) and not in_storage
        if method == "GET" and not redirects:
            self.hub.log.append((method, name, self.headers.get("Range")))
        elif method == "HEAD":
            self.hub.log.append((method, name, None))
        fault = None if redirects and method == "GET" else self.hub.fault(method, name)
        if fault is not None and fault.status is not None:
            return self._say(fault.status, {"Retry-After": "0"})
        headers = {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if redirects:
            port = self.server.server_address[1]
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": headers["ETag"]}
            return self._say(302, headers | {"Location": f"http://localhost:{port}/storage/{path}"})
        self._send(content, headers, fault, method == "HEAD")

    def _send(self, content: bytes, headers: dict, fault: Fault | None, head_only: bool) -> None:
        if fault is not None and fault.body is not None:
            content = fault.body
        start, size = 0, len(content)
        asked = self.headers.get("Range")
        if asked and not head_only:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(size - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if head_only:
            return
        cut = None if fault is None else fault.cut_at if fault.hang_at is None else fault.hang_at
        self.wfile.write(content[start:cut])
        self.wfile.flush()
        if fault is not None and fault.hang_at is not None:
            self.hub.reached.set()
            self.hub.closing.wait(30)
        self.close_connection = cut is not None

    def _say(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):  # a client that was killed is no news
        pass


@contextmanager
def running(hub: Hub):
    server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
