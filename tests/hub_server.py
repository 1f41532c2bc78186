"""The hub, in one file, for tests: models and data sets over HTTP on 127.0.0.1, from the standard library alone.

It serves what ``huggingface_hub``, ``transformers``, ``sentence-transformers`` and ``datasets`` ask for: creating
repositories, commits (regular files and LFS uploads), branches, pull requests, listings, downloads with ranges,
private repositories with read and write tokens, and faults on request. Everything is kept in memory.

    with HubServer() as hub:
        hub.tokens = {"hf_good": {"name": "me", "role": "write"}}
        hub.add_repo("royokong/e5-v", "some/folder")
        subprocess.run([...], env={**os.environ, **hub.env(tmp_path, token="hf_good")})
        hub.files("me/e5v-nli-lora")["README.md"]

A process that has imported ``huggingface_hub`` has fixed its settings: pass ``endpoint=hub.url`` there, and make it go
online and leave Xet storage, which is not served, with `HubServer.attach`.

What differs from the real hub: a commit that is made over HTTP and names a path outside the repository is refused, as
there; `HubServer.add_repo` takes any name, so that a test can serve hostile ones. Metadata of cards is read only as far
as top-level keys go. There are no tags, gates, comments, rate limits, pages and multi-part uploads.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import socket
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".safetensors", ".parquet", ".arrow", ".model", ".onnx", ".npz", ".png", ".jpg", ".zip")
LFS_SIZE = 10 * 1024 * 1024  # bytes; larger files cannot be committed as regular ones
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
BAD_TOKEN = "Invalid credentials in Authorization header"
CARD_RELATIONS = {"adapter", "finetune", "merge", "quantized"}


# ---- what is stored ----


@dataclass(frozen=True)
class Blob:
    """The content of one file; `lfs` says how it was committed."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The git id: of the content, or of the pointer when the file is in LFS."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def lfs_info(self, sha_key: str) -> dict[str, Any]:
        if not self.lfs:
            return {}
        return {"lfs": {sha_key: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}}


Tree = dict[str, Blob]


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: Tree = field(repr=False)


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    target: str
    start: str
    head: str
    created: str
    status: str = "open"
    merged: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """One repository: every commit ever made, and the names that point to them."""

    kind: str
    name: str
    private: bool
    created: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict, repr=False)  # uploaded and verified, committed or not

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    @property
    def path(self) -> str:
        return self.name if self.kind == "model" else f"{self.kind}s/{self.name}"

    def head_of(self, ref: str) -> str | None:
        pulls = {pull.ref: pull.head for pull in self.pulls}
        return {**pulls, **self.branches}.get(ref.removeprefix("refs/heads/"))

    def find(self, revision: str) -> Commit:
        """The commit that a branch, `refs/pr/N` or an id (seven characters at least) names."""
        sha = self.head_of(revision)
        if sha is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            sha = next((known for known in self.commits if known.startswith(revision)), None)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def pull(self, num: int) -> PullRequest:
        if not 0 < num <= len(self.pulls):
            raise Refused(404, f"There is no discussion {num}")
        return self.pulls[num - 1]

    def record(self, tree: Tree, parent: str | None, title: str, message: str = "", author: str = "hub") -> Commit:
        """Store a commit. It becomes visible only when a ref is moved to it."""
        listing = sorted((path, blob.oid) for path, blob in tree.items())
        sha = hashlib.sha1(repr((self.name, parent, title, len(self.commits), listing)).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, message, author, _now(), tree)
        return self.commits[sha]

    def history(self, commit: Commit) -> list[Commit]:
        """The commit and its parents, newest first."""
        line = [commit]
        while line[-1].parent is not None:
            line.append(self.commits[line[-1].parent])
        return line


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _wants_lfs(path: str, size: int, sample: bytes) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample


def _read_source(source: Path | str | Mapping[str, bytes | str]) -> Tree:
    if isinstance(source, Mapping):
        items = {path: data.encode() if isinstance(data, str) else data for path, data in source.items()}
    else:
        root = Path(source)
        if not root.is_dir():
            raise NotADirectoryError(f"got {root}, wanted a folder or a dict of path -> bytes")
        found = [file for file in sorted(root.rglob("*")) if file.is_file() and ".git" not in file.parts]
        items = {file.relative_to(root).as_posix(): file.read_bytes() for file in found}
    return {path: Blob(data, _wants_lfs(path, len(data), data[:512])) for path, data in items.items()}


# ---- model cards ----


def card_data(text: str) -> dict[str, Any]:
    """Top-level keys of a card's front matter: strings and lists of strings; deeper levels are left out."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    data: dict[str, Any] = {}
    key = ""
    for line in block[1].splitlines() if block else []:
        if entry := re.match(r"([\w-]+):\s*(.*)", line):
            key, value = entry[1], entry[2].strip()
            flow = re.fullmatch(r"\[(.*)\]", value)
            data[key] = [_unquoted(item) for item in flow[1].split(",")] if flow else _unquoted(value) or []
        elif (item := re.match(r"\s{0,2}- (.*)", line)) and isinstance(data.get(key), list):
            data[key].append(_unquoted(item[1]))
    return data


def _unquoted(text: str) -> str:
    return text.strip().strip("'\"")


def card_errors(text: str) -> list[str]:
    """What the hub would refuse in a card's front matter, as far as it is checked here."""
    if not text.startswith("---"):
        return []
    block = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if block is None:
        return ["the metadata block that starts with --- is not closed"]
    lines = [line for line in block[1].splitlines() if line.strip()]
    bad = [line for line in lines if not re.match(r"[\w-]+:(\s|$)| *- | +\S|#", line)]
    relation = card_data(text).get("base_model_relation", "adapter")
    wrong = [] if relation in CARD_RELATIONS else [f'"base_model_relation" must be one of {sorted(CARD_RELATIONS)}']
    return [f"cannot read the line {line!r}" for line in bad] + wrong


def _tags(card: dict[str, Any]) -> list[str]:
    def listed(key: str) -> list[str]:
        value = card.get(key, [])
        return value if isinstance(value, list) else [value]

    named = [f"{key}:{value}" for key in ("base_model", "license", "dataset") for value in listed(key)]
    return [*listed("library_name"), *listed("tags"), *listed("language"), *named]


# ---- answers ----


class Reply(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class Refused(Exception):  # noqa: N818 (an answer, not a failure of this file)
    """A request that is answered with an error, in the way the hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message.splitlines()[0], **({"X-Error-Code": code} if code else {})}
        self.reply = _json({"error": message, **more}, status, headers)


def _no_repo(known_user: bool) -> Refused:
    # A private repository looks like a missing one; who is not logged in is told to log in first.
    return Refused(404 if known_user else 401, "Repository not found", "RepoNotFound")


@dataclass
class Call:
    """A request, with its route's named groups in `args` and the repository it is about, if any."""

    hub: HubServer
    args: dict[str, str]
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    user: dict[str, Any] | None

    @property
    def kind(self) -> str:
        return "dataset" if self.args.get("kind") == "datasets" else "model"

    @property
    def namespaces(self) -> list[str]:
        return [self.user["name"], *self.user.get("orgs", [])] if self.user else []

    @property
    def proposes(self) -> bool:
        return self.query.get("create_pr") == "1"

    @cached_property
    def repo(self) -> Repo:
        """The repository, if the user may see it."""
        repo = self.hub.repos.get((self.kind, self.args["repo"]))
        if repo is None or (repo.private and repo.namespace not in self.namespaces):
            raise _no_repo(self.user is not None)
        return repo

    @property
    def commit(self) -> Commit:
        return self.repo.find(self.args.get("rev") or "main")

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def need_writer(self) -> dict[str, Any]:
        """The user, who must hold a token that can write somewhere."""
        if self.user is None:
            # https clients read any 401 about a repository as "not found"; over http they need the code.
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if self.user["role"] != "write":
            raise Refused(403, "You must use a write token to do this")
        return self.user

    def need_member(self, namespace: str) -> dict[str, Any]:
        user = self.need_writer()
        if namespace not in self.namespaces:
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
        return user

    def need_rights(self, ref: str) -> dict[str, Any]:
        """Anybody who sees a repository may open a pull request and go on with it; the rest is for members."""
        own = any(pull.ref == ref and pull.author == self.need_writer()["name"] for pull in self.repo.pulls)
        return self.need_writer() if own or self.proposes else self.need_member(self.repo.namespace)


class Route(NamedTuple):
    method: str
    pattern: re.Pattern[str]
    answer: Callable[[Call], Reply]


ROUTES: list[Route] = []
_REPO = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
_REV = r"(?P<rev>refs/(?:pr|convert)/[^/]+|[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_GIT = rf"/(?:(?P<kind>datasets)/)?{_REPO}"


def route(method: str, pattern: str) -> Callable[[Callable[[Call], Reply]], Callable[[Call], Reply]]:
    def register(answer: Callable[[Call], Reply]) -> Callable[[Call], Reply]:
        ROUTES.append(Route(method, re.compile(pattern), answer))
        return answer

    return register


# ---- users and repositories ----


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Reply:
    if call.user is None:
        raise Refused(401, BAD_TOKEN)
    name, role = call.user["name"], call.user["role"]
    orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in call.user.get("orgs", [])]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return _json({"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": token})


def _wanted_repo(call: Call) -> tuple[str, str]:
    wanted = call.json()
    namespace = wanted.get("organization") or (call.user or {}).get("name", "")
    return wanted.get("type") or "model", f"{namespace}/{wanted['name']}"


def _repo_exists(hub: HubServer, kind: str, name: str) -> Refused:
    url = f"{hub.url}/{name}" if kind == "model" else f"{hub.url}/{kind}s/{name}"
    return Refused(409, f"You already created this {kind} repo: {name}", url=url)


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Reply:
    user = call.need_writer()
    kind, name = _wanted_repo(call)
    call.need_member(name.split("/")[0])
    if (kind, name) in call.hub.repos:
        raise _repo_exists(call.hub, kind, name)
    wanted = call.json()
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    repo = call.hub.repos[kind, name] = Repo(kind, name, private, _now())
    first = repo.record({".gitattributes": Blob(GITATTRIBUTES, lfs=False)}, None, "initial commit", "", user["name"])
    repo.branches["main"] = first.sha
    return _json({"url": f"{call.hub.url}/{repo.path}", "name": name, "id": name})


@route("GET", _API + "/auth-check(?P<write>/write)?")
def check_access(call: Call) -> Reply:
    if call.args.get("write"):
        call.need_member(call.repo.namespace)
    return _json({"id": call.repo.name})


@route("POST", "/api/validate-yaml")
def validate_card(call: Call) -> Reply:
    text = call.json()["content"]
    errors = [{"message": message} for message in card_errors(text)]
    warnings = [] if card_data(text) else [{"message": "empty or missing yaml metadata in repo card"}]
    return _json({"errors": errors, "warnings": warnings}, 400 if errors else 200)


# ---- reading ----


@route("GET", _API)
@route("GET", f"{_API}/revision/{_REV}")
def repo_info(call: Call) -> Reply:
    repo, commit = call.repo, call.commit
    blobs = call.query.get("blobs", "").lower() == "true"
    card = card_data(commit.tree["README.md"].data.decode()) if "README.md" in commit.tree else {}
    siblings = [{"rfilename": path, **(_sibling(blob) if blobs else {})} for path, blob in sorted(commit.tree.items())]
    info = {
        **{"_id": repo.name, "id": repo.name, "author": repo.namespace, "sha": commit.sha, "private": repo.private},
        **{"gated": False, "disabled": False, "downloads": 0, "likes": 0, "createdAt": repo.created},
        **{"lastModified": commit.date, "tags": _tags(card), "siblings": siblings, "cardData": card},
        **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
    }
    return _json(info | ({"modelId": repo.name} if repo.kind == "model" else {}))


def _sibling(blob: Blob) -> dict[str, Any]:
    return {"size": len(blob.data), "blobId": blob.oid, **blob.lfs_info("sha256")}


@route("GET", _API + "/refs")
def list_refs(call: Call) -> Reply:
    def rows(refs: Mapping[str, str], prefix: str = "") -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

    branches = {"branches": rows(call.repo.branches, "refs/heads/")}
    pulls = {"pullRequests": rows({pull.ref: pull.head for pull in call.repo.pulls})}
    return _json({"converts": [], "tags": [], **branches, **(pulls if "include_prs" in call.query else {})})


@route("GET", f"{_API}/commits/{_REV}")
def list_commits(call: Call) -> Reply:
    history = call.repo.history(call.commit)
    return _json([{**_commit_row(commit), "authors": [{"user": commit.author}]} for commit in history])


def _commit_row(commit: Commit) -> dict[str, Any]:
    return {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}


def _entries(call: Call) -> dict[str, dict[str, Any]]:
    """Path -> listing entry, of every file and every folder of the revision."""
    found: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(call.commit.tree.items()):
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            oid = hashlib.sha1(folder.encode()).hexdigest()
            found.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        found[path] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path, **blob.lfs_info("oid")}
    return found


@route("GET", f"{_API}/tree/{_REV}(?:/(?P<path>.+))?")
def list_tree(call: Call) -> Reply:
    entries, folder = _entries(call), call.args.get("path") or ""
    if folder and entries.get(folder, {}).get("type") != "directory":
        raise Refused(404, f"{folder} does not exist on the revision", "EntryNotFound")
    prefix = f"{folder}/" if folder else ""
    below = {path: entry for path, entry in entries.items() if path.startswith(prefix)}
    if call.query.get("recursive", "").lower() not in {"true", "1"}:
        below = {path: entry for path, entry in below.items() if "/" not in path.removeprefix(prefix)}
    return _json(list(below.values()))


@route("POST", f"{_API}/paths-info/{_REV}")
def paths_info(call: Call) -> Reply:
    form, entries = parse_qs(call.body.decode()), _entries(call)
    return _json([entries[path] for path in form.get("paths", []) if path in entries])


@route("GET", f"{_GIT}/resolve/{_REV}/(?P<path>.+)")
def resolve(call: Call) -> Reply:
    commit = call.commit
    blob = commit.tree.get(call.args["path"])
    known = {"X-Repo-Commit": commit.sha}
    if blob is None:
        refused = Refused(404, "Entry not found", "EntryNotFound").reply
        return refused._replace(headers={**refused.headers, **known})
    linked = {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))} if blob.lfs else {}
    headers = {**known, **linked, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    return _part(blob.data, call.headers.get("Range"), headers)


def _part(data: bytes, wanted: str | None, headers: dict[str, str]) -> Reply:
    """The whole content, or the range of it that was asked for."""
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if span is None:
        return Reply(200, data, headers)
    start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
    if start > end:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


# ---- writing ----


@route("POST", f"{_API}/preupload/{_REV}")
def preupload(call: Call) -> Reply:
    call.need_rights(call.args["rev"])
    commit, rows = call.commit, []
    for file in call.json()["files"]:
        lfs = _wants_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
        there = commit.tree.get(file["path"])
        row = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        rows.append({**row, **({"oid": there.etag} if there is not None and there.lfs == lfs else {})})
    return _json({"files": rows, "commitOid": commit.sha})


@dataclass
class Upload:
    """An LFS object that a client announced; it counts once it has been verified."""

    repo: Repo
    oid: str
    size: int
    data: bytes = b""


@route("POST", rf"{_GIT}\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Reply:
    call.need_writer()
    return _json({"transfer": "basic", "objects": [_lfs_object(call, asked) for asked in call.json()["objects"]]})


def _lfs_object(call: Call, asked: dict[str, Any]) -> dict[str, Any]:
    known = {"oid": asked["oid"], "size": asked["size"]}
    if not re.fullmatch(r"[0-9a-f]{64}", asked["oid"]):
        return {**known, "error": {"code": 422, "message": "the oid is not a sha256"}}
    if asked["oid"] in call.repo.lfs:
        return known
    key = uuid.uuid4().hex
    call.hub.uploads[key] = Upload(call.repo, **known)
    actions = {action: {"href": f"{call.hub.url}/lfs/{action}/{key}"} for action in ("upload", "verify")}
    return {**known, "actions": actions}


def _upload(call: Call) -> Upload:
    if call.args["key"] not in call.hub.uploads:
        raise Refused(404, "There is no such upload")
    return call.hub.uploads[call.args["key"]]


@route("PUT", "/lfs/upload/(?P<key>[0-9a-f]+)")
def lfs_upload(call: Call) -> Reply:
    _upload(call).data = call.body
    return Reply(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", "/lfs/verify/(?P<key>[0-9a-f]+)")
def lfs_verify(call: Call) -> Reply:
    call.need_writer()
    upload = _upload(call)
    del call.hub.uploads[call.args["key"]]
    got = hashlib.sha256(upload.data).hexdigest()
    if got != upload.oid:
        raise Refused(422, f"LFS object {upload.oid} was uploaded with another content: {got}")
    upload.repo.lfs[upload.oid] = upload.data
    return Reply()


@route("POST", f"{_API}/commit/{_REV}")
def create_commit(call: Call) -> Reply:
    repo, ref = call.repo, call.args["rev"]
    user = call.need_rights(ref)
    if repo.head_of(ref) is None:
        raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    header, *operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    if header["key"] != "header":
        raise Refused(400, "The first line of a commit must be its header")
    base = repo.find(ref)
    expected = header["value"].get("parentCommit")
    if expected and call.proposes:
        base = repo.find(expected)
    elif expected and not base.sha.startswith(expected):
        raise Refused(412, f"The expected parent commit is {expected}, but {ref} is at {base.sha}")
    tree = _changed(repo, base.tree, operations)
    text = header["value"]["summary"], header["value"].get("description", "")
    new = repo.record(tree, base.sha, *text, user["name"])
    url = _open_pull(call, new, ref) if call.proposes else _move(repo, ref, new.sha)
    done = {"success": True, "commitOid": new.sha, "commitUrl": f"{call.hub.url}/{repo.path}/commit/{new.sha}"}
    return _json({**done, "hookOutput": "", **({"pullRequestUrl": url} if url else {})})


def _move(repo: Repo, ref: str, sha: str) -> None:
    for pull in repo.pulls:
        if pull.ref == ref:
            pull.head = sha
            return
    repo.branches[ref] = sha


def _changed(repo: Repo, before: Tree, operations: list[dict[str, Any]]) -> Tree:
    """A copy of the tree with all operations applied; any that cannot be applied refuses the whole commit."""
    tree = dict(before)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = _safe(value["path"])
        if key == "file":
            tree[path] = _regular_file(path, value["content"])
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise Refused(400, f"LFS pointer of {path} pointed to a file that does not exist: {value['oid']}")
            tree[path] = Blob(repo.lfs[value["oid"]], lfs=True)
        elif key in {"deletedFile", "deletedFolder"}:
            folder = f"{path}/" if key == "deletedFolder" else None
            gone = [known for known in tree if known == path or (folder and known.startswith(folder))]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            tree = {known: blob for known, blob in tree.items() if known not in gone}
        else:
            raise Refused(400, f"Unknown operation {key!r}")
    return tree


def _safe(path: str) -> str:
    parts = path.rstrip("/").split("/")
    if "\\" in path or "\0" in path or any(part in {"", ".", "..", ".git"} for part in parts):
        raise Refused(400, f"Invalid path in a commit: {path!r}")
    return "/".join(parts)


def _regular_file(path: str, content: str) -> Blob:
    data = base64.b64decode(content, validate=True)
    if len(data) > LFS_SIZE:
        raise Refused(400, f"{path} is larger than {LFS_SIZE} bytes and must be uploaded with LFS")
    if path == "README.md" and (errors := card_errors(data.decode())):
        raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors))
    return Blob(data, lfs=False)


@route("POST", f"{_API}/branch/(?P<name>[^/]+)")
def create_branch(call: Call) -> Reply:
    call.need_member(call.repo.namespace)
    name, start = call.args["name"], call.json().get("startingPoint", "main")
    if name.startswith("refs/"):
        raise Refused(400, f"Invalid reference for a branch: {name}")
    if name in call.repo.branches:
        raise Refused(409, f"Reference already exists: {name}")
    call.repo.branches[name] = call.repo.find(start).sha
    return Reply()


# ---- pull requests ----


def _event(kind: str, author: str, **data: Any) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex[:24], "type": kind, "createdAt": _now(), "author": {"name": author}, "data": data}


def _comment(author: str, text: str) -> dict[str, Any]:
    return _event("comment", author, edited=False, hidden=False, latest={"raw": text})


def _open_pull(call: Call, head: Commit, target: str, status: str = "open") -> str:
    repo, start = call.repo, head.parent or head.sha
    num, text = len(repo.pulls) + 1, (head.title, head.message, head.author)
    pull = PullRequest(num, *text, target, start, head.sha, _now(), status)
    pull.events = [_comment(head.author, head.message), _event("commit", head.author, subject=head.title, oid=head.sha)]
    repo.pulls.append(pull)
    return f"{call.hub.url}/{repo.path}/discussions/{pull.num}"


def _pull_row(call: Call, pull: PullRequest) -> dict[str, Any]:
    return {
        **{"num": pull.num, "title": pull.title, "status": pull.status, "createdAt": pull.created},
        **{"author": {"name": pull.author}, "repo": {"name": call.repo.name, "type": call.repo.kind}},
        **{"isPullRequest": True, "events": pull.events, "filesWithConflicts": [], "diff": ""},
        "changes": {"base": f"refs/heads/{pull.target}", **({"mergeCommitId": pull.merged} if pull.merged else {})},
    }


@route("GET", _API + "/discussions")
def list_pulls(call: Call) -> Reply:
    rows = [_pull_row(call, pull) for pull in reversed(call.repo.pulls)]
    return _json({"discussions": rows, "count": len(rows), "start": 0})


@route("GET", _API + r"/discussions/(?P<num>\d+)")
def show_pull(call: Call) -> Reply:
    return _json(_pull_row(call, call.repo.pull(int(call.args["num"]))))


@route("POST", _API + "/discussions")
def create_pull(call: Call) -> Reply:
    user, wanted, main = call.need_writer(), call.json(), call.repo.find("main")
    if not wanted["pullRequest"]:
        raise Refused(501, "Only pull requests are served here, no other discussions")
    empty = call.repo.record(main.tree, main.sha, wanted["title"], wanted["description"], user["name"])
    _open_pull(call, empty, "main", "draft")
    return _json({"num": len(call.repo.pulls)})


@route("POST", _API + r"/discussions/(?P<num>\d+)/merge")
def merge_pull(call: Call) -> Reply:
    user = call.need_member(call.repo.namespace)
    repo, pull = call.repo, call.repo.pull(int(call.args["num"]))
    old, new = repo.commits[pull.start].tree, repo.commits[pull.head].tree
    target = repo.find(pull.target)
    kept = {path: blob for path, blob in target.tree.items() if path in new or path not in old}
    tree = kept | {path: blob for path, blob in new.items() if old.get(path) != blob}
    merged = repo.record(tree, target.sha, pull.title, pull.description, user["name"])
    repo.branches[pull.target] = pull.merged = merged.sha
    pull.status = "merged"
    return _json({"pullRequest": _pull_row(call, pull)})


# ---- faults ----


@dataclass
class Fault:
    """What goes wrong, for the next `times` requests whose "METHOD /path?query" matches `pattern`."""

    pattern: re.Pattern[str]
    kind: str
    times: float
    seconds: float


STATUS_FAULTS = {
    "401": (401, BAD_TOKEN),
    "403": (403, "You don't have the rights to do this"),
    "409": (409, "Another operation is in progress on this repository"),
    "500": (500, "Internal Error - We're working hard to fix this as soon as possible!"),
    "503": (503, "Service unavailable"),
}
FAULTS = {*STATUS_FAULTS, "drop", "drop-answer", "slow", "wrong-hash"}


def _damaged(data: bytes) -> bytes:
    return bytes([data[0] ^ 0xFF]) + data[1:] if data else data


# ---- the server ----

ENV_ON = ["HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"]
ENV_OFF = ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"]


class HubServer:
    """A hub on 127.0.0.1; use it as a context manager, or `start` and `stop` it.

    Attributes:
        tokens: token -> `{"name", "role": "read" or "write", "orgs": [...]}`; other tokens are refused. A user sees and
            changes the repositories under their name and under those of their `orgs`.
        requests: every request so far, as (method, path with query). The path is as it was sent, percent signs and all.
        unhandled: those of them that no route took: what a client wanted and this hub does not know.
        strays: requests to other hosts, which `env` leads here as to a proxy, and which are refused.
        sent: path -> bytes of content that went out for it.
    """

    def __init__(self) -> None:
        self.url = ""
        self.tokens: dict[str, dict[str, Any]] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, Upload] = {}
        self.requests: list[tuple[str, str]] = []
        self.unhandled: list[tuple[str, str]] = []
        self.strays: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> str:
        """Serve on a free port and return the base url. A stopped server starts again with what it held."""
        self._stopping.clear()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self.url

    def stop(self) -> None:
        """Go offline: open connections are cut too, or a client's pooled one would still be answered."""
        if self._server is None:
            return
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add_repo(
        self,
        repo_id: str,
        source: Path | str | Mapping[str, bytes | str],
        repo_type: str = "model",
        private: bool = False,
    ) -> str:
        """Commit a folder, or a dict of path -> content, to `main` and return the commit's id.

        A repository that exists gets one more commit, which holds exactly these files. Names are not checked.

        Raises:
            NotADirectoryError: If `source` is a path, but not of a folder.
        """
        tree = _read_source(source)
        with self._lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_type, repo_id, private, _now()))
            repo.private = private
            repo.lfs |= {blob.sha256: blob.data for blob in tree.values() if blob.lfs}
            added = repo.record(tree, repo.branches.get("main"), "Add files", "", repo.namespace)
            repo.branches["main"] = added.sha
        return added.sha

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Path -> content at a branch, commit id or `refs/pr/N`."""
        tree = self.repos[repo_type, repo_id].find(revision).tree
        return {path: blob.data for path, blob in tree.items()}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """The history of a revision, newest first."""
        repo = self.repos[repo_type, repo_id]
        return repo.history(repo.find(revision))

    def pull_requests(self, repo_id: str, repo_type: str = "model") -> list[PullRequest]:
        """All pull requests of a repository, oldest first; `files(repo_id, pull.ref)` is what they hold."""
        return list(self.repos[repo_type, repo_id].pulls)

    def fail(self, matching: str, kind: str, times: float = 1, seconds: float = 1.0) -> None:
        """Let the next requests that match go wrong.

        Args:
            matching: Regular expression, searched in "METHOD /path?query", such as `r"^POST .*/commit/"`.
            kind: A status ("401", "403", "409", "500", "503"); "drop": the connection ends in the middle of the file,
                on its way up or down, and nothing is changed; "drop-answer": the request is carried out, but its answer
                is lost; "slow": it waits for `seconds` first; "wrong-hash": content is damaged on its way, up or down.
            times: How many requests; `math.inf` for all of them.
            seconds: How long a "slow" request takes.

        Raises:
            ValueError: If the kind is not known.
        """
        if kind not in FAULTS:
            raise ValueError(f"got the fault {kind!r}, wanted one of {sorted(FAULTS)}")
        self.faults.append(Fault(re.compile(matching), kind, times, seconds))

    def env(self, home: Path | str, token: str | None = None) -> dict[str, str]:
        """Environment variables for a process that is to take this server for the hub.

        The server is also named as the proxy for everything else, so that nothing reaches another host:
        what tries to is refused and kept in `strays`.

        Args:
            home: Folder for all caches.
            token: The token to be logged in with; without one the process is anonymous.
        """
        caches = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules"}
        return {
            **{name: str(Path(home) / folder) for name, folder in caches.items()},
            **dict.fromkeys(ENV_ON, "1"),
            **dict.fromkeys(ENV_OFF, "0"),
            **dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], self.url),
            **dict.fromkeys(["no_proxy", "NO_PROXY"], "127.0.0.1,localhost"),
            **{"HF_ENDPOINT": self.url, "HF_TOKEN": token or ""},
        }

    def attach(self, monkeypatch: Any) -> None:
        """Make `huggingface_hub` in this process, which gets `endpoint=hub.url`, go online, and without Xet storage.

        Args:
            monkeypatch: pytest's fixture, which undoes it.
        """
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The first fault that is due for this request, counted down."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes, fault: Fault | None) -> Reply:
        """Carry out one request. Requests take their turns, so that each is whole or not at all."""
        url = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self._lock:
            for known in ROUTES:
                if known.method != method or not (match := known.pattern.fullmatch(url.path)):
                    continue
                args = {key: unquote(value) for key, value in match.groupdict().items() if value}
                try:
                    call = Call(self, args, query, headers, body, self._user(headers))
                    if fault is not None and fault.kind in STATUS_FAULTS:
                        raise self._fault(fault, call, known.answer)
                    return known.answer(call)
                except Refused as refused:
                    return refused.reply
                except (KeyError, ValueError, binascii.Error) as error:
                    return Refused(400, f"Bad request: {error!r}").reply
            self.unhandled.append((method, path))
        return Refused(404, f"Nothing is served at {method} {url.path}").reply

    def _fault(self, fault: Fault, call: Call, wanted: Callable[[Call], Reply]) -> Refused:
        if fault.kind == "409" and wanted is create_repo:
            return _repo_exists(self, *_wanted_repo(call))
        return Refused(*STATUS_FAULTS[fault.kind])

    def _user(self, headers: Mapping[str, str]) -> dict[str, Any] | None:
        given = headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if given and given not in self.tokens:
            raise Refused(401, BAD_TOKEN)
        return self.tokens.get(given)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has gone away is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.hub._connections.add(self.connection)

    def finish(self) -> None:
        self.server.hub._connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Tests have `HubServer.requests`; nothing is printed."""

    def serve(self) -> None:
        hub, method, path = self.server.hub, self.command, self.path
        if method == "CONNECT" or not path.startswith("/"):
            self.refuse_stray()
            return
        hub.requests.append((method, path))
        fault = hub.take_fault(method, path)
        kind = fault.kind if fault is not None else ""
        if fault is not None and kind == "slow":
            hub._stopping.wait(fault.seconds)
        body = self.read_body(half=kind == "drop")
        if kind == "drop" and method != "GET":
            self.hang_up()
            return
        if kind == "wrong-hash" and method == "PUT":
            body = _damaged(body)
        reply = hub.answer("GET" if method == "HEAD" else method, path, self.headers, body, fault)
        if kind == "drop-answer" or hub._stopping.is_set():
            self.hang_up()
            return
        if kind == "wrong-hash" and method == "GET":
            reply = reply._replace(body=_damaged(reply.body))
        self.send(reply, half=kind == "drop")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = serve  # noqa: N815

    def read_body(self, half: bool) -> bytes:
        """The request's content, or about half of it; a client that breaks off has asked for nothing."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self.read_chunks(half))
        size = int(self.headers.get("Content-Length", 0)) // (2 if half else 1)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionResetError
        return body

    def read_chunks(self, half: bool) -> Iterable[bytes]:
        while line := self.rfile.readline():
            size = int(line.split(b";")[0], 16)
            yield self.rfile.read(size)
            self.rfile.readline()
            if size == 0 or half:
                return
        raise ConnectionResetError

    def send(self, reply: Reply, half: bool = False) -> None:
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else reply.body
        body = body[: len(body) // 2] if half else body
        self.wfile.write(body)
        if "/resolve/" in self.path and body:
            self.server.hub.sent[urlsplit(self.path).path] += len(body)
        if half:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def refuse_stray(self) -> None:
        # `datasets` asks its viewer at "datasets-server." + the endpoint's host, and goes on when it does not know.
        viewer = urlsplit(self.path).netloc.startswith("datasets-server.")
        if not viewer:
            self.server.hub.strays.append((self.command, self.path))
        self.read_body(half=False)
        self.send(Refused(404 if viewer else 403, "Only the local hub can be reached").reply)
