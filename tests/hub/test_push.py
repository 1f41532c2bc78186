from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import shutil
import signal
import threading
from contextlib import suppress

import huggingface_hub as hf
import numpy as np
import pytest
from hub_client import TOKEN, contents
from safetensors.torch import load_file, save_file

import e5v_st
import e5v_st.hub.add_st_files
import e5v_st.hub.push
from e5v_st.hub.__main__ import main
from e5v_st.hub.add_st_files import add_st_files
from e5v_st.hub.push import push

BASE = "royokong/e5-v"
REPO = "me/e5v-nli-lora"
EXTRA = {"optimizer.pt", "training_args.bin", "notes.txt", "trainer_state.json", "log_history.json"}


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves out the reload, which other tests are about, and which takes seconds."""
    for module in (e5v_st.hub.push, e5v_st.hub.add_st_files):
        monkeypatch.setattr(module, "check_reload", lambda folder, staged: None)


def pushed(server, revision="main", repo=REPO):
    return {path: data for path, data in server.files(repo, revision).items() if path != ".gitattributes"}


# ---- what goes up ----


def test_exactly_the_models_files_go_up(server, unchecked, run):
    for name in EXTRA:
        (run / name).write_text("x")
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-10" / "adapter_model.safetensors").write_text("x")
    url = push(run, REPO, base=BASE)
    assert url == f"{server.url}/{REPO}/commit/{server.commits(REPO)[0].sha}"
    assert [commit.title for commit in server.commits(REPO)] == ["Upload E5-V adapter", "initial commit"]
    wanted = {path for path in contents(run) if not path.startswith("checkpoint")} - EXTRA
    files = pushed(server)
    assert files.keys() == wanted
    for path in wanted - {"README.md", "adapter_config.json"}:
        assert files[path] == (run / path).read_bytes(), path
    settings = json.loads(files["adapter_config.json"])
    assert (settings["base_model_name_or_path"], settings["revision"]) == (BASE, None)
    info = hf.HfApi().model_info(REPO)
    assert {"sentence-transformers", "peft", "lora", "multimodal", f"base_model:{BASE}"} <= set(info.tags)
    assert info.card_data.base_model_relation == "adapter"


def test_the_bases_revision_is_written_down(server, unchecked, run):
    push(run, REPO, base=f"{BASE}@0c1f226")
    settings = json.loads(pushed(server)["adapter_config.json"])
    assert (settings["base_model_name_or_path"], settings["revision"]) == (BASE, "0c1f226")


def test_a_whole_model_goes_up_and_its_card_keeps_its_history(server, unchecked, adapter, small, tmp_path):
    from e5v_st.hub.merge import merge

    merged = merge(adapter, tmp_path / "merged", base=small, shard_size=10**6)
    text = (merged / "README.md").read_text()
    (merged / "README.md").write_text(text.replace("license: unknown", f"license: mit\nbase_model: {BASE}"))
    push(merged, REPO)
    files = pushed(server)
    assert files.keys() == contents(merged).keys()
    data = hf.ModelCard(files["README.md"].decode()).data
    assert (data.license, data.base_model, data.base_model_relation) == ("mit", BASE, "finetune")
    assert data.to_dict()["merged_adapter"] == "e5v-nli"


def test_a_dry_run_shows_files_and_sizes_and_asks_the_hub_for_nothing(server, unchecked, run, capsys):
    assert main(["push", str(run), "--repo", REPO, "--base", BASE, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for path, data in contents(run).items():
        assert re.search(rf"^ *[\d,]+  {re.escape(path)}$", shown, re.MULTILINE), path
        if path not in ("README.md", "adapter_config.json"):
            assert f"{len(data):>15,}  {path}" in shown
    assert server.requests == []


def test_a_private_repository_stays_private(server, unchecked, run):
    push(run, REPO, base=BASE, private=True)
    assert server.repos["model", REPO].private
    server.add_repo("me/public", {"f": b"x"})
    with pytest.raises(ValueError, match="me/public exists already and is public"):
        push(run, "me/public", base=BASE, private=True)
    assert server.files("me/public") == {"f": b"x"}


def test_a_branch_leaves_main_alone(server, unchecked, run):
    server.add_repo(REPO, {"f": b"x"})
    push(run, REPO, base=BASE, branch="next")
    push(run, REPO, base=BASE, branch="next")
    assert server.files(REPO) == {"f": b"x"}
    assert "modules.json" in server.files(REPO, "next")
    assert len(server.commits(REPO, "next")) == 2


def test_a_pull_request_is_opened_once(server, unchecked, run):
    server.add_repo("you/theirs", {"f": b"x"})
    url = push(run, "you/theirs", base=BASE, pr=True)
    assert url == f"{server.url}/you/theirs/discussions/1"
    assert push(run, "you/theirs", base=BASE, pr=True) == url
    assert len(server.pull_requests("you/theirs")) == 1
    assert server.files("you/theirs") == {"f": b"x"}
    assert "modules.json" in server.files("you/theirs", "refs/pr/1")


def test_an_update_replaces_the_files_of_an_earlier_push_in_one_commit(server, unchecked, run):
    old = {"model-00001-of-00002.safetensors": b"x", "old_e5v.py": b"x", "mine.md": b"x", "modules.json": b"[]"}
    server.add_repo(REPO, old)
    with pytest.raises(ValueError, match=f"{REPO} exists already, with other files: add --update"):
        push(run, REPO, base=BASE)
    assert server.files(REPO) == old
    push(run, REPO, base=BASE, update=True)
    assert pushed(server).keys() == contents(run).keys() | {"mine.md"}
    assert len(server.commits(REPO)) == 2


def test_the_same_push_again_makes_no_commit(server, unchecked, run):
    push(run, REPO, base=BASE)
    before = len(server.requests)
    push(run, REPO, base=BASE)
    assert len(server.commits(REPO)) == 2
    assert not [path for method, path in server.requests[before:] if "/commit/" in path or method == "PUT"]


# ---- faults ----

STEPS = {
    "create": r"^POST /api/repos/create",
    "tree": r"^GET .*/tree/",
    "card": r"^POST /api/validate-yaml",
    "preupload": r"^POST .*/preupload/",
    "batch": r"^POST .*/info/lfs/objects/batch",
    "upload": r"^PUT /lfs/upload/",
    "verify": r"^POST /lfs/verify/",
    "commit": r"^POST .*/commit/",
}
PASSING = ("500", "503", "drop", "drop-answer", "slow")
FAULTS = [(step, kind) for step in STEPS for kind in PASSING]
FAULTS += [(step, "409") for step in STEPS if step != "create"]  # there it says that the repository exists
FAULTS += [("upload", "wrong-hash")]


@pytest.mark.parametrize(("step", "kind"), FAULTS)
def test_a_fault_that_passes_does_not_stop_a_push(server, unchecked, run, step, kind):
    server.fail(STEPS[step], kind, seconds=0.2)
    push(run, REPO, base=BASE)
    assert server.faults[0].times == 0
    assert pushed(server).keys() == contents(run).keys()
    assert len(server.commits(REPO)) == 2


LASTING = [(step, kind) for step in STEPS for kind in ("500", "401", "403", "409", "drop")]
LASTING += [("upload", "wrong-hash")]


@pytest.mark.parametrize(("step", "kind"), LASTING)
def test_a_fault_that_lasts_leaves_nothing_half_done_and_a_second_push_completes(
    server, unchecked, run, caplog, capsys, step, kind
):
    caplog.set_level(logging.DEBUG)
    server.fail(STEPS[step], kind, times=math.inf)
    words = ["push", str(run), "--repo", REPO, "--base", BASE]
    assert main(words) == 1
    told = capsys.readouterr()
    lines = re.findall("push: .*", told.err)  # there may be a progress bar in front of it
    assert len(lines) == 1
    assert len(lines[0]) > 40
    assert "Traceback" not in told.err
    assert TOKEN not in told.err + told.out + caplog.text
    assert ("model", REPO) not in server.repos or pushed(server) == {}
    server.faults.clear()
    assert main(words) == 0
    assert pushed(server).keys() == contents(run).keys()


SIDE_STEPS = {
    "branch": (r"^POST .*/branch/", {"branch": "next"}, "next"),
    "privacy": (r"^GET /api/models/[^/]+/[^/]+$", {"private": True}, "main"),
    "pull requests": (r"^GET .*/discussions", {"pr": True}, "refs/pr/1"),
    "opening a pull request": (r"^POST .*/commit/main.*create_pr", {"pr": True}, "refs/pr/1"),
}


@pytest.mark.parametrize("kind", ["500", "401", "409", "drop", "drop-answer", "slow"])
@pytest.mark.parametrize("step", SIDE_STEPS)
def test_a_fault_on_the_way_to_a_branch_or_pull_request_leaves_all_or_nothing(server, unchecked, run, step, kind):
    pattern, options, revision = SIDE_STEPS[step]
    if "pr" in options:
        server.add_repo(REPO, {"f": b"x"})
    server.fail(pattern, kind, seconds=0.2)
    try:
        push(run, REPO, base=BASE, **options)
    except ValueError:
        assert kind == "401" or (step, kind) == ("branch", "409")  # which says that the branch exists
        assert not server.pull_requests(REPO)
        assert pushed(server).keys() <= {"f"}
        push(run, REPO, base=BASE, **options)
    assert server.faults[0].times == 0
    assert pushed(server, revision).keys() - {"f"} == contents(run).keys()
    assert len(server.commits(REPO, revision)) == 2
    assert len(server.pull_requests(REPO)) == ("pr" in options)


def kill_at(server, patch, number, carried_out):
    """Starts to count: the sender of the ``number``-th request from now on is killed before or after its effect."""
    box = {"left": number, "pid": None, "ready": threading.Event(), "done": threading.Event()}
    stock, lock = server.answer, threading.Lock()

    def answer(*request):
        box["ready"].wait()
        with lock:
            box["left"] -= 1
            due = box["left"] == 0
        if due and not carried_out:
            os.kill(box["pid"], signal.SIGKILL)
            box["done"].set()
            raise ConnectionResetError
        reply = stock(*request)
        if due:
            os.kill(box["pid"], signal.SIGKILL)
            box["done"].set()
        return reply

    patch.setattr(server, "answer", answer)
    return box


@pytest.mark.slow
def test_killed_at_random_points_it_has_done_all_or_nothing_and_a_second_push_completes(
    server, unchecked, adapter, small, make_adapter, tmp_path, monkeypatch
):
    from e5v_st.hub.merge import merge

    merged = merge(adapter, tmp_path / "merged", base=small, shard_size=10**6)
    old = {"model.safetensors": b"old", "README.md": b"old", "mine.txt": b"mine"}
    kinds = [({}, None, "main"), ({"update": True}, old, "main"), ({"pr": True}, old, "refs/pr/1")]

    def prepare(before):
        server.repos.clear()
        if before:
            server.add_repo(REPO, before)

    undisturbed = []
    for options, before, revision in kinds:
        prepare(before)
        first = len(server.requests)
        push(merged, REPO, **options)
        undisturbed.append((len(server.requests) - first, pushed(server, revision)))
    dice = random.Random(6)
    for number in range(50 if os.environ.get("E5V_NIGHTLY") == "1" else 5):
        (options, before, revision), (requests, whole) = kinds[number % 3], undisturbed[number % 3]
        prepare(before)
        with monkeypatch.context() as patch:
            point = dice.randint(1, requests), dice.random() < 0.5
            box = kill_at(server, patch, *point)
            box["pid"] = os.fork()
            if not box["pid"]:
                with suppress(BaseException):
                    push(merged, REPO, **options)
                os._exit(0)
            box["ready"].set()
            assert os.WTERMSIG(os.waitpid(box["pid"], 0)[1]) == signal.SIGKILL, point
            box["done"].wait()
        if ("model", REPO) in server.repos:
            pulls = server.pull_requests(REPO)
            assert pushed(server) in ([before or {}, whole] if revision == "main" else [before]), point
            assert [pushed(server, pull.ref) for pull in pulls] in ([], [whole]), point
        push(merged, REPO, **options)
        assert pushed(server, revision) == whole, point
        assert len(server.commits(REPO, revision)) == 2, point
        assert len(server.pull_requests(REPO)) == ("pr" in options), point


def test_a_further_attempt_is_told(server, unchecked, run, capsys):
    server.fail(STEPS["commit"], "409")
    push(run, REPO, base=BASE)
    assert "the hub has not taken this (status 409): trying again in 1 s" in capsys.readouterr().err


def test_a_lost_answer_opens_no_second_pull_request(server, unchecked, run):
    server.add_repo("you/theirs", {"f": b"x"})
    server.fail(STEPS["commit"], "drop-answer")
    push(run, "you/theirs", base=BASE, pr=True)
    assert len(server.pull_requests("you/theirs")) == 1


def test_an_interrupted_upload_goes_on_where_it_was(server, unchecked, adapter, small, tmp_path):
    from e5v_st.hub.merge import merge

    merged = merge(adapter, tmp_path / "merged", base=small, shard_size=10**6)
    server.fail(STEPS["commit"], "401", times=math.inf)
    with pytest.raises(ValueError, match="log in"):
        push(merged, REPO)
    sent = [path for method, path in server.requests if method == "PUT"]
    assert len(sent) == len(list(merged.glob("*.safetensors"))) > 3
    server.faults.clear()
    push(merged, REPO)
    assert [path for method, path in server.requests if method == "PUT"] == sent
    assert pushed(server).keys() == contents(merged).keys()


# ---- what is said ----


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("hf_unknown", REPO, "does not know this token: log in with `hf auth login`"),
        ("", REPO, "there is no token for the hub: log in with `hf auth login`"),
        ("hf_reader", REPO, f"may not write to {REPO}: use a write token"),
        (TOKEN, "you/e5v", "may not write to you/e5v: use a write token"),
        (TOKEN, "me/a--b", "me/a--b"),
    ],
)
def test_missing_rights_are_one_line_that_says_what_to_do(
    server, unchecked, run, monkeypatch, capsys, token, repo, said
):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(run), "--repo", repo, "--base", BASE]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not token or token not in told
    assert server.repos == {}


def test_no_network_is_one_line(server, unchecked, run, capsys):
    server.stop()
    assert main(["push", str(run), "--repo", REPO, "--base", BASE]) == 1
    assert "the hub cannot be reached" in capsys.readouterr().err


def test_offline_mode_is_named(server, unchecked, run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["push", str(run), "--repo", REPO, "--base", BASE]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_pull_request_for_nothing_says_so(server, unchecked, run):
    with pytest.raises(ValueError, match="there is no me/nothing"):
        push(run, "me/nothing", base=BASE, pr=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repo_id": "e5v-nli"}, "got the repository 'e5v-nli', want USER/NAME"),
        ({"repo_id": "me/a b"}, "'me/a b'"),
        ({"repo_id": REPO, "pr": True, "branch": "next"}, "give --branch or --pr, not both"),
        ({"repo_id": REPO, "results": "/nowhere"}, "/nowhere has no result files of mteb"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_model_is_loaded(server, run, options, said):
    with pytest.raises(ValueError, match=said):
        push(run, base=BASE, **options)
    assert server.requests == []


def test_the_published_scripts_adapter_is_saved_pushed_and_loaded(server, unchecked, goldens, small, tmp_path):
    server.add_repo(BASE, small)
    legacy = goldens / "legacy_adapter"
    with pytest.raises(
        ValueError, match=r"has no modules\.json, so it is not a saved model: .*`merge` of a bare adapter"
    ):
        push(legacy, REPO, base=BASE)
    model = e5v_st.load(BASE, adapter=legacy, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    push(tmp_path / "saved", REPO)  # the base that it was loaded on is known
    assert json.loads(pushed(server)["adapter_config.json"])["base_model_name_or_path"] == BASE
    texts = ["A dog sits in the grass.", "Two men play chess."]
    found = e5v_st.load(REPO, device="cpu").encode(texts)
    np.testing.assert_array_equal(found, model.encode(texts))
    assert np.abs(found - e5v_st.load(BASE, device="cpu").encode(texts)).max() > 1e-2


def break_modules(run):
    (run / "modules.json").unlink()


def scramble_modules(run):
    (run / "modules.json").write_text('{"0": "Transformer"}')


def lose_weights(run):
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: None, r"its base is '/.*/small', which nobody else has: name the base's hub id with --base"),
        (break_modules, r"has no modules\.json"),
        (scramble_modules, r"modules\.json does not list modules"),
        (lose_weights, r"has no adapter_model\.safetensors: .*pickles are not pushed"),
        (shutil.rmtree, "there is no folder"),
    ],
)
def test_a_folder_that_nobody_could_load_is_refused_before_the_hub_is_asked(server, unchecked, run, damage, message):
    damage(run)
    with pytest.raises(ValueError, match=message):
        push(run, REPO)
    assert server.requests == []


# ---- the reload ----


def test_an_adapter_of_another_base_is_not_pushed(server, run, small, tmp_path):
    other = shutil.copytree(small, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["language_model.model.norm.weight"][0] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    server.add_repo("me/other", other)
    with pytest.raises(ValueError, match=r"not pushed: .*gives other embeddings.*another base"):
        push(run, REPO, base="me/other")
    assert ("model", REPO) not in server.repos


def test_a_model_that_does_not_load_is_not_pushed(server, run):
    with pytest.raises(ValueError, match="not pushed: the model does not load in a process without"):
        push(run, REPO, base="me/nowhere")
    assert server.repos == {}


def test_a_run_of_another_machine_is_compared_on_the_base_that_is_named(server, run, monkeypatch, capsys):
    settings = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/cluster/e5-v"}))
    loaded = []
    monkeypatch.setattr(
        e5v_st.hub.push, "_embed", lambda folder, out, *flags: loaded.append(folder) or (np.ones(1), "float")
    )
    push(run, REPO, base=BASE)
    assert [folder.name for folder in loaded] == ["model", "model"]
    assert "'/cluster/e5-v' is not here" in capsys.readouterr().err


def test_an_error_of_several_lines_is_told_whole():
    said = "Traceback:\n  File\nOSError: first\nDuring another\nhttp.XError: there is none\nlog in with `hf auth`"
    assert e5v_st.hub.push._last_error(said, 1) == "http.XError: there is none log in with `hf auth`"
    assert e5v_st.hub.push._last_error("", -9) == "the process was killed by signal 9; is there enough memory?"


# ---- add-st-files ----


def test_the_pull_request_only_adds_files(server, unchecked, small):
    server.add_repo(BASE, small)
    url = add_st_files(BASE)
    assert url == f"{server.url}/{BASE}/discussions/1"
    before, after = server.files(BASE), server.files(BASE, "refs/pr/1")
    assert before == contents(small)
    assert {path: after[path] for path in before} == before
    added = after.keys() - before.keys()
    assert {"modules.json", "1_Pooling/config.json", "modeling_e5v.py"} < added
    assert "README.md" not in added
    assert add_st_files(BASE) == url
    assert len(server.pull_requests(BASE)) == 1


def test_a_dry_run_opens_no_pull_request(server, small, capsys):
    server.add_repo(BASE, small)
    assert main(["add-st-files", BASE, "--dry-run"]) == 0
    assert "modeling_e5v.py" in capsys.readouterr().out
    assert server.pull_requests(BASE) == []
    assert not [path for method, path in server.requests if method == "GET" and path.endswith("model.safetensors")]


def test_no_pull_request_is_opened_for_what_would_not_load(server, small, monkeypatch):
    stock = e5v_st.hub.add_st_files.write_st_files

    def write_broken(folder, native, out):
        stock(folder, native=native, out=out)
        (out / "modeling_e5v.py").write_text("import nothing_of_this_name")

    monkeypatch.setattr(e5v_st.hub.add_st_files, "write_st_files", write_broken)
    server.add_repo(BASE, small)
    with pytest.raises(ValueError, match=r"does not load in a process without this project's packages: .*nothing_of"):
        add_st_files(BASE)
    assert server.pull_requests(BASE) == []


def test_a_repository_that_has_such_files_gets_no_pull_request(server, small):
    server.add_repo(BASE, {**contents(small), "modules.json": b"[]"})
    with pytest.raises(ValueError, match=r"has modules\.json already: nothing to add"):
        add_st_files(BASE)
    server.add_repo("me/lora", {"adapter_config.json": b"{}"})
    with pytest.raises(ValueError, match="me/lora is an adapter: merge it"):
        add_st_files("me/lora")
    server.add_repo("me/bert", {"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(ValueError, match="E5-V wants one of the model types"):
        add_st_files("me/bert")
    assert server.pull_requests(BASE) == server.pull_requests("me/bert") == []


@pytest.mark.parametrize("kind", ["500", "drop", "drop-answer"])
@pytest.mark.parametrize("step", [r"^GET .*/config.json", r"^POST .*/commit/", r"^POST .*/preupload/"])
def test_a_fault_that_passes_does_not_stop_the_pull_request(server, unchecked, small, step, kind):
    server.add_repo(BASE, small)
    server.fail(step, kind)
    add_st_files(BASE)
    assert len(server.pull_requests(BASE)) == 1
    assert os.listdir(small)  # the source is still there
