"""`fiducial lab`: what it runs, what it keeps, what it says; in miniature, for the real forms take
minutes.
"""

import ast
import dataclasses
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from fiducial import verbs
from fiducial.cli import _print_result
from fiducial.errors import InputError, RunError
from fiducial.lab import command
from fiducial.lab.command import as_lines, lab
from fiducial.lab.command import studies as command_studies
from fiducial.lab.runs.folders import WORLDS
from fiducial.lab.runs.jobs import Job, jobs
from fiducial.lab.runs.plan import METHODS, Plan, verb_of
from fiducial.lab.runs.results import LabResults, MeasuredRun, PathPoint, RunResult, Studies
from fiducial.lab.runs.rows import cause
from fiducial.lab.settings import Lab
from fiducial.lab.study import decision_process
from fiducial.lab.worlds import exact, policies

FEW = [
    Job("mild", Plan("dpo", "table", 0.05, 30, points=3), "methods", 1.0),
    Job("mild", Plan("ppo", "table", 0.05, 12, points=3), "methods", 1.0),
    Job("exploit", Plan("ppo", "table", 0.05, 12, points=3, reward="proxy"), "methods", 1.0),
    Job("mild", Plan("rloo", "table", 0.05, 8, points=2), "methods", 1.0),
    Job("mild", Plan("grpo", "table", 0.05, 8, points=2), "methods", 1.0),
    Job(
        "mild",
        Plan("grpo", "table", 0.05, 8, points=0, settings={"kl": {"estimator": "k1"}}),
        "parts",
        1.0,
        "KL-in-the-reward",
    ),
    Job(
        "mild",
        Plan("rloo", "table", 0.05, 8, points=0, settings={"score": {"length_buffer": 1}}),
        "lengths",
        1.0,
        "buffer",
    ),
    Job("long", Plan("ppo", "table", 0.05, 6, points=6, credit=True), "methods", 1.0),
    Job(
        "long",
        Plan(
            "rloo", "table", 0.05, 6, points=3, reward="steps", settings={"credit": "reward_to_go"}
        ),
        "methods",
        1.0,
    ),
    Job("mild", Plan("ppo", "table", 0.05, 4, beta=2.0, points=0), "sensitivity", 1.0),
    Job("mild", Plan("ppo", "table", 0.001, 4, beta=2.0, points=0), "sensitivity", 1.0),
]


COMPUTED: list[Studies] = []


def studies(world, form, times):
    """The sections that need no run, which take most of the time: computed once for this file."""
    if not COMPUTED:
        COMPUTED.append(command_studies(world, form, times))
    return COMPUTED[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The lab with a few short runs, and its data."""
    folder = tmp_path_factory.mktemp("lab") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "jobs", lambda form, seed: FEW)
        patch.setattr(command, "studies", studies)
        finished = lab(Lab(out=str(folder), processes=2))
    return folder, finished, json.loads((folder / "lab.json").read_text())


@pytest.mark.parametrize("form", ["quick", "full"])
def test_every_run_has_a_name_and_files_of_its_own(form):
    names = [j.name for j in jobs(form, seed=0)]
    assert len(set(names)) == len(names) > 30
    assert {j.world for j in jobs(form, 0)} == set(WORLDS)
    seeds = {
        (j.world, j.plan.policy, j.plan.method): set()
        for j in jobs(form, 0)
        if j.section == "methods"
    }
    for j in jobs(form, 7):
        if j.section == "methods":
            seeds[j.world, j.plan.policy, j.plan.method].add(j.plan.seed)
    assert seeds["mild", "table", "ppo"] == {7, 8, 9}
    assert {m for w, p, m in seeds if w == "mild" and p == "table"} == set(METHODS)
    assert all(verbs.method(m) is not None and verbs.method(m).name == verb_of(m) for m in METHODS)
    assert {m for w, _, m in seeds if w == "long"} == {
        "ppo",
        "reinforce_none",
        "reinforce_mean",
        "remax",
        "rloo",
        "reinforce_pp",
    }
    assert (
        seeds["mild", "table", "rloo"]
        == seeds["mild", "table", "grpo"]
        == seeds["long", "table", "remax"]
        == {7, 8, 9}
    )
    assert seeds["mild", "table", "remax"] == ({7} if form == "quick" else {7, 8, 9})
    assert seeds["mild", "transformer", "dpo"] == ({7} if form == "quick" else {7, 8, 9})


def test_the_page_and_its_data_hold_every_section_and_every_run(small):
    folder, finished, data = small
    page = finished.page
    assert json.loads(TypeAdapter(LabResults).dump_json(finished.results)) == data
    assert page == folder / "index.html" and page.stat().st_size > 50_000
    empty = [k for k, v in data.items() if not v and k != "seed"]
    assert empty == []
    rows = {(r["world"], r["method"]): r for r in data["methods"]}
    assert set(rows) == {
        ("mild", "dpo"),
        ("mild", "ppo"),
        ("mild", "rloo"),
        ("mild", "grpo"),
        ("exploit", "ppo"),
        ("long", "ppo"),
        ("long", "rloo_steps"),
    }
    assert [p["samples"] for p in rows["long", "rloo_steps"]["runs"][0]["path"]] == [
        2000 + 256 * k for k in (0, 2, 4, 6)
    ]  # the judge's own are counted
    assert [r["name"] for r in data["parts"]] == [
        "GRPO as in its paper",
        "GRPO, KL in the reward",
    ]
    assert [r["name"] for r in data["lengths"]] == ["RLOO", "RLOO, a penalty for the last token"]
    assert (
        data["lengths"][1]["cut"] < data["lengths"][0]["cut"]
        and data["parts"][0]["relative_gap"] != data["parts"][1]["relative_gap"]
    )
    credit = data["credit"]
    assert (
        credit["world"] == "long"
        and [r["right"] for r in credit["responses"]] == [True, False]
        and len(credit["rows"]) == 8
    )
    assert (
        all(len(r["decisive"]) == 5 for r in credit["responses"])
        and len(credit["responses"][1]["changed"]) == 1
    )
    assert credit["responses"][1]["changed"][0] in credit["responses"][1]["decisive"]
    run = rows["mild", "dpo"]["runs"][0]
    assert (
        run["pairs"] == 30 * 256
        and run["samples"] == 0
        and [p["step"] for p in run["path"]] == [0, 10, 20, 30]
    )
    assert [p["samples"] for p in rows["mild", "ppo"]["runs"][0]["path"]] == [
        0,
        4 * 256,
        8 * 256,
        12 * 256,
    ]
    assert run["kl_optimum"] == pytest.approx(1.25, abs=1e-6) and 0 < run["relative_gap"] < 1
    (heat,) = data["sensitivity"]
    assert heat["betas"] == [2.0] and heat["learning_rates"] == [0.001, 0.05]
    assert (
        heat["relative_gap"][0][0] > heat["relative_gap"][0][1] > 0
    )  # four steps of a thousandth lead nowhere
    followed = next(c for c in data["overoptimisation"] if c["key"] == "world_exploit")
    assert (
        followed["path"]["kl"][0] == pytest.approx(0.0, abs=1e-9)
        and followed["path"]["proxy"][-1] > 0.1
    )
    text = page.read_text(encoding="utf-8")
    assert "does not begin where the curve does" not in text
    assert "<math" in text and "http" not in text.replace("http://www.w3.org", "").replace(
        "http-equiv", ""
    )


def test_the_terminal_gets_a_line_a_method_and_the_page(small, capsys):
    _, finished, data = small
    lines = as_lines(finished)
    assert len(lines) == 8 and lines[-1] == str(finished.page)
    gap = 100 * data["methods"][0]["runs"][0]["relative_gap"]
    assert lines[0].split()[:3] == ["mild", "DPO", "table"] and f"{gap:.2g}%" in lines[0]
    _print_result(verbs.verbs()["lab"], finished)
    assert capsys.readouterr().out.splitlines() == lines


def test_resume_keeps_what_is_finished_and_makes_what_is_not(small, monkeypatch):
    folder, _, data = small
    results = {p.name: p.stat().st_mtime_ns for p in (folder / "runs").glob("*.json")}
    assert len(results) == len(FEW)
    gone = folder / "runs" / f"{FEW[1].name}.json"
    gone.unlink()
    monkeypatch.setattr(command, "jobs", lambda form, seed: FEW)
    monkeypatch.setattr(command, "studies", studies)
    lab(Lab(out=str(folder), processes=1, resume=True))
    again = {p.name: p.stat().st_mtime_ns for p in (folder / "runs").glob("*.json")}
    assert {k for k in results if again[k] != results[k]} == {gone.name}
    new = json.loads((folder / "lab.json").read_text())
    for a, b in zip(data["methods"], new["methods"], strict=True):
        assert [p["relative_gap"] for p in a["runs"][0]["path"]] == [
            p["relative_gap"] for p in b["runs"][0]["path"]
        ]  # run twice, to the bit


def test_a_folder_that_is_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=r"--out: .* exists already: .*--resume"):
        lab(Lab(out=str(tmp_path)))
    for path in (
        tmp_path / "mine.txt",
        tmp_path / "mine.txt" / "below",
    ):  # a file is no folder, with --resume neither
        with pytest.raises(InputError, match=f"--out: {path} (exists already|cannot be made)"):
            lab(Lab(out=str(path), resume=True))
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_run_that_fails_is_named_with_its_log_and_the_way_on(small, monkeypatch):
    folder, _, _ = small
    bad = Job(
        "mild", Plan("dpo", "table", 1.0, 5, settings={"label_smoothing": 2.0}), "methods", 1.0
    )
    monkeypatch.setattr(command, "jobs", lambda form, seed: [bad])
    monkeypatch.setattr(command, "studies", studies)
    with pytest.raises(
        RunError, match=rf"(?s)the run {bad.name} failed: .*label.smoothing.*\.log.*--resume"
    ):
        lab(Lab(out=str(folder), processes=1, resume=True))


def test_the_cause_is_the_response_that_is_missed_most_and_how_often_it_was_drawn():
    world, _ = policies.mild(0)
    ref, best = exact.reference(world), exact.optimum(world)[0]
    p, y = (int(i) for i in np.unravel_index((np.exp(best) - np.exp(ref)).argmax(), best.shape))
    plan = Plan("ppo", "table", 0.1, 10, batch_size=200)
    path = [PathPoint(s, kl=None, reward=None, relative_gap=1.0) for s in (0, 5, 10)]
    result = RunResult(seed=0, relative_gap=0.9, path=path)
    run = MeasuredRun(result, trail=[ref.tolist()] * 3, final=ref.tolist())
    said = cause(world, plan, run)
    assert said is not None and f"{world.response_text(y)!r} to {world.prompt_text(p)!r}" in said
    expected = (
        10 * 100 * float(np.exp(ref[p, y]))
    )  # 100 responses a step to each of the two prompts, always as likely
    assert f"about {expected:.3g}" in said.replace(",", "")
    assert "below a tenth" not in said  # it stayed as likely as it was
    near = dataclasses.replace(run, result=dataclasses.replace(result, relative_gap=0.04))
    assert cause(world, plan, near) is None
    sunk = ref.copy()
    sunk[p, y] -= 3.0
    trail = [ref.tolist(), sunk.tolist(), sunk.tolist()]
    said = cause(world, plan, dataclasses.replace(run, trail=trail, final=sunk.tolist()))
    assert said is not None and "falls below a tenth of that by step 5" in said


def test_both_answers_to_sparse_reward_have_equal_sides():
    for make in (policies.mild, policies.peaked, policies.sparse):
        rows = {r.key: r for r in decision_process.sparse_answers(make(0)[0])}
        assert set(rows) == {"arm", "steps", "paid"}
        for row in rows.values():
            assert (
                row.difference < 1e-12
                and row.left == pytest.approx(row.right, abs=1e-12)
                and abs(row.left) > 1e-3
            )


def test_the_settings_are_read_without_torch():
    code = (
        "import sys; from fiducial.lab.settings import Lab; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


WINGS = ["worlds", "kit", "study", "runs", "page", "command"]


def test_no_wing_of_the_lab_imports_a_later_one_and_files_form_no_circle():
    root = Path(command.__file__).parent
    uses: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        if path.parent == root and path.name in ("__init__.py", "settings.py"):
            continue
        here = [*path.relative_to(root).parts[:-1], path.stem]
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not 1 <= node.level <= len(here):
                continue
            base = [*here[: len(here) - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                whole = root.joinpath(*base, alias.name)
                inner = whole.with_suffix(".py").exists() or whole.is_dir()
                found.add(".".join([*base, alias.name] if inner else base))
        uses[".".join(here).removesuffix(".__init__")] = found
    late = [
        (one, other)
        for one, others in uses.items()
        for other in others
        if other.split(".")[0] in WINGS
        and WINGS.index(other.split(".")[0]) > WINGS.index(one.split(".")[0])
    ]
    assert len(uses) > 30 and late == []
    assert list(graphlib.TopologicalSorter(uses).static_order())
