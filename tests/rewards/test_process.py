"""Process rewards: aggregation by hand, rewards that telescope, steps of another tokenizer, PPO
with them, and steps labelled by completing every prefix.
"""

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import fiducial as fd
from fiducial.building import build
from fiducial.data.row_types import PromptRow, StepsRow
from fiducial.data.rows import read_rows
from fiducial.data.steps import Steps
from fiducial.errors import InputError
from fiducial.methods import ppo as ppo_page
from fiducial.methods.prm import PRM, prm
from fiducial.rewards.judge import Judge
from fiducial.rewards.load import load_reward, load_rewards
from fiducial.rewards.model import ModelReward
from fiducial.rewards.process import AGGREGATES, ProcessReward, aggregate, differences
from fiducial.rewards.types import Responses
from fiducial.rollout.sampling import SamplingParams
from fiducial.rollout.trajectory import Trajectory
from fiducial.settings import RowSettings, RunSettings
from fiducial.train.processes import Processes
from fiducial.train.renderer import load_renderer
from fiducial.use import answering
from fiducial.use import label_steps as collecting
from fiducial.use.answering import Model
from fiducial.use.label_steps import LabelSteps, label_steps
from support import ARCHITECTURES, write_jsonl

# Aggregation and differences
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "last", "least", "product"),
    [
        ([0.9, 0.5, 0.8], 0.8, 0.5, 0.36),
        ([0.25], 0.25, 0.25, 0.25),
        ([0.5, 0.5, 0.5, 0.5], 0.5, 0.5, 0.0625),
        ([1.0, 0.0, 1.0], 1.0, 0.0, 0.0),
    ],
)
def test_aggregation_by_hand(steps, last, least, product):
    assert (
        aggregate(steps, "last") == last
        and aggregate(steps, "min") == least
        and aggregate(steps, "product") == pytest.approx(product, abs=1e-15)
    )


def test_what_a_step_adds_by_hand():
    assert differences([0.5, 0.75, 0.25]) == [0.5, 0.25, -0.5]
    assert differences([0.5, 0.75, 0.25], "min") == [0.5, 0.0, -0.25]
    assert differences([0.5, 0.75, 0.25], "product") == pytest.approx(
        [0.5, -0.125, -0.28125], abs=1e-15
    )


@pytest.mark.parametrize("how", AGGREGATES)
def test_differences_telescope(how):
    rng = random.Random(0)
    for _ in range(200):
        steps = [rng.random() for _ in range(rng.randint(1, 9))]
        assert sum(differences(steps, how)) == pytest.approx(aggregate(steps, how), abs=1e-12)


def test_no_step_and_no_such_way_are_refused():
    with pytest.raises(ValueError, match="without steps"):
        aggregate([], "min")
    with pytest.raises(ValueError, match="must be one of last, min, product"):
        aggregate([0.5], "mean")


# The model as a reward
# ------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """A process reward model of each make, barely trained: its scores are what they are."""
    rng = random.Random(1)
    out = {}
    for kind in ARCHITECTURES:
        folder = tmp_path_factory.mktemp("prm")
        rows = [
            {
                "prompt": "the",
                "completion": f"{rng.choice('abc')}\n{rng.choice('dez')}",
                "label": i % 2,
            }
            for i in range(12)
        ]
        data = write_jsonl(folder / "rows.jsonl", rows)
        run = prm(
            PRM(
                model=models[kind],
                data=data,
                out=str(folder / "run"),
                steps=2,
                learning_rate=1e-2,
                rows=RowSettings(held_out=0.0),
            )
        )
        out[kind] = str(run.path / "model")
    return out


PROMPTS = ["the cat", "a", "who is in"]
TEXTS = ["on the\nmat in\n a", "x", "the\n\ncat\n"]


def batch_of(kind, models, texts=TEXTS, finished=(True, False, True)):
    """Responses in the tokens of `kind`, and their renderer."""
    renderer = load_renderer(models[kind], RowSettings())
    prompts = [renderer.prompt(p, "") for p in PROMPTS]
    ids = [
        renderer.tokenizer(t, add_special_tokens=False).input_ids + [renderer.eos] * f
        for t, f in zip(texts, finished, strict=True)
    ]
    n = range(len(texts))
    trajectory = Trajectory.build(
        prompts, ids, [[-1.0] * len(r) for r in ids], list(finished), list(n), [0] * len(n), 1.0
    )
    return Responses.of(
        [PromptRow(p, {}, f"p:{i}") for i, p in enumerate(PROMPTS)], trajectory, renderer
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_the_rewards_of_a_response_stand_on_its_step_ends_and_add_up_to_its_score(
    folders, models, kind
):
    batch = batch_of(kind, models)
    rewards = load_rewards((folders[kind],), None, RunSettings(), Processes())
    (part,) = rewards.parts
    assert isinstance(part, ProcessReward) and rewards.models == []
    scored, t = rewards.score(batch), batch.trajectory
    finder = Steps(batch.renderer, "\n")
    for i, response in enumerate(t.responses(ending=True)):
        start = int(t.prompt_lengths[i])
        columns = [start + k for k in finder.ends(response)]
        assert len(columns) == (3, 1, 2)[i] and columns[-1] == int(t.lengths[i]) - 1
        assert set(scored.steps[i].nonzero()[:, 0].tolist()) <= set(columns)
        chances = []  # of each beginning alone: what comes later must not matter
        for c in columns:
            logit = part.scorer(t.ids[i : i + 1, : c + 1], torch.tensor([c + 1]))
            chances.append(float(logit.double().sigmoid()))
        assert scored.steps[i, columns].tolist() == pytest.approx(
            [b - a for a, b in zip([0.0, *chances], chances, strict=False)], abs=1e-5
        )
        assert (
            float(scored.steps[i].sum())
            == pytest.approx(scored.scores[i], abs=1e-12)
            == pytest.approx(chances[-1], abs=1e-5)
        )
    assert all(0 < s < 1 for s in scored.scores)


@torch.no_grad()
def test_other_tokens_get_the_scores_of_the_same_steps_by_number(folders, models):
    """The policy is a Llama with BOS, the reward model a Qwen without: k-th step for k-th step."""
    batch = batch_of("llama", models, finished=(True, True, True))
    part = load_reward(folders["qwen3"], RunSettings(), Processes())
    theirs = load_renderer(models["qwen3"], RowSettings())
    scored = part.score(batch)
    totals, earned = scored.scores, scored.steps
    for i, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        ids = theirs.completion(prompt, text, "").ids
        start = len(theirs.prompt(prompt, ""))
        columns = [start + k for k in Steps(theirs, "\n").ends(ids[start:])]
        (steps,) = part.score_ids([ids], [columns])
        start = int(batch.trajectory.prompt_lengths[i])
        mine = [
            start + k
            for k in Steps(batch.renderer, "\n").ends(batch.trajectory.responses(ending=True)[i])
        ]
        assert len(mine) == len(steps)
        assert earned[i, mine].tolist() == pytest.approx(differences(steps), abs=1e-6)
        assert (
            totals[i]
            == pytest.approx(steps[-1], abs=1e-6)
            == pytest.approx(float(earned[i].sum()), abs=1e-6)
        )


@torch.no_grad()
def test_where_the_policys_tokens_show_fewer_ends_nothing_is_lost(folders, models):
    part = load_reward(folders["qwen3"], RunSettings(), Processes())
    batch = batch_of("llama", models, finished=(True, True, True))
    part._policy = (batch.renderer, SimpleNamespace(ends=lambda ids: [len(ids) - 1]))
    scored = part.score(batch)
    totals, earned = scored.scores, scored.steps
    assert earned.sum(1).tolist() == pytest.approx(totals, abs=1e-12)
    assert ((earned != 0).sum(1) == 1).all() and bool((earned != 0)[batch.trajectory.last].all())


@torch.no_grad()
def test_scores_know_nothing_of_their_company(folders, models):
    batch = batch_of("gpt2", models)
    part = load_reward(folders["gpt2"], RunSettings(), Processes())
    together = part.steps(batch)
    part.tokens = 1  # a response at a time
    assert [x for r in part.steps(batch) for x in r] == pytest.approx(
        [x for r in together for x in r], abs=1e-6
    )


@torch.no_grad()
def test_weights_and_an_outcome_beside_it(folders, models, tmp_path):
    (tmp_path / "r.py").write_text(
        "def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    batch = batch_of("llama", models)
    alone = load_rewards((folders["llama"],), None, RunSettings(), Processes()).score(batch)
    both = load_rewards(
        (folders["llama"], f"{tmp_path}/r.py:length"), (3.0, 0.5), RunSettings(), Processes()
    ).score(batch)
    assert torch.allclose(
        both.steps, 3 * alone.steps
    )  # the length is earned at the end, by the rest of the score
    assert both.scores == pytest.approx(
        [3 * a + 0.5 * len(t) for a, t in zip(alone.scores, batch.completions, strict=True)]
    )
    twice = load_rewards(
        (folders["llama"], folders["qwen3"]), (1.0, 1.0), RunSettings(), Processes()
    ).score(batch)
    assert twice.steps.sum(1).tolist() == pytest.approx(twice.scores, abs=1e-9)


def test_the_config_says_how_a_whole_is_scored(folders, models, tmp_path):
    import shutil

    shutil.copytree(folders["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    batch, part = (
        batch_of("llama", models),
        load_reward(folders["llama"], RunSettings(), Processes()),
    )
    steps = part.steps(batch)
    for how in AGGREGATES:
        config["process_reward"]["aggregate"] = how
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        other = load_reward(str(tmp_path / "m"), RunSettings(), Processes())
        scored = other.score(batch)
        totals, earned = scored.scores, scored.steps
        assert scored.parts == {other.name: totals}
        assert totals == pytest.approx([aggregate(s, how) for s in steps], abs=1e-6)
        assert earned.sum(1).tolist() == pytest.approx(totals, abs=1e-9)
        judge = Judge.open(str(tmp_path / "m"), RunSettings(), Processes())
        assert judge.scores(batch) == totals
    del config["process_reward"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert isinstance(load_reward(str(tmp_path / "m"), RunSettings(), Processes()), ModelReward)


def test_ppo_is_paid_step_by_step_and_in_all_the_score(
    folders, models, data, tmp_path, monkeypatch
):
    seen = []
    shape = ppo_page.shape

    def spy(trajectory, scored, logprobs, *args, **keywords):
        rewards, metrics, first = shape(trajectory, scored, logprobs, *args, **keywords)
        seen.append((trajectory, scored, logprobs, rewards))
        return rewards, metrics, first

    monkeypatch.setattr(ppo_page, "shape", spy)
    settings = {
        "model": models["gpt2"],
        "data": data["prompts"],
        "out": str(tmp_path / "run"),
        "reward": (folders["gpt2"],),
        "steps": 3,
        "batch_size": 16,
    }
    fd.ppo(
        fd.PPO(
            **settings,
            max_new_tokens=24,
            epochs=1,
            learning_rate=1e-3,
            beta=0.3,
            run=RunSettings(samples=2),
        )
    )
    assert len(seen) == 3
    several = 0
    for t, scored, old, rewards in seen:
        price = 0.3 * torch.where(t.mask, old.logprobs - old.ref_logprobs, torch.zeros(()))
        assert torch.allclose(
            (rewards + price).sum(1).double(), torch.tensor(scored.scores).double(), atol=1e-5
        )
        paid = rewards + price
        inner = paid.masked_fill(t.last, 0.0)
        several += int((inner.abs() > 1e-6).any(1).sum())
        assert (rewards[~t.mask] == 0).all()
    assert several > 5  # some responses have several lines, and each of them was paid


# Steps labelled by completing every prefix
# ------------------------------------------------------------

JUDGE = """
def no_x(prompts, completions, target, **columns):
    assert set(target) <= {"x", "z"} and len(target) == len(prompts)
    return [float(t not in c) for c, t in zip(completions, target)]

def always(prompts, completions, **columns):
    return [1.0] * len(completions)

def first(prompts, first, second):
    return [True] * len(first)
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt": p, "target": t} for p, t in (("the cat", "x"), ("a", "z"), ("who is in", "x"))],
    )
    return tmp_path


@pytest.fixture(scope="module")
def lively(make):
    """A model that writes lines: its weights are large, and of its 64 tokens one in a few is a line
    feed.
    """
    return make("llama", initializer_range=0.12)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings_of(files, model, **changes):
    common = {
        "model": model,
        "prompts": str(files / "prompts.jsonl"),
        "judge": f"{files}/judge.py:no_x",
        "out": str(files / "steps.jsonl"),
    }
    return build(
        LabelSteps,
        (
            common
            | {"samples": 6, "completions": 5, "separator": "e", "max_new_tokens": 20}
            | changes
        ),
    )


def test_a_step_is_right_exactly_where_no_mistake_stands_before_it(files, lively, capsys):
    """A response with the forbidden letter is wrong whatever comes behind: no prefix that has it
    can be mended, and one that has not mostly can.
    """
    counts = label_steps(settings_of(files, lively))
    rows = lines(files / "steps.jsonl")
    target = {"the cat": "x", "a": "z", "who is in": "x"}
    inner = good = 0
    for row in rows:
        n = len(row["completions"])
        assert n == len(row["labels"]) == len(row["rates"])
        assert [r > 0 for r in row["rates"]] == row["labels"] and all(
            (r * 5) % 1 == pytest.approx(0) for r in row["rates"]
        )
        for k in range(n):
            spoilt = target[row["prompt"]] in "e".join(row["completions"][: k + 1])
            if spoilt:
                assert row["rates"][k] == 0
            elif k + 1 < n:
                inner, good = inner + 1, good + row["labels"][k]
            else:  # the whole response: its own outcome
                assert row["rates"][k] == 1
    assert inner > 10 and good > 0.6 * inner
    assert any(0 < r < 1 for row in rows for r in row["rates"])
    assert counts["responses"] == 18 and counts["steps"] == sum(len(r["labels"]) for r in rows)
    assert counts["recoverable"] == sum(sum(r["labels"]) for r in rows) and counts[
        "unsplit"
    ] == 18 - len(rows)
    assert "recoverable, not valid" in capsys.readouterr().err
    assert all(isinstance(r, StepsRow) for r in read_rows(str(files / "steps.jsonl"), (StepsRow,)))


def test_rates_are_those_of_the_models_own_continuations(files, lively, monkeypatch):
    """Every completion begins with its prefix, token for token, is no longer than a response may
    be, and ends as the sampler says.
    """
    seen = []
    scores = Judge.scores
    monkeypatch.setattr(Judge, "scores", lambda self, r: seen.append(r) or scores(self, r))
    label_steps(settings_of(files, lively, max_new_tokens=14))
    whole, parts = seen[0], seen[1:]
    tokens = {
        (int(p), int(s)): r
        for p, s, r in zip(
            whole.trajectory.prompt,
            whole.trajectory.sample,
            whole.trajectory.responses(ending=True),
            strict=True,
        )
    }
    finder = Steps(whole.renderer, "e")
    prefixes = {(p, tuple(r[: e + 1])) for (p, _), r in tokens.items() for e in finder.ends(r)[:-1]}
    assert parts and prefixes
    for part in parts:
        t = part.trajectory
        assert int(t.response_lengths.max()) <= 14
        for p, r, f in zip(
            t.prompt.tolist(), t.responses(ending=True), t.finished.tolist(), strict=True
        ):
            assert any(p == q and tuple(r[: len(x)]) == x and len(r) > len(x) for q, x in prefixes)
            assert f == (r[-1] == whole.renderer.eos) and (f or len(r) == 14)
        assert [c["target"] for c in part.columns] == [
            {0: "x", 1: "z", 2: "x"}[p] for p in t.prompt.tolist()
        ]
    assert (
        sum(len(p.trajectory) for p in parts)
        == 5 * sum(len(row["labels"]) - 1 for row in lines(files / "steps.jsonl"))
        > 0
    )


def test_blocks_and_groups_change_nothing(files, lively, monkeypatch):
    label_steps(settings_of(files, lively, out=str(files / "a.jsonl")))
    monkeypatch.setattr(answering, "BLOCK", 1)  # a prompt at a time
    label_steps(settings_of(files, lively, out=str(files / "b.jsonl")))
    monkeypatch.setattr(collecting, "WASTE", 0)  # prefixes of one length at a time
    label_steps(settings_of(files, lively, out=str(files / "c.jsonl")))
    label_steps(settings_of(files, lively, out=str(files / "d.jsonl"), seed=1))
    a, b, c, d = ((files / f"{x}.jsonl").read_text() for x in "abcd")
    assert a == b == c != d


def test_every_completion_has_a_random_stream_of_its_own(files, lively, monkeypatch):
    keys = []
    whole = collecting.sample_all

    def spy(sampler, prompts, params, streams, processes):
        both = zip(streams.prompt, streams.sample, strict=True)
        keys.extend((streams.seed, streams.step, p, s) for p, s in both)
        return whole(sampler, prompts, params, streams, processes)

    monkeypatch.setattr(collecting, "sample_all", spy)
    label_steps(settings_of(files, lively))
    assert len(keys) == len(set(keys)) > 100


def test_groups_fit_the_context():
    prompts = [60, 10, 55]
    prefixes = [
        collecting.Prefix(i, k, [0] * n)
        for k, (i, n) in enumerate(itertools.product(range(3), (1, 3, 9, 20, 39)))
    ]
    groups = collecting.alike(prefixes, prompts, 40, 100)
    assert sorted(p.step for g in groups for p in g) == list(range(15)) and len(groups) < 15
    for group in groups:
        room = 40 - min(len(p.ids) for p in group)
        assert all(prompts[p.response] + len(p.ids) + room <= 100 for p in group)
        assert max(len(p.ids) for p in group) - min(len(p.ids) for p in group) <= collecting.WASTE


def test_a_prompt_that_just_fits_is_completed_too(files, lively):
    write_jsonl(
        files / "prompts.jsonl",
        [{"prompt": "abcd" * 25, "target": "x"}, {"prompt": "a", "target": "x"}],
    )
    renderer = load_renderer(lively, RowSettings())
    room = 128 - len(renderer.prompt("abcd" * 25, ""))
    assert label_steps(settings_of(files, lively, max_new_tokens=room))["steps"] > 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"judge": "judge.py:first"},
            "compares two responses, and steps are labeled by the score of each",
        ),
        ({"out": "steps.txt"}, "should end in .jsonl"),
        ({"separator": ""}, "every token would be a step"),
    ],
)
def test_what_cannot_work_is_refused(files, lively, change, said):
    change = {k: f"{files}/{v}" if v else v for k, v in change.items()}
    with pytest.raises(InputError, match=said):
        label_steps(settings_of(files, lively, **change))
    assert not (files / "steps.jsonl").exists()


def test_the_threshold_is_the_score_from_which_an_outcome_is_right(files, lively):
    counts = label_steps(
        settings_of(
            files,
            lively,
            judge=f"{files}/judge.py:always",
            threshold=1.0,
            out=str(files / "a.jsonl"),
        )
    )
    assert counts["recoverable"] == counts["steps"] > 18
    assert all(set(row["rates"]) == {1.0} for row in lines(files / "a.jsonl"))
    assert (
        label_steps(
            settings_of(
                files,
                lively,
                judge=f"{files}/judge.py:always",
                threshold=1.1,
                out=str(files / "b.jsonl"),
            )
        )["recoverable"]
        == 0
    )


def test_what_is_collected_trains_a_process_reward_model(files, lively, tmp_path):
    label_steps(settings_of(files, lively))
    run = prm(
        PRM(
            model=lively,
            data=str(files / "steps.jsonl"),
            out=str(tmp_path / "run"),
            separator="e",
            steps=2,
        )
    )
    part = load_reward(str(run.path / "model"), RunSettings(), Processes())
    assert isinstance(part, ProcessReward) and part.finder.separator == "e"
    prompts = str(files / "prompts.jsonl")
    model = Model.open(lively, prompts, RowSettings(), Processes(), max_new_tokens=8)
    params = SamplingParams(8, 1.0, frozenset({model.renderer.eos}))
    for _, responses in model.answer(2, params, seed=0, title="x"):
        assert all(0 < s < 1 and math.isfinite(s) for s in part.score(responses).scores)
