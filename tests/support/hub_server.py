"""A Hub on loopback, for the real client: point it there with `HF_ENDPOINT` and `HF_HUB_DISABLE_XET=1`.

There are two servers: the Hub itself, and the storage of large files on a port of its own. `requests` lists the requests, `fail` adds
faults, and hub_routes.py has the answers.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hub_routes import HubRoutes, Problem, Routes, StorageRoutes
from hub_store import Blob, Repo, is_large


@dataclass
class Request:
    number: int  # from 1
    method: str
    path: str
    body: bytes
    range: str | None = None


@dataclass
class Fault:
    """A fault of the next `times` requests that match `where`, after `skip` of them have succeeded."""

    where: Callable[[Request], bool]
    status: int | str  # "drop": the connection is closed without an answer; "cut": after half of it
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "a fault that the test asked for"
    times: int = 1
    skip: int = 0


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the broken connections of killed clients."""


class Hub:
    """The server. users: token -> name. A user may write only to repositories below the user's name."""

    def __init__(self, users: dict[str, str]) -> None:
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.leaks: list[str] = []  # requests to the storage that carried a token
        self.watch: Callable[[Request], None] = lambda request: None
        self.deaf = False  # the next answer is lost, though what was asked is done
        self.lock = threading.RLock()
        self.servers = [Server(("127.0.0.1", 0), _handler(self, place)) for place in (HubRoutes, StorageRoutes)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield self
        finally:
            for server in self.servers:
                server.shutdown()
                server.server_close()

    def fail(self, method: str, path: str, status: int | str, times: int = 1, skip: int = 0, **headers: str) -> None:
        """Let the next `times` requests of a method end with `status` if their path contains the regular expression `path`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(
            Fault(
                lambda asked: asked.method == method and re.search(path, asked.path) is not None,
                status,
                named,
                times=times,
                skip=skip,
            )
        )

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision of a repository."""
        commit = self.repos[repo].find(revision)
        assert commit is not None
        return {path: blob.content for path, blob in commit.files.items()}

    def put(self, repo: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """Make a repository with these files, as another user would."""
        made = self.repos.setdefault(repo, Repo(repo, private))
        made.commit("main", {path: Blob(content, is_large(path, len(content))) for path, content in files.items()}, "put there")
        return made


def _handler(hub: Hub, routes: type[Routes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self._body()
            with hub.lock:
                request = Request(len(hub.requests) + 1, self.command, self.path, body, self.headers.get("Range"))
                hub.requests.append(request)
                hub.watch(request)
                fault = self._fault(request)
            if fault is not None and fault.status == "drop":
                self.close_connection = True
                return
            try:
                if fault is not None and fault.status != "cut":
                    raise Problem(int(fault.status), fault.message, None, **fault.headers)
                with hub.lock:
                    status, headers, content = routes(hub, self, body).answer()
            except Problem as problem:
                status, headers = problem.status, problem.headers
                content = json.dumps({"error": problem.message}).encode()
            if hub.deaf:
                hub.deaf, self.close_connection = False, True
                return
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                cut = fault is not None and fault.status == "cut"
                self.wfile.write(content[: len(content) // 2] if cut else content)
                self.close_connection = self.close_connection or cut

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _fault(self, request: Request) -> Fault | None:
            for fault in hub.faults:
                if fault.times and fault.where(request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
            return None

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
