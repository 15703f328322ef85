"""Answers of the Hub on loopback: the parts of the protocol that huggingface_hub uses to publish, list and download models."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import Blob, Commit, Repo, is_large

DATE = "2026-01-01T00:00:00.000Z"


class Problem(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


Answer = tuple[int, dict[str, str], bytes]


class Routes:
    """Answer one request. A route is a method named in `routes`, by HTTP method and path."""

    routes: tuple[tuple[str, str, str], ...] = ()

    def __init__(self, hub: Any, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.hub, self.body = hub, body
        self.method, self.headers = handler.command, handler.headers
        url = urlsplit(handler.path)
        self.path, self.query = url.path, parse_qs(url.query)
        found = re.fullmatch(r"Bearer (.*)", self.headers.get("Authorization") or "")
        self.token = found[1] if found else None
        self.user = hub.users.get(self.token or "")

    def answer(self) -> Answer:
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, self.path)
            if match and self.method in method.split("|"):
                return getattr(self, name)(*(unquote(part) if part else part for part in match.groups()))
        raise Problem(404, f"the test's Hub has no {self.method} {self.path}")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def reply(self, content: Any, status: int = 200, **headers: str) -> Answer:
        return status, headers, json.dumps(content).encode()


class HubRoutes(Routes):
    _REPO = r"([\w.-]+/[\w.-]+)"
    routes = (
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate"),
        ("GET", "/api/models", "models"),
        ("GET", f"/api/models/{_REPO}", "info"),
        ("GET", f"/api/models/{_REPO}/revision/([^/]+)", "info"),
        ("GET", f"/api/models/{_REPO}/tree/([^/]+)(?:/(.*))?", "tree"),
        ("POST", f"/api/models/{_REPO}/paths-info/([^/]+)", "paths"),
        ("GET", f"/api/models/{_REPO}/refs", "refs"),
        ("POST", f"/api/models/{_REPO}/branch/([^/]+)", "branch"),
        ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
        ("POST", f"/api/models/{_REPO}/commit/([^/]+)", "commit"),
        ("POST", f"/api/models/{_REPO}/discussions", "discuss"),
        ("GET", f"/api/models/{_REPO}/discussions/(\\d+)", "discussion"),
        ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", "batch"),
        ("GET|HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
    )

    # who may do what

    def answer(self) -> Answer:
        if self.token is not None and self.user is None:
            raise Problem(401, "Invalid credentials in Authorization header")
        return super().answer()

    def repo(self, name: str, write: bool = False) -> Repo:
        found = self.hub.repos.get(name)
        if found is None or (found.private and not self.owns(name)):
            raise Problem(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not self.owns(name):
            raise Problem(403, f"You don't have the rights to write to {name}")
        return found

    def owns(self, name: str) -> bool:
        return self.user is not None and name.startswith(f"{self.user}/")

    def at(self, name: str, revision: str, write: bool = False) -> tuple[Repo, Commit]:
        repo = self.repo(name, write)
        commit = repo.find(revision)
        if commit is None:
            raise Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    # accounts and repositories

    def whoami(self) -> Answer:
        if self.user is None:
            raise Problem(401, "Invalid username or password.")
        return self.reply({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> Answer:
        asked = self.json
        if self.user is None:
            raise Problem(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if not self.owns(name):
            raise Problem(403, f"You don't have the rights to create a model under the namespace {asked['organization']}")
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self.reply({"error": "You already created this model repo", "url": url}, 409)
        repo = self.hub.repos[name] = Repo(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit(
            "main", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}, "initial commit"
        )
        return self.reply({"url": url, "name": name, "id": name})

    def validate(self) -> Answer:
        """Check a card's metadata as the Hub does, for the rules that our cards could break."""
        match = re.match(r"---\n(.*?)\n---\n", self.json["content"], re.DOTALL)
        if match is None:
            return self.reply({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        errors = card_errors(yaml.safe_load(match[1]))
        return self.reply({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def models(self) -> Answer:
        wanted = self.query.get("filter", [])
        found = [
            self.about(repo, repo.refs["main"][-1])
            for repo in self.hub.repos.values()
            if not repo.private or self.owns(repo.name)
        ]
        found = [one for one in found if all(tag in one["tags"] for tag in wanted)]
        author = self.query.get("author")
        found = [one for one in found if not author or one["author"] == author[0]]
        start, most = int(self.query.get("cursor", ["0"])[0]), min(int(self.query.get("limit", ["1000"])[0]), 2)
        more = {}
        if start + most < len(found):  # pages of two, so that a client has to turn them
            query = "&".join(f"{name}={value}" for name, values in self.query.items() if name != "cursor" for value in values)
            more = {"Link": f'<{self.hub.url}/api/models?{query}&cursor={start + most}>; rel="next"'}
        return self.reply(found[start : start + most], **more)

    def info(self, name: str, revision: str = "main") -> Answer:
        return self.reply(self.about(*self.at(name, revision)))

    def about(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        card = commit.files.get("README.md")
        match = re.match(rb"---\n(.*?)\n---\n", card.content, re.DOTALL) if card else None
        data = yaml.safe_load(match[1]) if match else {}
        base = data.get("base_model")
        tags = [
            *data.get("tags", []),
            *([f"base_model:{base}", f"base_model:{data.get('base_model_relation')}:{base}"] if base else []),
        ]
        return {
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.oid,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "cardData": data,
            "siblings": [self.sibling(path, blob) for path, blob in commit.files.items()],
        }

    @staticmethod
    def entry(path: str, blob: Blob) -> dict[str, Any]:
        large = {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}} if blob.large else {}
        return {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content), **large}

    @staticmethod
    def sibling(path: str, blob: Blob) -> dict[str, Any]:
        large = (
            {"lfs": {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}} if blob.large else {}
        )
        return {"rfilename": path, "size": len(blob.content), "blobId": blob.oid, **large}

    # what a revision holds

    def tree(self, name: str, revision: str, under: str | None = None) -> Answer:
        _, commit = self.at(name, revision)
        prefix = f"{under}/" if under else ""
        inside = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
        if under and not inside:
            raise Problem(404, f"{under} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {prefix + path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path.removeprefix(prefix)}
        found = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        return self.reply(
            found + [self.entry(path, blob) for path, blob in inside.items() if recursive or "/" not in path.removeprefix(prefix)]
        )

    def paths(self, name: str, revision: str) -> Answer:
        _, commit = self.at(name, revision)
        wanted = parse_qs(self.body.decode())["paths"]
        return self.reply([self.entry(path, commit.files[path]) for path in wanted if path in commit.files])

    def refs(self, name: str) -> Answer:
        heads = {ref: history[-1].oid for ref, history in self.repo(name).refs.items()}
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid} for ref, oid in heads.items() if "/" not in ref
        ]
        pulls = [{"name": ref, "ref": ref, "targetCommit": oid} for ref, oid in heads.items() if "/" in ref]
        return self.reply({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def resolve(self, name: str, revision: str, path: str) -> Answer:
        _, commit = self.at(name, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Problem(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        common = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if not blob.large:
            return ranged(self.headers, blob.content, {**common, "ETag": f'"{blob.oid}"'})
        self.hub.storage.setdefault(blob.sha256, blob.content)
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        return 302, {**common, **linked, "ETag": f'"{blob.oid}"', "Location": f"{self.hub.storage_url}/{blob.sha256}"}, b""

    # writing

    def branch(self, name: str, branch: str) -> Answer:
        repo = self.repo(name, write=True)
        if branch in repo.refs:
            raise Problem(409, f"Reference already exists: refs/heads/{branch}")
        repo.refs[branch] = list(repo.refs["main"])
        return self.reply({})

    def preupload(self, name: str, revision: str) -> Answer:
        _, commit = self.at(name, revision, write=not self.query.get("create_pr"))
        modes = []
        for file in self.json["files"]:
            known = commit.files.get(file["path"])
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            oid = None if known is None else known.sha256 if known.large else known.oid
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.reply({"files": modes})

    def batch(self, name: str) -> Answer:
        self.repo(name)
        objects = []
        for wanted in self.json["objects"]:
            action = {"upload": {"href": f"{self.hub.storage_url}/{wanted['oid']}", "header": {}}}
            known = wanted["oid"] in self.hub.storage
            objects.append({**wanted, "authenticated": True, **({} if known else {"actions": action})})
        return self.reply({"transfer": "basic", "objects": objects})

    def commit(self, name: str, revision: str) -> Answer:
        pull = bool(self.query.get("create_pr")) or revision.startswith("refs/pr/")
        repo, head = self.at(name, revision, write=not pull)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head.oid):
            raise Problem(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self.apply(files, line["key"], line["value"])
        if self.query.get("create_pr"):
            revision = self.open_pull(repo, header["summary"])
        made = repo.commit(revision, files, header["summary"])
        number = revision.rpartition("/")[2] if pull else None
        url = f"{self.hub.url}/{name}/discussions/{number}" if pull else None
        return self.reply(
            {
                "success": True,
                "commitOid": made.oid,
                "commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}",
                "pullRequestUrl": url,
            }
        )

    def apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.storage:
                raise Problem(400, f"LFS pointer of {path} points to a file that is not there")
            files[path] = Blob(self.hub.storage[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Problem(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            raise Problem(400, f"the test's Hub knows no {key}")

    def open_pull(self, repo: Repo, title: str) -> str:
        repo.pulls.append(title)
        ref = f"refs/pr/{len(repo.pulls)}"
        repo.refs[ref] = list(repo.refs["main"])
        return ref

    def discuss(self, name: str) -> Answer:
        ref = self.open_pull(self.repo(name), self.json["title"])
        return self.reply({"num": int(ref.rpartition("/")[2])})

    def discussion(self, name: str, number: str) -> Answer:
        repo = self.repo(name)
        return self.reply(
            {
                "title": repo.pulls[int(number) - 1],
                "num": int(number),
                "author": {"name": self.user},
                "createdAt": DATE,
                "status": "draft",
                "repo": {"name": name, "type": "model"},
                "isPullRequest": True,
                "events": [],
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
            }
        )


class StorageRoutes(Routes):
    routes = (("PUT", "/([0-9a-f]{64})", "put"), ("GET|HEAD", "/([0-9a-f]{64})", "get"))

    def answer(self) -> Answer:
        if self.headers.get("Authorization"):
            self.hub.leaks.append(f"{self.method} {self.path}")
        return super().answer()

    def put(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Problem(400, "the content is not what its hash says")
        self.hub.storage[oid] = self.body
        return self.reply({})

    def get(self, oid: str) -> Answer:
        if oid not in self.hub.storage:
            raise Problem(404, "no such object")
        return ranged(self.headers, self.hub.storage[oid], {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"})


def ranged(asked: Any, content: bytes, headers: dict[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.get("Range") or "")
    if match is None:
        return 200, headers, content
    first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    if first >= len(content):
        raise Problem(416, "no such range", None, **{"Content-Range": f"bytes */{len(content)}"})
    part = content[first : last + 1]
    return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}, part


def card_errors(data: Any) -> list[str]:
    errors = []
    base = data.get("base_model")
    for name in [base] if isinstance(base, str) else base or []:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.fullmatch(r"[\w-]+", name):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of [adapter, finetune, merge, quantized]')
    for model in data.get("model-index", []):
        for result in model.get("results", []):
            errors += [
                f'"model-index[0].results.{part}" is required' for part in ("task", "dataset", "metrics") if part not in result
            ]
            errors += ['"dataset.type" is required' for _ in [0] if "type" not in result.get("dataset", {})]
            errors += ['"metrics.value" is required' for metric in result.get("metrics", []) if "value" not in metric]
    if "tags" in data and not all(isinstance(tag, str) for tag in data["tags"]):
        errors.append('"tags" must be an array of strings')
    return errors
