"""Every Python snippet and every offline command of README.md and docs/ runs as it stands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cli_page
import families
import licences
import pytest
from hub_server import HubServer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path, goldens):
    images = sorted((goldens / "images" / "small").glob("*.png"))
    (tmp_path / "pictures").mkdir()
    for name, image in zip(("dog.jpg", "cat.jpg", "shirt.jpg"), images, strict=False):
        shutil.copy(image, tmp_path / name)
        shutil.copy(image, tmp_path / "pictures" / Path(name).with_suffix(".png"))
    return tmp_path


#: Hub ids that the pages name, and the tiny model that stands for each.
NAMED = {
    "HuggingFaceTB/SmolVLM-500M-Instruct": "smolvlm-instruct",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl",
    "some/model": "qwen3_vl",
}
#: Of the model that is of no known family: its chat template is read.
TEMPLATE = "<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_snippets_run(page, workplace, small, tmp_path_factory):
    with HubServer() as hub:
        hub.add_repo("royokong/e5-v", small)
        for name, family in NAMED.items():
            if name in page.read_text(encoding="utf8"):
                folder = families.save(family, tmp_path_factory.mktemp("named") / family)
                if name == "some/model":
                    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf8")
                hub.add_repo(name, folder)
        environment = {**os.environ, **hub.env(workplace / "home"), "HF_HUB_OFFLINE": "0"}
        code = "\n".join(blocks(page, "python"))
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=lambda page: page.stem)
def test_commands_run(page, workplace):
    for line in "".join(blocks(page, "console")).splitlines():
        command = [sys.executable, "-m", "e5v_st.cli", *shlex.split(line)[1:]]
        done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_reference_names_every_prompt():
    from e5v_st import PROMPTS

    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf8")
    for name, template in PROMPTS.items():
        if not name.startswith("fashioniq"):
            assert f"`{name}`" in text
            assert template.replace("\n", "\\n") in text


def test_the_licence_of_every_dependency_is_listed():
    rows = re.findall(r"^\| (\S+) \| ([^|]+) \|", licences.PAGE.read_text(encoding="utf8"), re.MULTILINE)[2:]
    assert [name for name, _ in rows] == sorted(licences.dependencies())
    assert {"torch", "transformers", "mteb", "pytest"} <= {name for name, _ in rows}
    assert all(what.strip() not in ("", "UNKNOWN") for _, what in rows)


def test_the_page_of_commands_is_what_they_say_of_themselves():
    assert cli_page.PAGE.read_text(encoding="utf8") == cli_page.page(), "run `make cli-page`"


def test_every_guarantee_has_its_test():
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf8")
    named = re.findall(r"`(tests/\S+?)::(test_\w+)`", text)
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| what"))]
    assert len(named) == len(rows)
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf8"), f"{file}::{name}"


def test_the_figures_on_speed_are_those_that_were_recorded():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    read = lambda name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())  # noqa: E731
    encode, mteb, train, large = map(read, ("encode_speed", "mteb_speed", "train_speed", "large_job"))
    for work, row in encode["works"].items():
        ratios = [row["times_as_fast"].get(way) for way in ("published", "published, images one at a time", "stock")]
        costs = [row["cost"][way] for way in ("published", "ours")]
        cells = [work, *("—" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{cost['passes']}, {cost['tokens_of_a_layer']:,}" for cost in costs]
        assert f"| {' | '.join(cells)} |" in page, work
    ratios = [row["times_as_fast"]["published"] for row in encode["works"].values()]
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times as fast on a CPU" in readme
    assert all(f"{mib:.0f}" in page for mib in encode["peak_memory_mib_above_loading"].values())
    assert all(
        f"{work[key]:.0f}" in page for work in (large["texts"], large["pictures"]) for key in work if "peak" in key
    )
    for name in ("times_as_fast_as_published", "times_as_fast_as_stock", "memory_of_published"):
        assert f"{mteb[name]:.2f}" in page, name
    assert f"{train['times_as_fast']:.2f} times as fast" in page
    assert f"{train['memory_of_a_step']:.2f} of its memory" in page


def test_the_figures_of_what_tasks_share_are_those_that_were_recorded():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    found = json.loads((ROOT / "benchmarks" / "results" / "mieb_sharing.json").read_text())
    ours, wrapper = found["ways"]["ours"], found["ways"]["wrapper"]
    assert f"{found['times_as_fast_as_the_wrapper']:.2f} times as fast as" in page
    assert f"({ours['seconds']:.1f} s and {wrapper['seconds']:.1f} s)" in page
    assert f"{ours['encoded']} contents were encoded" in page


def test_the_figures_of_training_on_images_are_those_that_were_recorded():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    for uses in (1, 2):
        found = json.loads((ROOT / "benchmarks" / "results" / f"train_speed_images_{uses}.json").read_text())
        assert f"| {found['times_as_fast_cpu']:.2f} | {found['memory_of_a_step']:.2f} |" in page
        assert found["largest_loss_difference"] < 1e-6


def test_the_figures_of_a_budget_for_images_are_those_that_were_recorded():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    found = json.loads((ROOT / "benchmarks" / "results" / "image_budget.json").read_text())
    name = lambda budget: "none" if budget == "None" else f"{int(budget):,}"  # noqa: E731
    for budget, row in found["published"].items():
        part = found["time"][budget]["part"]
        assert f"| {name(budget)} | {row['tokens']:,.0f} | {row['tiles']:.1f} | {part:.2f} |" in page
    for shown, budgets in found["scores"].items():
        for budget, row in budgets.items():
            scores = [f"{100 * score:.1f}" for task, score in row.items() if task != "tokens"]
            cells = [shown, name(budget), str(row["tokens"]), " / ".join(scores[:2]), " / ".join(scores[2:])]
            assert f"| {' | '.join(cells)} |" in page
    assert f"(`{found['command']}`)" in page


def test_the_figures_of_the_second_stage_are_those_that_were_recorded():
    page = (ROOT / "docs" / "second-stage.md").read_text(encoding="utf8")
    found = json.loads((ROOT / "benchmarks" / "results" / "second_stage.json").read_text())
    for label, before in found["before"].items():
        cells = [label, f"{before:.1f}"]
        for runs in found["ways"].values():
            values = [run["test"][label] for run in runs.values()]
            assert len(values) == 3
            cells.append(f"{sum(values) / 3:.1f} ({min(values):.1f} to {max(values):.1f})")
        assert f"| {' | '.join(cells)} |" in page, label


def test_the_figures_of_families_are_those_that_were_recorded():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    families = json.loads((ROOT / "benchmarks" / "results" / "encode_speed_families.json").read_text())
    for name, family in families.items():
        ratios = [work["times_as_fast"].values() for work in family["works"].values()]
        cells = [name, *(" / ".join(f"{ratio:.2f}" for ratio in pair) for pair in ratios)]
        assert f"| {' | '.join(cells)} |" in page, name
    large = json.loads((ROOT / "benchmarks" / "results" / "encode_speed_large_images.json").read_text())
    for name, family in large.items():
        ratios = [work["times_as_fast"].values() for work in family["works"].values()]
        cells = " | ".join(" / ".join(f"{ratio:.2f}" for ratio in pair) for pair in ratios)
        assert re.search(rf"\| {name} \| [^|]+ \| [^|]+ \| {cells} \|", page), name


def test_the_figures_of_tables_are_those_that_were_recorded():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    found = json.loads((ROOT / "benchmarks" / "results" / "index_speed.json").read_text())
    for name in ("search", "search_with_a_filter", "search_exact"):
        work = found[name]
        assert f"| {work['p50_ms']:.1f} | {work['p95_ms']:.1f} | {work['recall_at_10']:.4f} |" in page, name
    assert found["search"]["p95_ms"] < 50
    assert found["search"]["recall_at_10"] >= 0.98
    assert found["add"]["embedded"] == [100, 100]
    assert f"{found['add']['ratio']:.2f} times as long" in page
    assert f"made in {found['index_seconds']:.0f} s" in page
    million = json.loads((ROOT / "benchmarks" / "results" / "index_speed_1m.json").read_text())
    assert f"made in {million['index_seconds']:.0f} s" in page
    p50, p95, recall = million["search"].values()
    assert f"took {p50:.1f} ms, 95 of 100 within {p95:.1f} ms, recall@10 {recall:.4f}" in page


def test_the_shares_of_the_limit_are_those_that_were_recorded():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    for file, note in (("limit", ""), ("limit_wide", ", wide layers")):
        families = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())["families"]
        for name, dtypes in families.items():
            pairs = zip(dtypes["float32"].values(), dtypes["bfloat16"].values(), strict=True)
            cells = " | ".join(f"{one['share']:.2f} / {two['share']:.2f}" for one, two in pairs)
            assert f"| {name}{note} | {cells} |" in page, name


def test_the_figures_of_starting_are_those_that_were_recorded():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    found = json.loads((ROOT / "benchmarks" / "results" / "startup.json").read_text())
    for name, row in found["search"].items():
        clock = f"{row['first_line_s']:.1f} | {row['times_of_the_imports']:.2f}"
        processor = f"{row['processor_s']:.1f} | {row['processor_times_of_the_imports']:.2f}"
        assert f"| {name} | {clock} | {processor} |" in page, name
        assert row["times_of_the_imports"] <= 1.15
    assert f"`e5v --help` takes {found['help_ms']:.0f} ms" in page
    assert found["help_ms"] < 100


def test_the_map_of_the_code_names_every_module_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8")
    tree = page.split("```text\n")[1].split("```")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", tree)) - {"hub_server.py"}
    folders = [ROOT / name for name in ("e5v_st", "e5v_st/model", "e5v_st/index", "mteb_tasks", "training", "hub")]
    there = {file.name for folder in folders for file in folder.glob("*.py")} - {"__main__.py"}
    assert named == there
