"""The local hub is a hub: what the stock clients push comes back, and what fails leaves nothing half done."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub as hf
import pytest
from hub_server import HubServer
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CARD = b"---\nbase_model: royokong/e5-v\ntags:\n- sentence-transformers\n- lora\nlicense: mit\n---\n# Mine\n"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
FILES = {"README.md": CARD, "config.json": b"{}\n", "sub/model.safetensors": WEIGHTS}
TOKENS = {
    "hf_mine": {"name": "me", "role": "write", "orgs": ["lab"]},
    "hf_read": {"name": "me", "role": "read"},
    "hf_other": {"name": "you", "role": "write"},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # upstream waits a second before it tries again
    with HubServer() as server:
        server.attach(monkeypatch)
        server.tokens = TOKENS
        yield server
        assert server.unhandled == []
        assert not [path for _, path in server.requests if "hf_" in path]


@pytest.fixture
def api(hub: HubServer) -> Callable[[str], hf.HfApi]:
    return lambda user: hf.HfApi(endpoint=hub.url, token=f"hf_{user}" if user else False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, data in FILES.items():
        file = tmp_path / "folder" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "folder"


def contents(root: str | Path) -> dict[str, bytes]:
    root = Path(root)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---- there and back ----


def test_a_pushed_folder_comes_back_and_stays_readable_offline(hub, api, folder, tmp_path):
    mine = api("mine")
    url = mine.create_repo("me/model")
    assert (str(url), url.repo_id) == (f"{hub.url}/me/model", "me/model")
    info = mine.upload_folder(repo_id="me/model", folder_path=folder, commit_message="First")
    pushed = {path: data for path, data in hub.files("me/model").items() if path != ".gitattributes"}
    assert pushed == FILES
    assert [commit.title for commit in hub.commits("me/model")] == ["First", "initial commit"]
    assert hub.commits("me/model")[0].sha == info.oid

    cache = tmp_path / "cache"
    snapshot = hf.snapshot_download("me/model", endpoint=hub.url, cache_dir=cache)
    assert contents(snapshot) == hub.files("me/model")
    fetched = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(fetched) == len(set(fetched)) == 4
    hub.stop()
    assert hf.snapshot_download("me/model", endpoint=hub.url, cache_dir=cache) == snapshot
    with pytest.raises(LocalEntryNotFoundError):
        hf.snapshot_download("me/model", endpoint=hub.url, cache_dir=tmp_path / "empty")


def test_pushing_the_same_again_makes_no_commit_and_uploads_nothing(hub, api, folder):
    api("mine").create_repo("me/model")
    first = api("mine").upload_folder(repo_id="me/model", folder_path=folder)
    before = len(hub.requests)
    again = api("mine").upload_folder(repo_id="me/model", folder_path=folder)
    assert again.oid == first.oid
    assert len(hub.commits("me/model")) == 2
    assert not [path for _, path in hub.requests[before:] if path.startswith("/lfs/") or "/commit/" in path]


def test_large_and_binary_files_go_to_lfs_and_ids_are_gits(hub, api):
    hub.add_repo("me/model", {"hello": b"hello\n", "deep/er/a.safetensors": b"weights", "deep/b": b"\0"})
    rows = {row.path: row for row in api("").list_repo_tree("me/model", recursive=True)}
    assert sorted(rows) == ["deep", "deep/b", "deep/er", "deep/er/a.safetensors", "hello"]
    assert rows["hello"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert rows["hello"].lfs is None
    assert rows["deep/er/a.safetensors"].lfs.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert rows["deep/b"].lfs.size == 1
    assert [row.path for row in api("").list_repo_tree("me/model")] == ["deep", "hello"]
    assert [row.path for row in api("").list_repo_tree("me/model", "deep")] == ["deep/b", "deep/er"]
    assert [row.path for row in api("").get_paths_info("me/model", ["hello", "deep", "no"])] == ["hello", "deep"]
    with pytest.raises(EntryNotFoundError):
        list(api("").list_repo_tree("me/model", "nowhere"))


def test_info_has_files_and_what_the_card_says(hub, api):
    sha = hub.add_repo("me/model", FILES)
    info = api("").model_info("me/model", files_metadata=True)
    assert (info.id, info.sha, info.author, info.private, info.gated) == ("me/model", sha, "me", False, False)
    assert {item.rfilename: item.size for item in info.siblings} == {path: len(data) for path, data in FILES.items()}
    assert info.tags == ["sentence-transformers", "lora", "base_model:royokong/e5-v", "license:mit"]
    hub.add_repo("me/data", {"a.parquet": b"x"}, repo_type="dataset")
    assert api("").dataset_info("me/data").siblings[0].rfilename == "a.parquet"
    with pytest.raises(RepositoryNotFoundError):
        api("").model_info("me/data")


def test_revisions_are_branches_commits_and_pull_requests(hub, api, tmp_path):
    first = hub.add_repo("me/model", {"f": b"one"})
    second = hub.add_repo("me/model", {"f": b"two"})
    api("mine").create_branch("me/model", branch="old", revision=first)
    with pytest.raises(HfHubHTTPError, match="409"):
        api("mine").create_branch("me/model", branch="old")
    api("mine").create_branch("me/model", branch="old", exist_ok=True)
    new = api("mine").upload_file(path_or_fileobj=b"three", path_in_repo="f", repo_id="me/model", revision="old")
    expected = {None: b"two", "main": b"two", "old": b"three", first: b"one", second: b"two", new.oid: b"three"}
    for revision, data in expected.items():
        file = hf.hf_hub_download("me/model", "f", revision=revision, endpoint=hub.url, cache_dir=tmp_path)
        assert Path(file).read_bytes() == data
    refs = api("").list_repo_refs("me/model", include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "old": new.oid}
    assert [commit.commit_id for commit in api("").list_repo_commits("me/model")] == [second, first]
    with pytest.raises(RevisionNotFoundError):
        hf.hf_hub_download("me/model", "f", revision="nowhere", endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api("mine").upload_file(path_or_fileobj=b"x", path_in_repo="f", repo_id="me/model", revision="nowhere")


def test_anybody_can_open_a_pull_request_and_only_its_revision_has_the_change(hub, api, tmp_path):
    hub.add_repo("royokong/e5-v", FILES)
    add = hf.CommitOperationAdd("modules.json", b"[]")
    weights = hf.CommitOperationAdd("extra.safetensors", b"more weights")
    info = api("other").create_commit("royokong/e5-v", [add, weights], commit_message="Add files", create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert hub.files("royokong/e5-v") == FILES
    wanted = {**FILES, "modules.json": b"[]", "extra.safetensors": b"more weights"}
    snapshot = hf.snapshot_download("royokong/e5-v", revision="refs/pr/1", endpoint=hub.url, cache_dir=tmp_path)
    assert contents(snapshot) == hub.files("royokong/e5-v", "refs/pr/1") == wanted

    more = {"path_or_fileobj": b"[1]", "path_in_repo": "modules.json", "repo_id": "royokong/e5-v"}
    api("other").upload_file(**more, revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="403"):
        api("mine").upload_file(**more, revision="refs/pr/1")
    details = api("").get_discussion_details("royokong/e5-v", 1)
    assert (details.title, details.status, details.author, details.target_branch) == (
        *("Add files", "open", "you"),
        "refs/heads/main",
    )
    assert [pull.num for pull in api("").get_repo_discussions("royokong/e5-v")] == [1]
    hub.tokens = {**TOKENS, "hf_owner": {"name": "royokong", "role": "write"}}
    hub.add_repo("royokong/e5-v", {**FILES, "config.json": b"changed meanwhile"})
    api("owner").merge_pull_request("royokong/e5-v", 1)
    assert hub.files("royokong/e5-v") == {**wanted, "modules.json": b"[1]", "config.json": b"changed meanwhile"}
    assert hub.pull_requests("royokong/e5-v")[0].status == "merged"


def test_an_empty_pull_request_can_be_filled_later(hub, api):
    hub.add_repo("royokong/e5-v", FILES)
    pull = api("other").create_pull_request("royokong/e5-v", title="Draft")
    assert pull.status == "draft"
    assert hub.files("royokong/e5-v", pull.git_reference) == FILES


# ---- who may do what ----


def test_a_private_repository_is_there_for_its_owners_only(hub, api, tmp_path):
    api("mine").create_repo("lab/secret", private=True)
    api("mine").upload_file(path_or_fileobj=b"x", path_in_repo="f", repo_id="lab/secret")
    where = {"endpoint": hub.url, "cache_dir": tmp_path}
    assert Path(hf.hf_hub_download("lab/secret", "f", token="hf_mine", **where)).read_bytes() == b"x"
    for token, status in ((False, 401), ("hf_other", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            hf.HfApi(endpoint=hub.url, token=token).model_info("lab/secret")
        assert caught.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            hf.snapshot_download("lab/secret", token=token, endpoint=hub.url, cache_dir=tmp_path / str(status))
    hub.add_repo("me/secret", {"f": b"y"}, private=True)
    assert api("read").model_info("me/secret").private is True


def test_a_repository_that_exists_is_a_conflict_unless_that_is_fine(hub, api):
    api("mine").create_repo("me/model")
    with pytest.raises(HfHubHTTPError, match="409"):
        api("mine").create_repo("me/model")
    assert api("mine").create_repo("me/model", exist_ok=True).repo_id == "me/model"
    assert len(hub.commits("me/model")) == 1


@pytest.mark.parametrize(("user", "status"), [("", "401"), ("read", "403"), ("other", "403"), ("wrong", "401")])
def test_writing_needs_a_write_token_of_the_namespace(hub, api, user, status):
    hub.add_repo("me/model", {"f": b"one"})
    with pytest.raises(HfHubHTTPError, match=status):
        api(user).create_repo("me/other")
    with pytest.raises(HfHubHTTPError, match=status):
        api(user).upload_file(path_or_fileobj=b"two", path_in_repo="f", repo_id="me/model")
    with pytest.raises(HfHubHTTPError, match=status):
        api(user).create_branch("me/model", branch="b")
    assert list(hub.repos) == [("model", "me/model")]
    assert len(hub.commits("me/model")) == 1


def test_whoami_and_a_wrong_token(api):
    who = api("read").whoami()
    assert (who["name"], who["auth"]["accessToken"]["role"]) == ("me", "read")
    assert [org["name"] for org in api("mine").whoami()["orgs"]] == ["lab"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api("wrong").whoami()


# ---- whole or nothing ----


def post(hub: HubServer, path: str, body: bytes, length: int | None = None) -> str:
    """Send a raw request as "me" and return what comes back; a `length` beyond the body's breaks off in the middle."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer hf_mine\r\nContent-Length: {length or len(body)}\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(hub.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read().decode()


def lines(*operations: tuple[str, dict]) -> bytes:
    rows = [("header", {"summary": "x", "description": ""}), *operations]
    return b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in rows)


GOOD = ("file", {"path": "good", "content": "eA==", "encoding": "base64"})
BAD = {
    "no such file to delete": ("deletedFile", {"path": "absent"}),
    "LFS object that was never uploaded": ("lfsFile", {"path": "w", "algo": "sha256", "oid": "0" * 64, "size": 1}),
    "broken base64": ("file", {"path": "b", "content": "%", "encoding": "base64"}),
    "unknown operation": ("rename", {"path": "f"}),
    "broken card": ("file", {"path": "README.md", "content": "LS0tCgliYWQKLS0tCg==", "encoding": "base64"}),
    "climbs out": ("file", {**GOOD[1], "path": "../../etc/passwd"}),
    "climbs out later": ("file", {**GOOD[1], "path": "a/../../b"}),
    "absolute": ("file", {**GOOD[1], "path": "/etc/passwd"}),
    "backslash": ("file", {**GOOD[1], "path": "..\\b"}),
    "git's own": ("file", {**GOOD[1], "path": ".git/config"}),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_commit_with_one_bad_operation_does_nothing(hub, bad):
    hub.add_repo("me/model", {"f": b"one"})
    answer = post(hub, "/api/models/me/model/commit/main", lines(GOOD, bad))
    assert answer.startswith(("HTTP/1.1 400", "HTTP/1.1 404"))
    assert hub.files("me/model") == {"f": b"one"}
    assert post(hub, "/api/models/me/model/commit/main", lines(GOOD)).startswith("HTTP/1.1 200")
    assert hub.files("me/model") == {"f": b"one", "good": b"x"}


def test_a_commit_that_breaks_off_between_two_lines_does_nothing(hub):
    hub.add_repo("me/model", {"f": b"one"})
    body = lines(GOOD)
    assert post(hub, "/api/models/me/model/commit/main", body, length=len(body) + 10) == ""
    assert hub.files("me/model") == {"f": b"one"}


def test_uploaded_but_not_committed_files_are_not_visible(hub, api):
    hub.add_repo("me/model", {"f": b"one"})
    add = hf.CommitOperationAdd("w.safetensors", b"weights")
    api("mine").preupload_lfs_files("me/model", [add])
    assert [path for method, path in hub.requests if method == "PUT"]
    assert api("").list_repo_files("me/model") == ["f"]
    api("mine").create_commit("me/model", [add], commit_message="now")
    assert hub.files("me/model")["w.safetensors"] == b"weights"


def test_deletions_and_the_expected_parent(hub, api):
    first = hub.add_repo("me/model", {"f": b"one", "d/x": b"1", "d/y": b"2", "dd": b"3"})
    delete = [hf.CommitOperationDelete("d/"), hf.CommitOperationDelete("f")]
    api("mine").create_commit("me/model", delete, commit_message="less", parent_commit=first)
    assert hub.files("me/model") == {"dd": b"3"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api("mine").upload_file(path_or_fileobj=b"", path_in_repo="f", repo_id="me/model", parent_commit=first)


def test_a_bad_card_is_refused_before_anything_is_uploaded(hub, api):
    hub.add_repo("me/model", {"f": b"one"})
    for card in (
        b"---\nlicense: mit\n\tbad\n---\n",
        b"---\nlicense: mit\n",
        b"---\nbase_model_relation: cousin\n---\n",
    ):
        with pytest.raises(ValueError, match="Invalid metadata"):
            api("mine").upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/model")
    assert not [path for _, path in hub.requests if "preupload" in path]


def test_hostile_names_can_be_served(hub, api):
    hub.add_repo("bad/model", {"../../evil.py": b"x"})
    assert api("").list_repo_files("bad/model") == ["../../evil.py"]


# ---- faults ----

STEPS = {
    "create": r"^POST /api/repos/create",
    "card": r"^POST /api/validate-yaml",
    "preupload": r"^POST .*/preupload/",
    "batch": r"^POST .*/info/lfs/objects/batch",
    "upload": r"^PUT /lfs/upload/",
    "verify": r"^POST /lfs/verify/",
    "commit": r"^POST .*/commit/",
}
PUSH_FAULTS = [(step, kind) for step in STEPS for kind in ("500", "401", "403", "drop", "drop-answer")]
PUSH_FAULTS += [("create", "409"), ("commit", "409"), ("upload", "wrong-hash")]


@pytest.mark.parametrize(("step", "kind"), PUSH_FAULTS)
def test_a_push_that_fails_leaves_all_or_nothing_and_a_second_one_completes(hub, api, folder, caplog, step, kind):
    def push() -> None:
        api("mine").create_repo("me/model", exist_ok=True)
        api("mine").upload_folder(repo_id="me/model", folder_path=folder)

    def attempt() -> str:
        try:
            push()
        except Exception as error:
            return str(error)
        return ""

    hub.fail(STEPS[step], kind)
    failure = attempt()
    assert hub.faults[0].times == 0
    assert "hf_mine" not in failure + caplog.text
    there = hub.files("me/model") if hub.repos else {}
    assert set(there) - {".gitattributes"} in (set(), set(FILES))
    push()
    assert {path: data for path, data in hub.files("me/model").items() if path != ".gitattributes"} == FILES
    assert len(hub.commits("me/model")) == 2


def test_a_dropped_download_resumes_where_it_was(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # what upstream writes at a time
    hub.add_repo("me/model", FILES)
    hub.fail(r"^GET .*safetensors", "drop", times=2)
    file = hf.hf_hub_download("me/model", "sub/model.safetensors", endpoint=hub.url, cache_dir=tmp_path)
    assert Path(file).read_bytes() == WEIGHTS
    assert sum(hub.sent.values()) == len(WEIGHTS)
    assert len([path for method, path in hub.requests if method == "GET"]) == 3


def test_a_damaged_download_has_the_right_size_and_name_but_another_hash(hub, tmp_path):
    hub.add_repo("me/model", FILES)
    hub.fail(r"^GET .*safetensors", "wrong-hash")
    where = {"endpoint": hub.url, "cache_dir": tmp_path}
    file = Path(hf.hf_hub_download("me/model", "sub/model.safetensors", **where))
    assert file.stat().st_size == len(WEIGHTS)
    assert file.resolve().name == hashlib.sha256(WEIGHTS).hexdigest() != hashlib.sha256(file.read_bytes()).hexdigest()
    file = hf.hf_hub_download("me/model", "sub/model.safetensors", force_download=True, **where)
    assert Path(file).read_bytes() == WEIGHTS


def test_a_slow_answer_runs_into_the_clients_time_limit(hub):
    hub.add_repo("me/model", {"f": b"one"})
    hub.fail("^HEAD ", "slow", seconds=30)
    url = hf.hf_hub_url("me/model", "f", endpoint=hub.url)
    with pytest.raises(Exception, match="timed out"):
        hf.get_hf_file_metadata(url, timeout=0.1)
    assert hf.get_hf_file_metadata(url, timeout=5).size == 3


def test_unknown_faults_are_named(hub):
    with pytest.raises(ValueError, match=r"'fire'.*wrong-hash"):
        hub.fail("", "fire")


# ---- other clients, in a process of their own ----

LOAD = """
import sys, json, datasets, huggingface_hub
data = datasets.load_dataset("royokong/coco_test", split="test")
model = huggingface_hub.snapshot_download("me/model")
print(json.dumps([data["text"][:], [image.size for image in data["image"]], data.column_names, model]))
if "--stray" in sys.argv:
    print(huggingface_hub.utils.get_session().get("http://elsewhere.invalid/").status_code)
"""


def parquet() -> bytes:
    import pyarrow as pa
    from datasets import Dataset, Features, Image, List, Value
    from PIL import Image as Pictures

    features = Features({"image": Image(), "text": List(Value("string"))})
    rows = {"image": [Pictures.new("RGB", (5, 4))] * 2, "text": [["a", "b"], ["c"]]}
    out = io.BytesIO()
    pa.parquet.write_table(Dataset.from_dict(rows, features=features).data.table, out)
    return out.getvalue()


def load(env: dict[str, str], *args: str) -> list[str]:
    command = [sys.executable, "-c", LOAD, *args]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_load_dataset_and_snapshot_in_a_fresh_process_then_offline(hub, tmp_path):
    hub.add_repo("royokong/coco_test", {"data/test-00000-of-00001.parquet": parquet()}, repo_type="dataset")
    hub.add_repo("me/model", FILES, private=True)
    env = hub.env(tmp_path, token="hf_read")
    first, stray = load(env, "--stray")
    text, sizes, columns, model = json.loads(first)
    assert text == [["a", "b"], ["c"]]
    assert sizes == [[5, 4]] * 2
    assert columns == ["image", "text"]
    assert contents(model) == FILES
    assert stray == "403"
    assert hub.strays == [("GET", "http://elsewhere.invalid/")]
    fetched = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(fetched) == len(set(fetched)) == 4

    hub.stop()
    offline = {**env, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    assert load(offline) == [first]
