"""The first optimizer step of the methods that learn from rows, against plain transformers: one row
at a time, divided by what the step has. Batches are smaller than asked for: 9 rows in batches of 4
are three batches of 3.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import fiducial as fd
from fiducial.core import intervals
from fiducial.data.batches import Batches
from fiducial.methods import dpo as dpo_page
from fiducial.models.load import load_scorer
from fiducial.settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings
from fiducial.train import reference_cache
from fiducial.train.renderer import load_renderer
from fiducial.train.step import Stepper
from support import BAD, GOOD, PROMPTS, write_jsonl

ROWS = 9
FREE = OptimizerSettings(schedule="constant", max_grad_norm=1e9)


@pytest.fixture
def first_step(models, tmp_path, monkeypatch):
    """first_step("dpo", ...): the gradients of a run's first step by name, and the run."""
    triples = list(zip(PROMPTS, GOOD, BAD, strict=True))[:ROWS]
    rows = {
        "completions": ({"prompt": p, "completion": g} for p, g, _ in triples),
        "pairs": ({"prompt": p, "chosen": g, "rejected": b} for p, g, b in triples),
    }
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", found) for name, found in rows.items()}

    def run(method, **changes):
        gradients, step = [], Stepper.step

        def spy(self, number):
            gradients.append({n: p.grad.clone() for n, p in self.module.named_parameters()})
            return step(self, number)

        cls, data = {
            "sft": (fd.SFT, "completions"),
            "dpo": (fd.DPO, "pairs"),
            "reward": (fd.RewardModel, "pairs"),
        }[method]
        common = {
            "model": models["llama"],
            "data": files[data],
            "out": str(tmp_path / "run"),
            "steps": 1,
            "batch_size": 4,
            "optimizer": FREE,
            "rows": RowSettings(held_out=0.0),
            "run": RunSettings(samples=0),
        }
        with monkeypatch.context() as patch:
            patch.setattr(Stepper, "step", spy)
            done = getattr(fd, method)(cls(**(common | changes)))
        return gradients[0], done

    return run


def rows_of_the_first_step():
    rows = Batches(ROWS, 4, 0)[0]
    assert len(rows) == 3
    return rows


def close(found, loss, model, prefix):
    model.zero_grad()
    loss.backward()
    slow = {prefix + n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == slow.keys()
    whole = torch.cat([g.flatten() for g in slow.values()]).norm()
    assert whole > 1e-3
    for name, gradient in slow.items():
        assert (found[name] - gradient).norm() < 1e-5 * whole, name


class Slow:
    """A plain model, asked for one response at a time."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.renderer = load_renderer(folder, RowSettings())

    def logprob(self, prompt, response):
        """The summed log-probability of the response and its end, and the number of its tokens."""
        row = self.renderer.completion(prompt, response, "")
        logp = self.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        at = [k for k, label in enumerate(row.mask) if label]
        return sum(logp[k - 1, row.ids[k]] for k in at), len(at)


def test_a_step_of_sft_is_divided_by_its_tokens(first_step, models):
    found, _ = first_step("sft")
    slow = Slow(models["llama"])
    each = [slow.logprob(PROMPTS[i], GOOD[i]) for i in rows_of_the_first_step()]
    close(found, -sum(x for x, _ in each) / sum(n for _, n in each), slow.model, "lm.")


def test_a_step_of_dpo_is_divided_by_its_pairs(first_step, models):
    """Before the first step every margin is 0, where the slope of -log sigmoid is -1/2."""
    found, _ = first_step("dpo", beta=0.3)
    slow, rows = Slow(models["llama"]), rows_of_the_first_step()
    margins = [
        slow.logprob(PROMPTS[i], GOOD[i])[0] - slow.logprob(PROMPTS[i], BAD[i])[0] for i in rows
    ]
    close(found, -0.3 / 2 * sum(margins) / len(rows), slow.model, "lm.")


def test_a_step_of_a_reward_model_is_divided_by_its_pairs(first_step, models):
    found, _ = first_step("reward")
    model = load_scorer(models["llama"], LoraSettings(), RunSettings(), head="normal", seed=0)
    renderer, rows = load_renderer(models["llama"], RowSettings()), rows_of_the_first_step()

    def score(i, text):
        ids = torch.tensor([renderer.completion(PROMPTS[i], text, "").ids])
        return model.model(input_ids=ids).logits[0, 0]

    gaps = torch.stack([score(i, GOOD[i]) - score(i, BAD[i]) for i in rows])
    close(found, torch.log1p(torch.exp(-gaps)).sum() / len(rows), model, "")


# DPO: its warm-up and its reference
# ------------------------------------------------------------


def rates(run):
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [row["learning_rate"] for row in rows if "learning_rate" in row]


def test_a_short_run_of_dpo_reaches_its_rate(first_step, capsys):
    """The paper's 150 steps of warm-up would leave a run of 20 at a twelfth of it."""
    _, run = first_step("dpo", optimizer=fd.DPO(model="m", data="d").optimizer, steps=20)
    assert rates(run) == pytest.approx([5e-7] + [1e-6] * 19)
    assert "the learning rate rises over the first 2 of 20 steps" in capsys.readouterr().err


def test_the_reference_is_computed_for_the_pairs_of_the_run_alone(
    first_step, monkeypatch, tmp_path
):
    """One step of three pairs; with an evaluation also those that are held out."""
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / "cache"))
    asked, inner = [], reference_cache.cached
    monkeypatch.setattr(dpo_page, "cached", lambda *a: asked.append(inner(*a)) or asked[-1])
    first_step("dpo")
    assert len(asked[-1]) == 3
    shown = {"run": RunSettings(samples=2), "max_new_tokens": 3}
    _, run = first_step("dpo", out=str(tmp_path / "two"), rows=RowSettings(held_out=0.3), **shown)
    assert len(asked[-1]) == 3 + 3
    samples = map(json.loads, (run.path / "samples.jsonl").read_text().splitlines())
    assert [row["step"] for row in samples] == [0, 0, 1, 1]  # before training and after
    (found,) = run.evaluation.values()  # a share of three pairs, which are few
    right = round(3 * found["value"])
    assert found == intervals.wilson(right, 3) and found["value"] == right / 3
    assert found["value"] == run.metrics["eval/rewards/accuracies"]
