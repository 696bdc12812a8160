"""Best of n: what is kept is the best by an independent recount, and on the enumerable world it is
kept as often as it is known that it must be.
"""

import json
import math

import numpy as np
import pytest

from fiducial.cli import main
from fiducial.core.best_of_n import kl_bound
from fiducial.data.row_types import PromptRow
from fiducial.errors import InputError, RunError
from fiducial.lab.worlds import exact, policies
from fiducial.methods.prm import PRM, prm
from fiducial.rewards.function import FunctionReward
from fiducial.rewards.types import Scored
from fiducial.rollout.sampling import SamplingParams
from fiducial.settings import RowSettings
from fiducial.train.processes import Processes
from fiducial.use import answering as sampling
from fiducial.use.answering import Model
from fiducial.use.best_of import BestOf, best_rows
from fiducial.use.evaluate import Evaluate, evaluate
from fiducial.use.generate import Generate, generate
from support import write_jsonl

SCORES = """
import math

def letters(prompts, completions, **columns):
    return [float(c.count("a") + c.count("e")) for c in completions]

def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]

def longer(prompts, first, second, **columns):
    return [len(a) >= len(b) for a, b in zip(first, second)]
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "score.py").write_text(SCORES)
    write_jsonl(
        tmp_path / "prompts.jsonl",
        ({"prompt": p, "min_words": 2} for p in ("the cat", "a dog and a bird", "the dog")),
    )
    return tmp_path


@pytest.fixture
def settings(files, models):
    return {
        "model": models["llama"],
        "prompts": str(files / "prompts.jsonl"),
        "max_new_tokens": 8,
        "seed": 3,
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- which is kept ----


def test_the_best_by_hand_and_of_equal_ones_the_first():
    assert best_rows([1.0, 3.0, 2.0, 5.0, 5.0, 4.0, 0.0, -1.0, 0.0], 3) == [1, 3, 6]
    assert best_rows([2.0, 1.0], 1) == [0, 1]
    assert best_rows([], 4) == []


def by_hand(rows, n, score):
    """Of each n lines in a row the first of the highest score, by a loop that shares nothing with
    the package.
    """
    out = []
    while rows:
        group, rows = rows[:n], rows[n:]
        found = group[0]
        for row in group[1:]:
            if score(row["completion"]) > score(found["completion"]):
                found = row
        out.append(found | {"score": score(found["completion"]), "of": n})
    return out


SCORE = {"letters": lambda c: float(c.count("a") + c.count("e")), "length": lambda c: float(len(c))}


@pytest.mark.parametrize("score", sorted(SCORE))
@pytest.mark.parametrize(("samples", "n"), [(2, 3), (1, 5), (3, 1)])
def test_what_is_written_is_the_best_of_the_responses_that_are_drawn_without_a_score(
    files, settings, capsys, monkeypatch, score, samples, n
):
    monkeypatch.setattr(sampling, "BLOCK", samples * n)  # a prompt a block
    generate(Generate(**settings, samples=samples * n, out=str(files / "all.jsonl")))
    capsys.readouterr()
    assert (
        generate(
            Generate(
                **settings,
                samples=samples,
                best_of=n,
                score=f"{files}/score.py:{score}",
                out=str(files / "best.jsonl"),
            )
        )
        == 3 * samples
    )
    expected = by_hand(lines(files / "all.jsonl"), n, SCORE[score])
    assert lines(files / "best.jsonl") == expected
    told = capsys.readouterr().err
    drawn = [SCORE[score](r["completion"]) for r in lines(files / "all.jsonl")]
    assert (
        f"mean score {np.mean(drawn):.4g} [" in told
        and f"of all {len(drawn)} drawn, {np.mean([r['score'] for r in expected]):.4g} [" in told
    )
    assert (
        f"of the {3 * samples} kept; the best of {n} is at most {math.log(n) - (n - 1) / n:.3g} "
        "nats" in told
    )


def test_a_score_that_comes_with_the_package_reads_the_row(files, settings):
    generate(Generate(**settings, best_of=8, score="length", out=str(files / "g.jsonl")))
    for r in lines(files / "g.jsonl"):
        assert r["score"] == float(len(r["completion"].split()) >= 2)


def test_a_process_reward_model_scores_by_the_aggregate_that_is_asked_for(files, settings, models):
    rows = [
        {"prompt": "the", "completion": f"{a}\n{b}", "label": i % 2}
        for i, (a, b) in enumerate(zip("abcabcab", "dezdezde", strict=True))
    ]
    data = write_jsonl(files / "rows.jsonl", rows)
    folder = (
        prm(
            PRM(
                model=models["llama"],
                data=data,
                out=str(files / "run"),
                steps=2,
                learning_rate=1e-2,
                rows=RowSettings(held_out=0.0),
            )
        ).path
        / "model"
    )
    kept = {}
    for how, of_steps in (("last", lambda s: s[-1]), ("min", min), ("product", math.prod)):
        out = files / f"{how}.jsonl"
        generate(
            Generate(
                **settings | {"max_new_tokens": 24},
                best_of=4,
                score=str(folder),
                aggregate=how,
                out=str(out),
            )
        )
        best = BestOf.open(4, str(folder), how, 1.0, Processes())
        model = Model.open(
            settings["model"], settings["prompts"], RowSettings(), Processes(), max_new_tokens=24
        )
        params = SamplingParams(24, 1.0, frozenset({model.renderer.eos}))
        ((_, responses),) = model.answer(4, params, seed=3, title="")
        steps = best.scorer.steps(responses)
        assert max(map(len, steps)) > 1
        scores = [of_steps(s) for s in steps]
        kept[how] = [r["score"] for r in lines(out)]
        assert kept[how] == pytest.approx(
            [max(scores[i : i + 4]) for i in range(0, 12, 4)], rel=1e-6
        )
    assert kept["min"] != kept["product"]


# ---- how often, against what is known exactly ----


@pytest.mark.parametrize("n", [2, 5])
def test_on_the_enumerable_world_the_best_of_n_has_its_exact_distribution(tmp_path, n):
    """15 responses to each of 2 prompts, rewards in coarse steps so that some are equal: chi-square
    against F^n - F_below^n.
    """
    world, _ = policies.make("best", seed=4, std=0.15)
    world = world.with_(reward=np.round(world.reward))
    assert any(len(set(row)) < 10 for row in world.reward.tolist())
    model = policies.save(policies.table(world), tmp_path / "model")
    world.save(tmp_path / "world.npz")
    (tmp_path / "gold.py").write_text(
        "from pathlib import Path\nfrom fiducial.lab.worlds.world import World\nworld = "
        "World.load(Path(__file__).parent / 'world.npz')\n"
        "def score(prompts, completions, **columns):\n    return world.scores(prompts, "
        "completions)\n"
    )
    write_jsonl(tmp_path / "p.jsonl", ({"prompt": world.prompt_text(p)} for p in range(2)))
    draws = 4000
    generate(
        Generate(
            model=str(model),
            prompts=str(tmp_path / "p.jsonl"),
            samples=draws,
            best_of=n,
            score=f"{tmp_path}/gold.py:score",
            max_new_tokens=world.horizon,
            out=str(tmp_path / "o.jsonl"),
            seed=1,
        )
    )
    number = {world.response_text(y).rstrip("."): y for y in range(len(world.responses))}
    counts = np.zeros((2, len(world.responses)))
    for r in lines(tmp_path / "o.jsonl"):
        counts[
            [world.prompt_text(p) for p in range(2)].index(r["prompt"]),
            number[r["completion"].rstrip(".")],
        ] += 1
    assert (counts.sum(1) == draws).all()
    ref = exact.reference(world)
    truth = np.exp(exact.best_of_n(ref, world.reward, n))
    assert z_of(counts, truth * draws) < 4
    assert z_of(counts, np.exp(ref) * draws) > 20  # the test would see a choice that was not made
    assert z_of(counts, np.exp(exact.best_of_n(ref, world.reward, n + 1)) * draws) > 5
    found = counts / draws
    kl = (found * np.log(np.maximum(found, 1e-12) / np.exp(ref))).sum(1)
    assert (kl < kl_bound(n)).all()
    assert exact.kl(np.log(truth), ref) <= kl_bound(n)


def z_of(counts, expected):
    """Chi-square of both prompts as a normal deviate (Wilson and Hilferty 1931); the rarest are
    taken together until 5 of them are expected.
    """
    chi, df = 0.0, 0
    for c, e in zip(counts, expected, strict=True):
        order = np.argsort(e)
        c, e = c[order], e[order]
        rare = int(np.searchsorted(e.cumsum(), 5.0)) + 1
        c, e = (np.append(x[rare:], x[:rare].sum()) for x in (c, e))
        chi += float(((c - e) ** 2 / e).sum())
        df += len(e) - 1
    return ((chi / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 1000])
def test_the_bound_is_the_labs_and_is_reached_where_no_score_has_mass(n):
    assert kl_bound(n) == pytest.approx(float(exact.best_of_n_bound(n)), abs=1e-12)
    even = np.full((1, 20_000), -math.log(20_000))
    reached = exact.kl(exact.best_of_n(even, np.arange(20_000.0)[None], n), even)
    assert reached <= kl_bound(n) + 1e-12 and kl_bound(n) - reached < 1e-9 + n * 1e-4
    with pytest.raises(ValueError, match="at least 1"):
        kl_bound(0)


# ---- eval ----


def test_eval_measures_the_best_of_n_by_another_judge(files, settings):
    """The score sees letters, the judge lengths; both means are recounted from plain samples."""
    common = {**settings, "samples": 4}
    numbers = evaluate(
        Evaluate(
            **common,
            best_of=3,
            score=f"{files}/score.py:letters",
            judge=f"{files}/score.py:length",
            baseline=settings["model"],
        )
    )
    generate(Generate(**{**settings, "samples": 12}, out=str(files / "all.jsonl")))
    drawn = lines(files / "all.jsonl")
    kept = by_hand(drawn, 3, SCORE["letters"])
    assert numbers["score"]["value"] == pytest.approx(np.mean([len(r["completion"]) for r in kept]))
    assert numbers["kept_score"]["value"] == pytest.approx(np.mean([r["score"] for r in kept]))
    assert numbers["drawn_score"]["value"] == pytest.approx(
        np.mean([SCORE["letters"](r["completion"]) for r in drawn])
    )
    assert numbers["length"]["value"] == pytest.approx(np.mean([r["tokens"] for r in kept]))
    assert (numbers["kept_score"]["n"], numbers["drawn_score"]["n"], numbers["win_rate"]["n"]) == (
        12,
        36,
        12,
    )
    plain = evaluate(
        Evaluate(**common, judge=f"{files}/score.py:length", baseline=settings["model"])
    )
    assert numbers["baseline_score"] == plain["baseline_score"] and "kept_score" not in plain


def test_eval_prints_every_number(files, settings, capsys):
    score = f"{files}/score.py:length"
    args = [
        "--model",
        settings["model"],
        "--prompts",
        settings["prompts"],
        "--max-new-tokens",
        "8",
        "--best-of",
        "2",
        "--score",
        score,
    ]
    assert main(["eval", *args]) == 0
    told = capsys.readouterr()
    assert (
        "score of the best of n, by --score" in told.out
        and "score of all samples, by --score" in told.out
    )
    assert "eval: the best of 2 is at most 0.193 nats per response from the model" in told.err


# ---- what is refused ----


@pytest.mark.parametrize("verb", ["generate", "eval"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"best_of": 4}, "--best-of 4 needs --score"),
        ({"score": "letters"}, "--score chooses .* needs --best-of"),
        ({"aggregate": "min"}, "--aggregate min needs --score"),
        ({"best_of": 4, "score": "letters", "aggregate": "min"}, "is no process reward model"),
        ({"best_of": 4, "score": "longer"}, "compares two responses"),
        ({"best_of": 4, "score": "nothing"}, "--score: .* no function nothing"),
        ({"best_of": 4, "score": "=lenght"}, "--score: there is no 'lenght': did you mean length"),
        (
            {"best_of": 4, "score": "=exact_match"},
            "prompts.jsonl:1: exact_match needs the column 'answer'",
        ),
        (
            {"best_of": 4, "score": "letters", "temperature": 0.0},
            "--best-of 4 with --temperature 0: all 4 responses would be the same",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sampled(
    files, settings, verb, change, said
):
    if "score" in change:
        change = {
            **change,
            "score": change["score"][1:]
            if change["score"][0] == "="
            else f"{files}/score.py:{change['score']}",
        }
    if verb == "eval" and "temperature" in change:
        return  # eval samples, always
    with pytest.raises(InputError, match=said):
        generate(
            Generate(**settings | change, out=str(files / "o.jsonl"))
        ) if verb == "generate" else evaluate(Evaluate(**settings | change))
    assert not (files / "o.jsonl").exists()


def test_one_of_one_needs_no_temperature(files, settings):
    assert (
        generate(
            Generate(
                **settings,
                best_of=1,
                temperature=0.0,
                score=f"{files}/score.py:letters",
                out=str(files / "o.jsonl"),
            )
        )
        == 3
    )
    assert all(
        r["of"] == 1 and r["score"] == SCORE["letters"](r["completion"])
        for r in lines(files / "o.jsonl")
    )


def test_no_kl_is_read_from_responses_that_were_chosen(files, settings):
    with pytest.raises(InputError, match="--reference with --best-of"):
        evaluate(
            Evaluate(
                **settings,
                best_of=2,
                score=f"{files}/score.py:letters",
                reference=settings["model"],
            )
        )


def test_both_settings_at_the_command_line(files, settings, capsys):
    assert (
        main(
            [
                "generate",
                "--model",
                settings["model"],
                "--prompts",
                settings["prompts"],
                "--best-of",
                "4",
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert "--best-of 4 needs --score" in err and len(err.strip().splitlines()) == 1


def test_a_score_that_is_not_finite_has_no_best():
    class Broken:
        def score(self, responses):
            return Scored([0.0, math.nan], {})

    with pytest.raises(RunError, match="not finite"):
        BestOf(2, "broken", Broken(), 1.0).keep([0, 0], None)  # type: ignore[arg-type]


def test_a_users_function_is_not_called_before_there_are_responses():
    def never(prompts, completions):
        raise AssertionError

    best = BestOf(2, "f.py:never", FunctionReward("f.py:never", never, Processes()), 1.0)
    best.scorer.check_rows([PromptRow("a", {}, "f:1")])
