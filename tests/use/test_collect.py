"""Collect, generate and eval on a tiny model: what is written is what the judge said, and the
numbers are those of a slow recount.
"""

import json
import math

import pytest

from fiducial.data.row_types import PreferenceRow
from fiducial.data.rows import read_rows
from fiducial.errors import InputError, RunError
from fiducial.use.collect import Collect, collect
from fiducial.use.evaluate import Evaluate, evaluate
from fiducial.use.generate import Generate, generate

JUDGE = """
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]

def flat(prompts, completions, **columns):
    return [0.0 for c in completions]

def longer(prompts, first, second, **columns):
    return [len(a) >= len(b) for a, b in zip(first, second)]

def first_wins(prompts, first, second):
    return [True for _ in first]

def broken(prompts, completions, **columns):
    raise KeyError("no such thing")

def short(prompts, completions, **columns):
    return [1.0]
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"prompt": p}) + "\n" for p in ("the cat", "a dog and a bird", "the dog")
        )
    )
    return tmp_path


@pytest.fixture
def settings(files, models):
    return {
        "model": str(models["llama"]),
        "prompts": str(files / "prompts.jsonl"),
        "max_new_tokens": 8,
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_collected_rows_are_the_judges_word_and_load_as_preferences(files, settings):
    out = files / "pairs.jsonl"
    counts = collect(Collect(**settings, judge=f"{files}/judge.py:length", out=str(out), samples=4))
    rows = lines(out)
    assert counts["prompts"] == 3 and counts["responses"] == 12 and counts["pairs"] == len(rows)
    assert counts["pairs"] + counts["ties"] + counts["duplicates"] == 3 * math.comb(4, 2)
    for row in rows:
        assert (
            row["chosen_score"]
            == len(row["chosen"])
            > len(row["rejected"])
            == row["rejected_score"]
        )
    assert len(read_rows(str(out), (PreferenceRow,)).rows) == len(rows)


def test_a_judge_that_compares_is_asked_both_texts(files, settings):
    collect(
        Collect(**settings, judge=f"{files}/judge.py:longer", out=str(files / "a.jsonl"), samples=3)
    )
    assert all(len(r["chosen"]) >= len(r["rejected"]) for r in lines(files / "a.jsonl"))


def test_extremes_keep_the_best_and_the_worst(files, settings):
    collect(
        Collect(
            **settings, judge=f"{files}/judge.py:length", out=str(files / "all.jsonl"), samples=5
        )
    )
    collect(
        Collect(
            **settings,
            judge=f"{files}/judge.py:length",
            out=str(files / "two.jsonl"),
            samples=5,
            pairs="extremes",
        )
    )
    for prompt in {r["prompt"] for r in lines(files / "all.jsonl")}:
        gaps = [
            r["chosen_score"] - r["rejected_score"]
            for r in lines(files / "all.jsonl")
            if r["prompt"] == prompt
        ]
        (one,) = [r for r in lines(files / "two.jsonl") if r["prompt"] == prompt]
        assert one["chosen_score"] - one["rejected_score"] == max(gaps)


def test_the_same_seed_collects_the_same_and_another_does_not(files, settings):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        collect(
            Collect(
                **settings,
                judge=f"{files}/judge.py:length",
                out=str(files / f"{name}.jsonl"),
                seed=seed,
            )
        )
    assert (
        (files / "a.jsonl").read_text()
        == (files / "b.jsonl").read_text()
        != (files / "c.jsonl").read_text()
    )


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"judge": "judge.py:flat"}, InputError, "preferred no response to another"),
        ({"judge": "judge.py:nothing"}, InputError, "no function nothing"),
        ({"judge": "none.py:f"}, InputError, "there is no file"),
        ({"judge": "judge.py:broken"}, RunError, "raised KeyError"),
        ({"judge": "judge.py:short"}, RunError, "1 numbers for"),
        ({"judge": "judge.py:longer", "pairs": "extremes"}, InputError, "only compares"),
        ({"out": "pairs.txt"}, InputError, "should end in .jsonl"),
        ({"max_new_tokens": 10_000}, InputError, "prompts.jsonl:1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(files, settings, change, error, said):
    change = {k: f"{files}/{v}" if k == "judge" else v for k, v in change.items()}
    with pytest.raises(error, match=said):
        collect(
            Collect(
                **{
                    **settings,
                    "judge": f"{files}/judge.py:length",
                    "out": str(files / "x.jsonl"),
                    **change,
                }
            )
        )


def test_an_existing_file_is_not_written_over(files, settings):
    (files / "x.jsonl").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        collect(Collect(**settings, judge=f"{files}/judge.py:length", out=str(files / "x.jsonl")))
    assert (files / "x.jsonl").read_text() == "mine"


def test_generate_writes_a_line_a_response(files, settings):
    assert generate(Generate(**settings, out=str(files / "g.jsonl"), samples=2)) == 6
    rows = lines(files / "g.jsonl")
    assert [r["prompt"] for r in rows] == [
        p for p in ("the cat", "a dog and a bird", "the dog") for _ in range(2)
    ]
    assert all(1 <= r["tokens"] <= 8 and (r["finished"] or r["tokens"] == 8) for r in rows)


def test_a_model_against_itself_has_no_divergence_and_no_edge(files, settings):
    numbers = evaluate(
        Evaluate(
            **settings,
            judge=f"{files}/judge.py:length",
            baseline=settings["model"],
            reference=settings["model"],
            samples=40,
            out=str(files / "e.json"),
        )
    )
    assert abs(numbers["kl"]["value"]) < 1e-5
    assert numbers["win_rate"]["n"] == 120
    assert numbers["win_rate"]["low"] < 0.5 < numbers["win_rate"]["high"]
    assert json.loads((files / "e.json").read_text()) == numbers


def test_divergence_is_positive_and_per_token_is_per_response_over_the_length(
    files, settings, make
):
    numbers = evaluate(
        Evaluate(**settings, reference=make("llama", initializer_range=0.1), samples=20)
    )
    assert numbers["kl"]["low"] > 0.1
    assert numbers["kl_per_token"]["value"] * numbers["length"]["value"] == pytest.approx(
        numbers["kl"]["value"], rel=1e-9
    )


def test_a_judge_who_likes_the_first_gains_nobody(files, settings):
    numbers = evaluate(
        Evaluate(
            **settings, judge=f"{files}/judge.py:first_wins", baseline=settings["model"], samples=2
        )
    )
    assert numbers["win_rate"]["value"] == 0.5


def test_a_baseline_needs_a_judge(settings):
    with pytest.raises(InputError, match="--judge"):
        evaluate(Evaluate(**settings, baseline="x"))
