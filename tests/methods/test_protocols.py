"""A sampler and a scorer that know nothing but the protocols run PPO, GRPO and distillation."""

import json
from pathlib import Path

import pytest
import torch

import fiducial as fd
from fiducial.methods.settings.ppo import CriticSettings
from fiducial.models.load import load_policy
from fiducial.rewards.types import Scored
from fiducial.rollout.trajectory import Segment, Trajectory
from fiducial.settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings
from fiducial.train.renderer import load_renderer

GOOD, BAD, GIVEN, END = 20, 21, [22, 23], 2


class Scripted:
    """Answers good or bad by the number of the sample, with given tokens in the middle."""

    def __init__(self):
        self.synced, self.asked = [], []

    def sync(self, policy, version):
        self.synced.append(version)

    def sample(self, prompts, params, keys, *, on_progress=None):
        self.asked.append((params, keys))
        rows = []
        for prompt, i, k in zip(prompts, keys.prompt, keys.sample, strict=True):
            first = GOOD if (i + k) % 2 else BAD
            rows.append(
                [
                    Segment(list(prompt)),
                    Segment([first], [-1.0]),
                    Segment(GIVEN),
                    Segment([END], [-1.0]),
                ]
            )
        finished = [True] * len(rows)
        return Trajectory.from_segments(
            rows, finished, list(keys.prompt), list(keys.sample), params.temperature
        )


class Likes:
    """Scores 1 where the first token that the policy chose is the good one."""

    name = "likes"

    def __init__(self):
        self.checked = 0

    def check_rows(self, rows):
        self.checked += len(rows)

    def score(self, responses):
        t = responses.trajectory
        first = t.mask.int().argmax(1)
        scores = [float(t.ids[i, c] == GOOD) for i, c in enumerate(first)]
        return Scored(scores, {self.name: scores})


def settings(cls, models, data, out, **changes):
    common = {
        "model": models["llama"],
        "data": data["prompts"],
        "out": str(out),
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "max_new_tokens": 6,
        "optimizer": OptimizerSettings(schedule="constant"),
        "run": RunSettings(samples=2, eval_every=2),
    }
    return cls(**(common | changes))


def chance_of_good(model, data):
    """Mean probability of the good token as the first one after each prompt."""
    policy = load_policy(str(model), LoraSettings(), RunSettings())
    renderer = load_renderer(str(model), RowSettings())
    out = []
    for line in Path(data["prompts"]).read_text().splitlines():
        ids = renderer.prompt(json.loads(line)["prompt"], "")
        with torch.no_grad():
            logits = policy.lm(input_ids=torch.tensor([ids])).logits[0, -1]
        out.append(float(logits.softmax(-1)[GOOD]))
    return sum(out) / len(out)


@pytest.mark.parametrize("method", ["ppo", "grpo", "reinforce"])
def test_a_policy_learns_from_what_they_say(models, data, tmp_path, method):
    sampler, scorer = Scripted(), Likes()
    cls, extra = {
        "ppo": (fd.PPO, {"critic": CriticSettings(start="policy"), "beta": 0.0}),
        "grpo": (fd.GRPO, {"group_size": 2, "beta": 0.0}),
        "reinforce": (fd.Reinforce, {"group_size": 2, "beta": 0.0}),
    }[method]
    asked = settings(cls, models, data, tmp_path / "run", **extra)
    run = getattr(fd, method)(asked, sampler=sampler, rewards=scorer)

    assert scorer.checked == 10
    assert list(dict.fromkeys(sampler.synced)) == list(range(6))
    assert all(p.max_new_tokens == 6 and END in p.stop_ids for p, _ in sampler.asked)
    assert {k.seed for _, k in sampler.asked} == {0}
    assert run.metrics["completions/mean_length"] == 2.0  # given tokens are nobody's choice
    before, after = chance_of_good(models["llama"], data), chance_of_good(run.path / "model", data)
    assert after > 3 * before


def test_a_student_learns_on_what_the_sampler_says(models, make, data, tmp_path):
    sampler = Scripted()
    teacher = make("llama", initializer_range=0.2)
    asked = settings(fd.Distill, models, data, tmp_path / "run", teacher=teacher, eval_samples=6)
    run = fd.distill(asked, sampler=sampler)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    kl = [line["kl_teacher"] for line in lines if "kl_teacher" in line]
    assert len(kl) == 6 and kl[-1] < 0.7 * kl[0]
    assert set(sampler.synced) == set(range(7))  # the last one is the evaluation's
    assert run.metrics["completions/mean_length"] == 2.0
