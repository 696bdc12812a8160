"""REINFORCE and GRPO from the prompt to the gradient, against loops over single tokens written from
the papers: one row at a time, no padding, no groups but lists, a plain transformers model, and
rewards counted from the text.
"""

import dataclasses
import json
import math
import statistics

import pytest
import torch
import yaml
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

import fiducial as fd
from fiducial.building import build
from fiducial.cli import main
from fiducial.config_file import dump_yaml
from fiducial.data.batches import Batches, stream
from fiducial.errors import InputError
from fiducial.methods import grpo as grpo_page
from fiducial.methods import ppo as ppo_page
from fiducial.methods import reinforce as reinforce_page
from fiducial.methods import setup
from fiducial.methods.settings.ppo import CriticSettings
from fiducial.models import load
from fiducial.parse import parse
from fiducial.rewards.load import load_rewards
from fiducial.rewards.shaping import ScoreScale, overlong
from fiducial.rewards.types import Scored
from fiducial.rollout.trajectory import Trajectory
from fiducial.settings import (
    KLSettings,
    LongSettings,
    LoraSettings,
    OptimizerSettings,
    RowSettings,
    RunSettings,
    ScoreSettings,
)
from fiducial.train.renderer import load_renderer
from fiducial.train.step import Stepper
from support import PROMPTS, write_jsonl

PAGES = {"reinforce": reinforce_page, "grpo": grpo_page, "ppo": ppo_page}
LONGEST, WARM = 7, 0.7
STOP = ("a", "e", "i", "o", "the", "in", "er", "cat", "on", "c", "d", "f", "g")
"""Enough tokens that end a response for some of them to end and some to be cut."""
LETTERS = """
def score(prompts, completions):
    return [3.0 * c.count('e') - c.count('x') + len(c) / 4 for c in completions]
"""


def by_letters(text):
    return 3.0 * text.count("e") - text.count("x") + len(text) / 4


@dataclasses.dataclass
class Update:
    """What one optimizer step was given: gradients, the weights before it, and the responses it was
    made of.
    """

    gradient: torch.Tensor
    before: dict
    trajectory: Trajectory


@pytest.fixture
def probe(models, data, tmp_path, monkeypatch):
    """probe("grpo", ...): a short run, and what each of its updates was given."""
    (tmp_path / "letters.py").write_text(LETTERS)
    calls = []

    def run(method, *, sampler=lambda t: t, kind="llama", **changes):
        page, step, updates = PAGES[method], Stepper.step, []
        calls.append(method)

        def spy(self, number):
            if any(
                n.endswith("embed_tokens.weight") or "lm." in n
                for n, _ in self.module.named_parameters()
            ) and hasattr(self.module, "lm"):
                named = [(n, p) for n, p in self.module.named_parameters() if n.startswith("lm.")]
                gradient = torch.cat(
                    [
                        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                        for _, p in named
                    ]
                )
                before = {n.removeprefix("lm."): p.detach().clone() for n, p in named}
                updates.append(Update(gradient.clone(), before, seen[-1]))
            return step(self, number)

        forward, sample, seen = page.forward, setup.sample_all, []

        def looking(trajectory, *args, **keywords):
            seen.append(trajectory)
            return forward(trajectory, *args, **keywords)

        def sampling(*args, **keywords):
            return sampler(sample(*args, **keywords))

        common = {
            "model": models[kind],
            "data": data["prompts"],
            "reward": (f"{tmp_path}/letters.py:score",),
            "out": str(tmp_path / f"run-{len(calls)}"),
        }
        common |= {
            "steps": 2,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "max_new_tokens": LONGEST,
            "temperature": WARM,
            "stop": STOP,
        }
        common |= {
            "optimizer": OptimizerSettings(schedule="constant", max_grad_norm=1e9),
            "run": RunSettings(samples=1, tokens=1000),
        }
        if method != "ppo":
            common["group_size"] = 4
        with monkeypatch.context() as patch:
            patch.setattr(Stepper, "step", spy)
            patch.setattr(page, "forward", looking)
            patch.setattr(setup, "sample_all", sampling)
            cls = {"reinforce": fd.Reinforce, "grpo": fd.GRPO, "ppo": fd.PPO}[method]
            done = getattr(fd, method)(cls(**(common | changes)))
        return done, updates

    return run


class Slow:
    """A plain model at given weights, asked for one response at a time."""

    def __init__(self, folder, weights=None):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if weights is not None:
            self.model.load_state_dict(weights, strict=False)
        self.renderer = load_renderer(folder, RowSettings())
        self.ends = {
            self.renderer.eos,
            *(self.renderer.tokenizer.convert_tokens_to_ids(s) for s in STOP),
        }

    def logprobs(self, t, i):
        """Of the response's tokens, with gradient."""
        ids = t.ids[i, : t.lengths[i]]
        logp = log_softmax(self.model(input_ids=ids[None]).logits[0] / WARM, -1)
        return [logp[k - 1, ids[k]] for k in range(int(t.prompt_lengths[i]), int(t.lengths[i]))]

    def text(self, ids):
        return self.renderer.decode(ids[:-1] if ids[-1] in self.ends else ids)

    @torch.no_grad()
    def greedy(self, prompt):
        ids = list(prompt)
        while len(ids) < len(prompt) + LONGEST and (
            len(ids) == len(prompt) or ids[-1] not in self.ends
        ):
            ids.append(int(self.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    def gradient(self, loss):
        named = dict(self.model.named_parameters())
        self.model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in named.values()])


def response(t, i):
    return t.ids[i, t.prompt_lengths[i] : t.lengths[i]].tolist()


def close(one, other, tolerance=1e-4):
    assert other.norm() > 1e-4
    assert (one - other).norm() < tolerance * other.norm(), float(
        (one - other).norm() / other.norm()
    )


def groups_of(t):
    """Lists of row numbers: rows of one prompt that stand together."""
    assert all(len({int(t.prompt[i]) for i in range(g, g + 4)}) == 1 for g in range(0, len(t), 4))
    return [list(range(g, g + 4)) for g in range(0, len(t), 4)]


# REINFORCE: the gradient of each step
# ------------------------------------------------------------


def slow_reinforce(
    folder,
    update,
    baseline,
    *,
    beta,
    mean=0.0,
    scores=None,
    steps=None,
    credit=None,
    keep=None,
    weights=None,
    greedy_worth=None,
):
    """The gradient of -1/(N L) sum_i sum_t A_it log pi(y_it), and the mean return of the batch."""
    now, start, t = Slow(folder, update.before), Slow(folder), update.trajectory
    lps = [now.logprobs(t, i) for i in range(len(t))]
    refs = [[x.item() for x in start.logprobs(t, i)] for i in range(len(t))]
    scores = scores or [by_letters(now.text(response(t, i))) for i in range(len(t))]
    rewards = []
    for i in range(len(t)):
        row = [-beta * (lp.item() - ref) for lp, ref in zip(lps[i], refs[i], strict=True)]
        if steps is not None:
            row = [r + s for r, s in zip(row, steps[i], strict=True)]
        row[-1] += scores[i] - (sum(steps[i]) if steps is not None else 0.0)
        rewards.append(row)
    totals = [sum(row) for row in rewards]
    default = "reward_to_go" if baseline == "reinforce++" else "sequence_return"
    to_go = (credit or default) == "reward_to_go"
    returns = [[sum(row[k:]) if to_go else sum(row) for k in range(len(row))] for row in rewards]
    tokens = [g for i, row in enumerate(returns) if keep is None or keep[i] for g in row]
    loss = 0.0
    for i in range(len(t)):
        for k, lp in enumerate(lps[i]):
            mates = [j for j in next(g for g in groups_of(t) if i in g) if j != i]
            others = [
                sum(rewards[j][k if to_go else 0 :]) for j in mates
            ]  # of one that has ended nothing is to come
            prompt = t.ids[i, : t.prompt_lengths[i]].tolist()
            b = {
                "none": lambda: 0.0,
                "mean": lambda: mean,
                "rloo": lambda o=others: sum(o) / 3,
                "remax": lambda p=prompt: (greedy_worth or (lambda r: by_letters(now.text(r))))(
                    now.greedy(p)
                ),
                "reinforce++": lambda: sum(tokens) / len(tokens),
            }[baseline]()
            advantage = returns[i][k] - b
            if baseline == "reinforce++":
                advantage /= math.sqrt(sum((g - b) ** 2 for g in tokens) / len(tokens))
            if keep is None or keep[i]:
                loss = loss - (1.0 if weights is None else weights[i][k]) * advantage * lp
    return now.gradient(loss / (len(t) * LONGEST)), sum(totals) / len(totals)


@pytest.mark.parametrize("tokens", [1, 100_000])
@pytest.mark.parametrize("baseline", ["none", "mean", "remax", "rloo", "reinforce++"])
def test_the_gradient_of_each_step_is_that_of_the_formula(probe, models, baseline, tokens):
    """Also that k1 is paid in the reward: from step two on the policy is not the reference."""
    run, updates = probe(
        "reinforce", baseline=baseline, beta=0.3, steps=3, run=RunSettings(samples=1, tokens=tokens)
    )
    assert len(updates) == 3
    mean = None
    for update in updates:
        expected, average = slow_reinforce(
            models["llama"], update, baseline, beta=0.3, mean=mean or 0.0
        )
        close(update.gradient, expected)
        mean = average if mean is None else 0.9 * mean + 0.1 * average
    assert run.state.mean == pytest.approx(mean, rel=1e-4)
    assert 0 < int(updates[-1].trajectory.finished.sum()) < 8 and run.metrics["objective/kl"] > 0.1


def test_the_greedy_score_is_on_the_scale_of_the_sampled_ones_and_pays_their_penalties(
    probe, models
):
    score = ScoreSettings(
        normalise="first", missing_eos_penalty=0.4, length_buffer=3, length_penalty=0.5
    )
    _, updates = probe("reinforce", baseline="remax", beta=0.0, score=score)
    first = [
        by_letters(Slow(models["llama"]).text(response(updates[0].trajectory, i))) for i in range(8)
    ]
    mean, deviation = statistics.fmean(first), statistics.pstdev(first)

    def worth(ids):
        slow = Slow(models["llama"])
        late = min(max((len(ids) - (LONGEST - 3)) / 3, 0), 1)
        return (
            (by_letters(slow.text(ids)) - mean) / deviation
            - 0.4 * (ids[-1] not in slow.ends)
            - 0.5 * late
        )

    for update in updates:
        scores = [worth(response(update.trajectory, i)) for i in range(8)]
        expected, _ = slow_reinforce(
            models["llama"], update, "remax", beta=0.0, scores=scores, greedy_worth=worth
        )
        close(update.gradient, expected)
        assert len(set(scores)) > 3


@pytest.mark.parametrize("estimator", ["k2", "k2_tokens", "weighted_k3", "forward_k3"])
@pytest.mark.parametrize("method", ["reinforce", "ppo"])
def test_a_penalty_in_the_loss_adds_its_own_gradient_times_beta(probe, models, method, estimator):
    """At the first step the policy is the reference, and no penalty has a gradient: the second
    starts from the same weights with and without.
    """
    more = (
        {"critic": CriticSettings(start="policy"), "epochs": 1, "whiten": False}
        if method == "ppo"
        else {}
    )
    gradients = {}
    for beta in (0.0, 0.4, 0.8):
        _, updates = probe(method, beta=beta, kl=KLSettings(estimator=estimator), **more)
        gradients[beta] = updates[1].gradient
    t, now, start = (
        updates[1].trajectory,
        Slow(models["llama"], updates[1].before),
        Slow(models["llama"]),
    )
    penalty = 0.0
    for i in range(len(t)):
        ls = [
            lp - ref.detach()
            for lp, ref in zip(now.logprobs(t, i), start.logprobs(t, i), strict=True)
        ]
        each = {
            "k2": lambda ls=ls: sum(ls) ** 2 / 2,
            "k2_tokens": lambda ls=ls: sum(x**2 / 2 for x in ls),
            "forward_k3": lambda ls=ls: sum(torch.exp(-x) - 1 + x for x in ls),
            "weighted_k3": lambda ls=ls: sum(
                torch.exp(x - x.detach()) * (torch.exp(-x) - 1 + x) for x in ls
            ),
        }[estimator]
        penalty = penalty + each()
    expected = now.gradient(
        penalty / (8 * LONGEST if method == "reinforce" else int(t.response_lengths.sum()))
    )
    close(gradients[0.4] - gradients[0.0], 0.4 * expected, 1e-2)
    close(gradients[0.8] - gradients[0.0], 0.8 * expected, 1e-2)


# GRPO: each variant, at ratio 1 and beyond
# ------------------------------------------------------------


def slow_grpo(folder, update, old_weights, rows, settings, *, advantages=None, keep=None):
    """The gradient of one update over some rows, by the papers' formulas; and how many tokens (or
    responses) the clip has cut.
    """
    now, old, start, t = (
        Slow(folder, update.before),
        Slow(folder, old_weights),
        Slow(folder),
        update.trajectory,
    )
    scores = [by_letters(now.text(response(t, i))) for i in range(len(t))]
    reward = [
        s - (settings["beta"] * kl_of(old, start, t, i) if settings["k1"] else 0.0)
        for i, s in enumerate(scores)
    ]
    if advantages is None:
        advantages = {}
        for group in groups_of(t):
            values = [reward[i] for i in group]
            for i in group:
                scale = statistics.stdev(values) + 1e-4 if settings["deviation"] else 1.0
                advantages[i] = (reward[i] - statistics.fmean(values)) / scale
    total, cut = 0.0, 0
    kept = [i for i in rows if keep is None or keep[i]]
    all_tokens = sum(int(t.response_lengths[i]) for i in kept)
    for i in rows:
        lps, olds = now.logprobs(t, i), [x.detach() for x in old.logprobs(t, i)]
        a, length, low, high = (
            advantages[i],
            len(lps),
            1 - settings["clip"],
            1 + (settings["high"] or settings["clip"]),
        )
        if keep is not None and not keep[i]:
            continue
        if (
            settings.get("stale") is not None
            and a < 0
            and sum((o - n).item() for o, n in zip(olds, lps, strict=True)) / length
            > settings["stale"]
        ):
            cut += 1
            continue
        part = 0.0
        if settings["loss"] == "gspo":
            s = torch.exp(sum(n - o for n, o in zip(lps, olds, strict=True)) / length)
            part = length * torch.minimum(s * a, s.clamp(low, high) * a)
            cut += (a > 0 and s > high) or (a < 0 and s < low)
        for n, o in zip(lps, olds, strict=True):
            rho = torch.exp(n - o)
            if settings["loss"] == "ppo_clip":
                part = part + torch.minimum(rho * a, rho.clamp(low, high) * a)
                cut += bool((a > 0 and rho > high) or (a < 0 and rho < low))
            elif settings["loss"] == "cispo":
                part = part + min(rho.item(), settings["cap"]) * a * n
                cut += rho.item() > settings["cap"]
        if settings.get("k3"):
            for n, r in zip(lps, start.logprobs(t, i), strict=True):
                part = part - settings["beta"] * (torch.exp(r.detach() - n) - (r.detach() - n) - 1)
        total = (
            total
            + part
            / {
                "sequence_mean": length * len(kept),
                "token_mean": all_tokens,
                "constant": len(rows) * LONGEST,
            }[settings["mean"]]
        )
    return now.gradient(-total), cut


@torch.no_grad()
def kl_of(policy, reference, t, i):
    return float(
        sum(a - b for a, b in zip(policy.logprobs(t, i), reference.logprobs(t, i), strict=True))
    )


VARIANTS = {
    "grpo": {
        "loss": "ppo_clip",
        "mean": "sequence_mean",
        "clip": 0.2,
        "high": None,
        "beta": 0.04,
        "k1": False,
        "k3": True,
        "deviation": True,
    },
    "dr_grpo": {
        "loss": "ppo_clip",
        "mean": "constant",
        "clip": 0.2,
        "high": None,
        "beta": 0.0,
        "k1": False,
        "deviation": False,
    },
    "dapo": {
        "loss": "ppo_clip",
        "mean": "token_mean",
        "clip": 0.2,
        "high": 0.28,
        "beta": 0.0,
        "k1": False,
        "deviation": True,
    },
    "gspo": {
        "loss": "gspo",
        "mean": "sequence_mean",
        "clip": 3e-4,
        "high": 4e-4,
        "beta": 0.0,
        "k1": False,
        "deviation": True,
    },
    "cispo": {
        "loss": "cispo",
        "mean": "token_mean",
        "clip": 0.2,
        "high": None,
        "cap": 5.0,
        "beta": 0.0,
        "k1": False,
        "deviation": True,
    },
}


@pytest.mark.parametrize(
    ("variant", "changes", "slow"),
    [
        *((name, {}, {}) for name in VARIANTS),
        ("cispo", {"cap": 1.1}, {"cap": 1.1}),
        ("dapo", {"beta": 0.3}, {"beta": 0.3, "k1": True}),
        (
            "grpo",
            {"loss_aggregation": "token_mean", "clip": 0.05, "clip_high": 0.6},
            {"mean": "token_mean", "clip": 0.05, "high": 0.6},
        ),
        ("gspo", {"clip": 0.02, "clip_high": 0.3}, {"clip": 0.02, "high": 0.3}),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x) or "",
)
def test_each_variant_has_the_gradient_of_its_paper_in_every_epoch(
    probe, models, variant, changes, slow
):
    settings = VARIANTS[variant] | slow
    changes = {"epochs": 2, "minibatches": 2, "learning_rate": 2e-2} | changes
    run, updates = probe("grpo", variant=variant, **changes)
    assert len(updates) == 8
    cuts = []
    for number, update in enumerate(updates):
        iteration = number // 4
        rows = Batches(8, 4, 0)[number]
        expected, cut = slow_grpo(
            models["llama"], update, updates[4 * iteration].before, rows, settings
        )
        cuts.append(cut)
        if expected.norm() < 1e-4:  # all of a minibatch may be clipped
            assert update.gradient.norm() < 1e-4
            continue
        close(update.gradient, expected, 2e-4)
    assert cuts[0] == cuts[4] == 0
    assert sum(cuts) > 0 or settings.get("cap") == 5.0  # the clip was put to the test
    assert run.metrics["ratio/first"] == pytest.approx(1, abs=1e-5)


def test_a_response_that_was_left_behind_is_left_out(probe, models):
    settings = VARIANTS["cispo"] | {"stale": 0.05}  # which cuts no gradient by itself
    _, updates = probe("grpo", variant="cispo", off_policy_mask=0.05, epochs=3, steps=1)
    cuts = []
    for update in updates:
        expected, cut = slow_grpo(models["llama"], update, updates[0].before, range(8), settings)
        close(update.gradient, expected)
        cuts.append(cut)
    assert cuts[0] == 0 < cuts[-1]


# Fresh prompts for those without spread
# ------------------------------------------------------------


def watch(monkeypatch):
    """All keys of random streams that are asked for, call by call."""
    sample, asked = setup.sample_all, []

    def sampling(sampler, prompts, params, keys, processes):
        asked.append([(keys.step, p, s) for p, s in zip(keys.prompt, keys.sample, strict=True)])
        return sample(sampler, prompts, params, keys, processes)

    monkeypatch.setattr(setup, "sample_all", sampling)
    return asked


def test_groups_without_spread_give_way_to_fresh_prompts(probe, tmp_path, monkeypatch):
    """The responses to every second row all score 1, whatever they say."""
    (tmp_path / "some.py").write_text(
        "def score(prompts, completions, number):\n    return [1.0 if n % 2 else c.count('e') + "
        "len(c) / 9 for n, c in zip(number, completions)]\n"
    )
    asked, gather, batches = watch(monkeypatch), grpo_page.gather, []
    monkeypatch.setattr(grpo_page, "gather", lambda *a: batches.append(gather(*a)) or batches[-1])
    run, _ = probe(
        "grpo", variant="dapo", reward=(f"{tmp_path}/some.py:score",), steps=4, batch_size=12
    )
    lines = [
        line
        for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
        if "num_tokens" in line
    ]
    drawn = 0
    for step, (line, (trajectory, groups, scored, _)) in enumerate(
        zip(lines, batches, strict=True)
    ):
        calls = [call for call in asked if call[0][0] == step]
        keys = [key for call in calls for key in call]
        prompts = [p for _, p, _ in keys][::4]
        assert len(keys) == len(set(keys))  # no random stream is used twice
        assert [
            (p, e * 4 + k) for p, e in stream(10, drawn, len(prompts), 0) for k in range(4)
        ] == [key[1:] for key in keys]
        drawn += len(prompts)
        assert line["groups/sampled"] == len(prompts)
        assert (
            len(trajectory) == 12
            and torch.unique(groups).tolist() == sorted(set(groups.tolist()))
            and len(set(groups.tolist())) == 3
        )
        for g in range(3):
            here = slice(4 * g, 4 * g + 4)
            assert (
                len(set(groups[here].tolist())) == len(set(trajectory.prompt[here].tolist())) == 1
            )
            assert len(set(scored.scores[here])) > 1 and trajectory.prompt[4 * g] % 2 == 0
        odd = sum(p % 2 for p in prompts)
        assert line["groups/no_spread"] >= odd / len(prompts) and (
            line["groups/no_spread"] > 0
        ) == (len(prompts) > 3)
        used = set(zip(trajectory.prompt.tolist(), trajectory.sample.tolist(), strict=True))
        missing = 3  # a round asks for as many as are wanted, no more
        for call in calls:
            assert len(call) == 4 * missing
            missing -= sum(key[1:] in used for key in call[::4])
        assert missing == 0
    assert run.state.drawn == drawn > 4 * 3


@pytest.mark.parametrize("variant", ["dapo", "grpo", "dr_grpo", "gspo", "cispo"])
def test_where_all_scores_are_equal_nothing_moves(probe, models, tmp_path, variant):
    (tmp_path / "one.py").write_text(
        "def score(prompts, completions):\n    return [0.1] * len(completions)\n"
    )
    run, updates = probe(
        "grpo",
        variant=variant,
        beta=0.0,
        resample=2,
        reward=(f"{tmp_path}/one.py:score",),
        epochs=2,
    )
    assert len(updates) == 4 and all((u.gradient == 0).all() for u in updates)
    assert (
        run.metrics["groups/sampled"] == 6
        and run.metrics["groups/no_spread"] == 1
        and run.state.drawn == 12
    )
    after, before = (
        AutoModelForCausalLM.from_pretrained(run.path / "model").state_dict(),
        AutoModelForCausalLM.from_pretrained(models["llama"]).state_dict(),
    )
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("baseline", ["rloo", "reinforce++"])
def test_where_all_returns_are_equal_reinforce_does_not_move_either(probe, tmp_path, baseline):
    (tmp_path / "one.py").write_text(
        "def score(prompts, completions):\n    return [0.1] * len(completions)\n"
    )
    _, updates = probe(
        "reinforce", baseline=baseline, beta=0.0, reward=(f"{tmp_path}/one.py:score",)
    )
    assert len(updates) == 2 and all((u.gradient == 0).all() for u in updates)


# Long responses, and a sampler that is another
# ------------------------------------------------------------


def test_the_penalty_of_the_last_tokens_grows_linearly_to_the_limit():
    """DAPO's eq. 13 by hand: a limit of 10 of which 4 are the buffer."""
    assert overlong(torch.tensor([1, 6, 7, 8, 9, 10]), 10, 4).tolist() == [0, 0, 0.25, 0.5, 0.75, 1]


def test_cut_and_long_responses_pay_in_their_score(probe, models):
    score = ScoreSettings(missing_eos_penalty=1.5, length_buffer=4, length_penalty=2.0)
    run, updates = probe("reinforce", baseline="rloo", beta=0.2, score=score)
    for update in updates:
        t, slow, scores = update.trajectory, Slow(models["llama"]), []
        for i in range(8):
            ids = response(t, i)
            scores.append(
                by_letters(slow.text(ids))
                - 1.5 * (ids[-1] not in slow.ends)
                - 2.0 * max(0, (len(ids) - (LONGEST - 4)) / 4)
            )
        expected, _ = slow_reinforce(models["llama"], update, "rloo", beta=0.2, scores=scores)
        close(update.gradient, expected)
    assert (
        run.metrics["objective/score"] == pytest.approx(sum(scores) / 8)
        and run.metrics["objective/score"] < run.metrics["reward"]
    )


@pytest.mark.parametrize("baseline", ["rloo", "reinforce++"])
def test_a_response_that_was_cut_has_no_gradient_if_so_asked(probe, models, baseline):
    _, updates = probe(
        "reinforce", baseline=baseline, beta=0.2, long=LongSettings(mask_truncated=True)
    )
    assert 0 < int(updates[0].trajectory.finished.sum()) < 8
    for update in updates:
        keep = update.trajectory.finished.tolist()
        expected, _ = slow_reinforce(models["llama"], update, baseline, beta=0.2, keep=keep)
        close(update.gradient, expected)


@pytest.mark.parametrize("mean", ["sequence_mean", "token_mean", "constant"])
def test_the_means_of_grpo_are_over_what_is_learned_from(probe, models, mean):
    _, updates = probe(
        "grpo",
        variant="dr_grpo",
        loss_aggregation=mean,
        long=LongSettings(mask_truncated=True),
        epochs=2,
        steps=1,
    )
    for update in updates:
        keep = update.trajectory.finished.tolist()
        assert 0 < sum(keep) < 8
        expected, _ = slow_grpo(
            models["llama"],
            update,
            updates[0].before,
            range(8),
            VARIANTS["dr_grpo"] | {"mean": mean},
            keep=keep,
        )
        close(update.gradient, expected)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("reinforce", {"baseline": "reinforce++"}),
        ("reinforce", {"kl": KLSettings(estimator="k2")}),
        *(("grpo", {"variant": v, "off_policy_mask": 0.1}) for v in VARIANTS),
    ],
)
def test_a_batch_in_which_all_were_cut_is_survived(probe, models, method, changes):
    def cut(t):
        return dataclasses.replace(t, finished=torch.zeros_like(t.finished))

    run, updates = probe(
        method,
        sampler=cut,
        long=LongSettings(mask_truncated=True, correction="sequence_mis"),
        **changes,
    )
    assert (
        len(updates) == 2
        and all((u.gradient == 0).all() for u in updates)
        and run.metrics["grad_norm"] == 0
    )


CORRECTED = {
    "tis": lambda ws, cap, floor: [min(w, cap) for w in ws],
    "icepop": lambda ws, cap, floor: [w if floor <= w <= cap else 0.0 for w in ws],
    "sequence_tis": lambda ws, cap, floor: [min(math.prod(ws), cap)] * len(ws),
    "sequence_mis": lambda ws, cap, floor: (
        [math.prod(ws) if math.prod(ws) <= cap else 0.0] * len(ws)
    ),
}


@pytest.mark.parametrize("how", CORRECTED)
def test_a_sampler_with_other_probabilities_is_corrected(probe, models, how):
    """The sampler is made to report other log-probabilities than those it sampled from; the
    trainer's own are as they were.
    """

    def shift(t):
        return dataclasses.replace(
            t,
            logprobs=t.logprobs
            + torch.randn(t.ids.shape, generator=torch.Generator().manual_seed(3)) * 0.5 * t.mask,
        )

    run, updates = probe(
        "reinforce",
        baseline="rloo",
        beta=0.2,
        sampler=shift,
        long=LongSettings(correction=how, cap=1.4, floor=0.7),
    )
    for update in updates:
        t, now, weights = update.trajectory, Slow(models["llama"], update.before), []
        for i in range(8):
            told = t.logprobs[i, t.prompt_lengths[i] : t.lengths[i]].tolist()
            weights.append(
                CORRECTED[how](
                    [math.exp(n.item() - s) for n, s in zip(now.logprobs(t, i), told, strict=True)],
                    1.4,
                    0.7,
                )
            )
        expected, _ = slow_reinforce(models["llama"], update, "rloo", beta=0.2, weights=weights)
        close(update.gradient, expected)
    flat = [w for row in weights for w in row]
    assert run.metrics["correction/mean"] == pytest.approx(sum(flat) / len(flat), rel=1e-4)
    assert run.metrics["correction/effective"] == pytest.approx(
        sum(flat) ** 2 / sum(w * w for w in flat) / len(flat), rel=1e-4
    )
    assert run.metrics["correction/dropped"] == pytest.approx(sum(w == 0 for w in flat) / len(flat))
    assert max(flat) > 1 and run.metrics["sampler_gap"] > 0.5


# Rewards of single steps
# ------------------------------------------------------------


class Steps:
    """A reward that is earned step by step: a tenth of its id for each token with an even id,
    weighted, and the rest of the text's score at the end.
    """

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def score(self, batch):
        scored, t = self.real.score(batch), batch.trajectory
        earned = torch.where(t.mask & (t.ids % 2 == 0), t.ids / 10, torch.tensor(math.nan))
        return dataclasses.replace(
            scored,
            steps=torch.where(t.mask, earned.nan_to_num(0.0), torch.tensor(math.nan)).double(),
        )  # padding holds rubbish


def earned_by(ids):
    return [x / 10 if x % 2 == 0 else 0.0 for x in ids]


@pytest.fixture
def stepwise(monkeypatch):
    monkeypatch.setattr(setup, "load_rewards", lambda *a, **k: Steps(load_rewards(*a, **k)))


@pytest.mark.parametrize(
    ("baseline", "credit"),
    [
        ("none", "reward_to_go"),
        ("none", "sequence_return"),
        ("rloo", "reward_to_go"),
        ("reinforce++", None),
    ],
)
def test_a_token_is_credited_with_what_is_earned_from_it_on(
    probe, models, stepwise, baseline, credit
):
    _, updates = probe("reinforce", baseline=baseline, credit=credit, beta=0.2)
    for update in updates:
        steps = [earned_by(response(update.trajectory, i)) for i in range(8)]
        expected, _ = slow_reinforce(
            models["llama"], update, baseline, beta=0.2, steps=steps, credit=credit
        )
        close(update.gradient, expected)


def test_a_whole_response_is_credited_with_its_score_whatever_its_steps(
    probe, stepwise, monkeypatch
):
    _, with_steps = probe("grpo", variant="dr_grpo", steps=1)
    monkeypatch.setattr(setup, "load_rewards", load_rewards)
    _, without = probe("grpo", variant="dr_grpo", steps=1)
    close(with_steps[0].gradient, without[0].gradient, 1e-5)


@pytest.mark.parametrize("normalise", ["none", "first"])
def test_in_ppo_steps_and_end_add_up_to_the_score_less_beta_times_the_kl(
    probe, models, stepwise, monkeypatch, normalise
):
    seen, shape = [], ppo_page.shape
    monkeypatch.setattr(
        ppo_page, "shape", lambda *a, **k: seen.append((a, shape(*a, **k))) or seen[-1][1]
    )
    run, _ = probe(
        "ppo", beta=0.3, epochs=1, score=ScoreSettings(normalise=normalise, missing_eos_penalty=0.5)
    )
    first = run.state.scale or ScoreScale(0.0, 1.0)
    assert (run.state.scale is None) == (normalise == "none")
    for (t, scored, old, *_), (rewards, *_) in seen:
        for i in range(8):
            where = slice(int(t.prompt_lengths[i]), int(t.lengths[i]))
            kl = (old.logprobs - old.ref_logprobs)[i, where].tolist()
            total = (scored.scores[i] - first.mean) / first.std - 0.5 * (not t.finished[i])
            assert float(rewards[i].sum()) == pytest.approx(total - 0.3 * sum(kl), abs=1e-4)
            steps = [
                e / first.std - 0.3 * nats
                for e, nats in zip(earned_by(response(t, i)), kl, strict=True)
            ]
            assert rewards[i, where].tolist()[:-1] == pytest.approx(steps[:-1], abs=1e-4)
            assert (rewards[i, : where.start] == 0).all() and (rewards[i, where.stop :] == 0).all()


def test_scored_responses_are_taken_and_joined_with_their_steps():
    one = Scored([1.0, 2.0], {"a": [1.0, 2.0]}, torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    two = Scored([3.0], {"a": [3.0]}, torch.tensor([[0.0, 1.0, 2.0]]))
    both = Scored.join([one, two]).take([2, 0])
    assert both.scores == [3.0, 1.0] == both.parts["a"] and both.steps.tolist() == [
        [0.0, 1.0, 2.0],
        [0.0, 1.0, 0.0],
    ]
    assert Scored.join([Scored([1.0], {}), Scored([2.0], {})]).steps is None


def test_trajectories_are_joined_at_the_width_of_the_widest():
    one = Trajectory.build([[5, 6]], [[7, 2]], [[-1.0, -2.0]], [True], [3], [0], 0.7)
    two = Trajectory.build(
        [[5], [9, 9, 9]], [[8], [4, 4]], [[-3.0], [-4.0, -5.0]], [False, False], [1, 4], [5, 6], 0.7
    )
    both = Trajectory.join([one, two])
    again = Trajectory.build(
        [[5, 6], [5], [9, 9, 9]],
        [[7, 2], [8], [4, 4]],
        [[-1.0, -2.0], [-3.0], [-4.0, -5.0]],
        [True, False, False],
        [3, 1, 4],
        [0, 5, 6],
        0.7,
    )
    for field in dataclasses.fields(Trajectory):
        assert (getattr(both, field.name) == getattr(again, field.name)) is True or torch.equal(
            getattr(both, field.name), getattr(again, field.name)
        )
    assert both.take([2, 0]).responses(ending=True) == [[4, 4], [7, 2]]


# Prompts and their columns
# ------------------------------------------------------------


@pytest.mark.parametrize("method", ["reinforce", "grpo"])
def test_chats_and_columns_reach_the_reward_in_the_order_of_the_groups(probe, tmp_path, method):
    rows = [{"prompt": [{"role": "user", "content": p}], "answer": f"{p}!"} for p in PROMPTS]
    (tmp_path / "chat.py").write_text(
        "calls = []\ndef score(prompts, completions, answer):\n    calls.append(len(prompts))\n"
        "    for p, c, a in zip(prompts, completions, answer, strict=True):\n        assert "
        "p[-1]['role'] == 'user' and p[-1]['content'] + '!' == a, (p, a)\n"
        "        assert list(c[0]) == ['role', 'content'] and c[0]['role'] == 'assistant'\n"
        "    if len(prompts) > 2:\n        assert all(len({a for a in answer[g:g + 4]}) == 1 for g "
        "in range(0, len(answer), 4)), answer\n"
        "        assert len(set(answer)) > 1\n    return [c[0]['content'].count('e') + 0.0 for c "
        "in completions]\n"
    )
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    run, updates = probe(
        method,
        kind="qwen3",
        data=path,
        reward=(f"{tmp_path}/chat.py:score",),
        stop=(),
        **({"resample": 3} if method == "grpo" else {}),
    )
    renderer = load_renderer(str(run.path / "model"), RowSettings())
    t = updates[0].trajectory
    for i in range(8):  # the prompt of each row, rendered by the template
        expected = renderer.tokenizer.apply_chat_template(
            rows[int(t.prompt[i])]["prompt"],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        assert t.ids[i, : t.prompt_lengths[i]].tolist() == list(expected)


def test_the_page_shows_samples_that_end_where_the_trained_ones_do(probe):
    run, _ = probe("reinforce", run=RunSettings(samples=6))
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and sum(row["finished"] for row in rows) > 2
    assert not any(
        letter in row["completion"] for row in rows for letter in "dfg"
    )  # each is a token of its own, and ends a response


# Settings
# ------------------------------------------------------------

PARTS = ("advantage", "loss", "loss_aggregation", "clip", "clip_high", "cap", "beta", "resample")
NAMED = {"model": "m", "data": "d"}


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("grpo", ("grpo", "ppo_clip", "sequence_mean", 0.2, None, 5.0, 0.04, 0)),
        ("dr_grpo", ("dr_grpo", "ppo_clip", "constant", 0.2, None, 5.0, 0.0, 0)),
        ("dapo", ("grpo", "ppo_clip", "token_mean", 0.2, 0.28, 5.0, 0.0, 8)),
        ("gspo", ("grpo", "gspo", "sequence_mean", 3e-4, 4e-4, 5.0, 0.0, 0)),
        ("cispo", ("grpo", "cispo", "token_mean", 0.2, None, 5.0, 0.0, 0)),
    ],
)
def test_a_variant_fills_what_is_not_given_and_flags_win(tmp_path, variant, expected):
    settings = parse(fd.GRPO, ["--model", "m", "--data", "d", "--variant", variant], command="grpo")
    assert tuple(getattr(settings, p) for p in PARTS) == expected
    stored = yaml.safe_load(dump_yaml(settings, "grpo"))
    assert tuple(stored[p] for p in PARTS) == expected  # what was run is written down
    flags = [
        "--beta",
        "0.5",
        "--loss-aggregation",
        "constant",
        "--resample",
        "0",
        "--clip-high",
        "0.9",
    ]
    changed = parse(
        fd.GRPO, ["--model", "m", "--data", "d", "--variant", variant, *flags], command="grpo"
    )
    assert (
        changed.beta,
        changed.loss_aggregation,
        changed.resample,
        changed.clip_high,
        changed.loss,
    ) == (
        0.5,
        "constant",
        0,
        0.9,
        expected[1],
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(changed, "grpo"))
    again = parse(fd.GRPO, ["--out", str(tmp_path), "--resume"], command="grpo")
    assert again.model_dump(exclude={"out", "resume"}) == changed.model_dump(
        exclude={"out", "resume"}
    )
    (tmp_path / "own.yaml").write_text("model: m\ndata: d\nvariant: dapo\nclip: 0.1\n")
    both = parse(
        fd.GRPO, ["--config", str(tmp_path / "own.yaml"), "--variant", variant], command="grpo"
    )
    assert (both.variant, both.clip, both.loss, both.resample) == (
        variant,
        0.1,
        expected[1],
        expected[-1],
    )


@pytest.mark.parametrize(
    ("variant", "kl", "expected"),
    [
        ("grpo", {}, "forward_k3"),
        ("grpo", {"placement": "reward"}, "k1"),
        ("grpo", {"estimator": "k2"}, "k2"),
        ("dapo", {}, "k1"),
        ("dapo", {"placement": "loss"}, "k2"),
        ("dr_grpo", {"estimator": "forward_k3"}, "forward_k3"),
    ],
)
def test_the_penalty_that_is_not_named_is_the_right_one_or_the_papers(variant, kl, expected):
    assert fd.GRPO(**NAMED, variant=variant, kl=KLSettings(**kl)).parts.penalty == expected


COMMAND = ("--model", "m", "--data", "d", "--reward", "r.py:f")


@pytest.mark.parametrize(
    ("verb", "flags", "said"),
    [
        (
            "reinforce",
            ["--group-size", "1"],
            "--group-size 1 with --baseline rloo: a single response has no others",
        ),
        (
            "reinforce",
            ["--batch-size", "10"],
            "--batch-size 10 is not a multiple of --group-size 4",
        ),
        ("grpo", ["--batch-size", "12"], "--batch-size 12 is not a multiple of --group-size 8"),
        ("grpo", ["--group-size", "1"], "--group-size: input should be greater than 1"),
        (
            "grpo",
            ["--variant", "grop"],
            "--variant: input should be 'grpo', 'dr_grpo', 'dapo', 'gspo' or 'cispo', not grop",
        ),
        (
            "reinforce",
            ["--baseline", "critic"],
            "or 'reinforce++', not critic",
        ),
        ("reinforce", ["--steps", "many"], "--steps: input should be a whole number, not many"),
        *(
            (
                verb,
                ["--kl.placement", "loss", "--kl.estimator", "k1"],
                "k1 as a loss has an expected gradient of zero",
            )
            for verb in ("reinforce", "grpo", "ppo")
        ),
        ("reinforce", ["--kl.estimator", "k3"], "ask for it by its name, forward_k3"),
        (
            "ppo",
            ["--kl.placement", "reward", "--kl.estimator", "k3"],
            "k3 in the reward has the gradient of",
        ),
        (
            "grpo",
            ["--kl.placement", "reward", "--kl.estimator", "forward_k3"],
            "forward_k3 is differentiated",
        ),
        ("reinforce", ["--beta", "0", "--kl.target", "6"], "--kl.target 6 with a beta of 0"),
        ("ppo", ["--beta", "0", "--kl.target", "6"], "--kl.target 6 with a beta of 0"),
        ("grpo", ["--variant", "dapo", "--kl.target", "6"], "--kl.target 6 with a beta of 0"),
        *(
            (
                verb,
                ["--batch-size", "8", "--minibatches", "1000"],
                "--minibatches 1000 of a --batch-size of 8: every minibatch needs a response",
            )
            for verb in ("ppo", "grpo")
        ),
        (
            "grpo",
            ["--max-new-tokens", "8", "--score.length-buffer", "9"],
            "--score.length-buffer 9 with --max-new-tokens 8",
        ),
        (
            "ppo",
            ["--max-new-tokens", "8", "--score.length-buffer", "9"],
            "--score.length-buffer 9 with --max-new-tokens 8",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence_and_exit_code_2(capsys, verb, flags, said):
    assert main([verb, *COMMAND, *flags]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1 and "Traceback" not in err


def test_a_flag_may_mend_what_does_not_fit_in_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nbatch_size: 6\n")
    settings = parse(
        fd.Reinforce,
        ["--config", str(tmp_path / "run.yaml"), "--group-size", "3"],
        command="reinforce",
    )
    assert (settings.batch_size, settings.group_size) == (6, 3)
    with pytest.raises(InputError, match="not a multiple"):
        parse(fd.Reinforce, ["--config", str(tmp_path / "run.yaml")], command="reinforce")


def test_the_command_says_which_parts_are_not_the_variants(probe, capsys):
    probe("grpo", variant="gspo", beta=0.2, epochs=1, steps=1)
    assert (
        "grpo (gspo, beta 0.2): 10 prompts, 1 iterations of 8 responses" in capsys.readouterr().err
    )


def test_grpo_with_adapters_starts_at_ratio_one(probe):
    run, _ = probe("grpo", lora=LoraSettings(r=2), steps=1, epochs=2)
    assert run.metrics["ratio/first"] == pytest.approx(1, abs=1e-5) and run.metrics[
        "objective/kl"
    ] == pytest.approx(0, abs=1e-5)


def test_settings_are_built_from_plain_values():
    settings = build(fd.GRPO, {**NAMED, "variant": "cispo", "kl": {"estimator": "k2"}})
    assert (settings.parts.loss, settings.parts.penalty, settings.parts.cap) == ("cispo", "k2", 5.0)


# PPO: what each optimizer step is made of
# ------------------------------------------------------------


def lines_of(run):
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "num_tokens" in row]


def test_a_minibatch_of_ppo_has_the_clipped_gradient_of_its_own_tokens(probe, models):
    """With a critic that says 0, no KL and lambda 1, the advantage of every token is the score."""
    changes = {"beta": 0.0, "whiten": False, "lam": 1.0, "clip": 0.05, "learning_rate": 2e-2}
    parts = {"critic": CriticSettings(start="policy"), "epochs": 2, "minibatches": 3, "steps": 1}
    run, updates = probe("ppo", **changes, **parts)
    assert len(updates) == 6 and run.metrics["epochs_done"] == 2
    old, cut, seen = Slow(models["llama"]), 0, []
    for number, update in enumerate(updates):
        t, now = update.trajectory, Slow(models["llama"], update.before)
        rows = Batches.cut(8, 3, 0)[number]
        seen.append(len(rows))
        terms = []
        for i in rows:
            text = now.text(response(t, i))
            score = by_letters(text)
            with torch.no_grad():
                before = old.logprobs(t, i)
            for new, was in zip(now.logprobs(t, i), before, strict=True):
                ratio = torch.exp(new - was)
                clipped = ratio.clamp(0.95, 1.05)
                terms.append(-torch.minimum(ratio * score, clipped * score))
                cut += bool(clipped * score < ratio * score)
        close(update.gradient, now.gradient(sum(terms) / len(terms)), 2e-4)
    assert sorted(seen) == [2, 2, 3, 3, 3, 3] and cut > 0
    assert (
        len({int(u.trajectory.mask[Batches.cut(8, 3, 0)[k]].sum()) for k, u in enumerate(updates)})
        > 1
    )


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_rate_falls_over_the_optimizer_steps_that_are_made(probe, monkeypatch, method):
    """Five minibatches of 8 responses: sizes 1 and 2, two epochs, two iterations."""
    rates, step = [], Stepper.step
    monkeypatch.setattr(
        Stepper,
        "step",
        lambda self, n: (
            rates.append(step(self, n)["learning_rate"])
            or {"grad_norm": 0.0, "learning_rate": rates[-1]}
        ),
    )
    optimizer = OptimizerSettings(schedule="linear")
    changes = {"critic": CriticSettings(start="shared")} if method == "ppo" else {}
    _, updates = probe(method, minibatches=5, epochs=2, optimizer=optimizer, **changes)
    assert len(updates) == 20
    assert rates == pytest.approx([1e-2 * (1 - k / 20) for k in range(20)])


def test_a_gradient_that_target_kl_threw_away_is_not_in_the_next_step(probe):
    """The second epoch stops before its step, so the run is that of one epoch."""
    common = {"critic": CriticSettings(start="shared"), "beta": 0.0, "learning_rate": 3e-2}
    _, plain = probe("ppo", epochs=1, **common)
    run, stopped = probe("ppo", epochs=2, target_kl=1e-9, **common)
    assert [line["epochs_done"] for line in lines_of(run)] == [1, 1]
    assert len(plain) == len(stopped) == 2
    for one, two in zip(plain, stopped, strict=True):
        close(two.gradient, one.gradient, 1e-5)


# A reference that nothing reads
# ------------------------------------------------------------


@pytest.mark.parametrize("method", ["ppo", "reinforce", "grpo"])
def test_without_a_penalty_there_is_no_reference_unless_the_kl_is_asked_for(
    probe, monkeypatch, capsys, method
):
    """Its weights are not loaded and it is not run; the run is otherwise the same."""
    loaded, frozen = [], load.load_frozen
    monkeypatch.setattr(load, "load_frozen", lambda *a, **k: loaded.append(a) or frozen(*a, **k))
    without, first = probe(method, beta=0.0, steps=1)
    assert loaded == [] and "no reference is loaded" in capsys.readouterr().err
    assert not {"kl", "objective/kl"} & without.metrics.keys()
    measured, second = probe(method, beta=0.0, kl=KLSettings(estimator="k2"))
    assert len(loaded) == 1 and "no reference" not in capsys.readouterr().err
    assert [line["objective/kl"] > 1e-3 for line in lines_of(measured)] == [False, True]
    assert torch.equal(first[0].gradient, second[0].gradient)
    assert (without.path / "report.html").is_file()


SPREAD = """
def score(completions, number, **columns):
    return [1.0 if n % 5 < 2 else float(i) for i, n in enumerate(number)]
"""


@pytest.mark.parametrize("method", ["reinforce", "grpo"])
def test_groups_whose_scores_are_equal_are_counted(probe, tmp_path, method):
    (tmp_path / "spread.py").write_text(SPREAD)
    # all ten prompts: four of them have one score whatever is answered
    run, _ = probe(
        method,
        steps=1,
        batch_size=20,
        group_size=2,
        reward=(f"{tmp_path}/spread.py:score",),
    )
    assert run.metrics["groups/no_spread"] == pytest.approx(0.4)
