"""The first optimizer step of the methods that learn from rows, against plain transformers: one row
at a time, divided by what the step has. Batches are smaller than asked for: 9 rows in batches of 4
are three batches of 3.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import fiducial as fd
from fiducial.core import intervals
from fiducial.data.batches import Batches
from fiducial.methods import dpo as dpo_page
from fiducial.models.load import load_policy, load_scorer
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
            named = self.module.named_parameters()
            gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
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


@pytest.mark.parametrize("lora", [LoraSettings(), LoraSettings(r=4)], ids=["full", "lora"])
def test_a_reference_that_reads_each_step_is_the_one_that_reads_first(
    first_step, models, tmp_path, monkeypatch, lora
):
    """The weights after six steps in two epochs, and what was recorded on the way."""

    def run(name, how):
        changes = {"lora": lora, "steps": 6, "learning_rate": 1e-2, "beta": 0.5}
        changes |= {"out": str(tmp_path / name), "reference_pass": how}
        changes |= {"rows": RowSettings(held_out=0.2), "run": RunSettings(samples=0, eval_every=3)}
        _, done = first_step("dpo", **changes)
        weights = {n: p.detach().clone() for n, p in done.model.named_parameters()}
        return weights, [
            json.loads(x) for x in (done.path / "metrics.jsonl").read_text().splitlines()
        ]

    first, records = run("first", "first")
    monkeypatch.setattr(dpo_page, "reference_logprobs", None)  # no pass over all of them
    after, later = run("after", "each_step")
    assert first.keys() == after.keys() and len(records) == len(later) == 8
    start = AutoModelForCausalLM.from_pretrained(models["llama"]).state_dict()
    moved = [(p - start[n.removeprefix("lm.")]).norm() for n, p in first.items() if lora.r == 0]
    assert all(m > 1e-3 for m in moved)  # a reference that moved along would show
    for name, weight in first.items():
        assert (weight - after[name]).abs().max() < 1e-5, name
    for a, b in zip(records, later, strict=True):
        for key in a.keys() - {"seconds", "tokens_per_second"}:
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
    assert abs(records[-1]["eval/rewards/margins"]) > 1e-2


def test_many_pairs_are_read_by_the_reference_at_each_step(models):
    def each(pairs, **changes):
        settings = fd.DPO(model=models["llama"], data="x", **changes)
        return settings.reads_reference_at_each_step(pairs)

    assert not each(20_000) and each(20_001) and each(1, reference_pass="each_step")
    assert not each(10**6, reference_pass="first")


def test_a_run_whose_reference_reads_each_step_goes_on_as_if_it_had_not_stopped(
    first_step, tmp_path
):
    common = {"steps": 6, "learning_rate": 1e-2, "reference_pass": "each_step"}
    common |= {"run": RunSettings(samples=0, checkpoint_every=2, keep_checkpoints=9)}
    _, whole = first_step("dpo", **common, out=str(tmp_path / "whole"))
    _, stopped = first_step("dpo", **common, out=str(tmp_path / "stopped"))
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(stopped.path / "checkpoints" / name, ignore_errors=True)
    shutil.rmtree(stopped.path / "model")
    _, again = first_step("dpo", **common, out=str(stopped.path), resume=True)
    for (name, one), other in zip(
        whole.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_fingerprint_of_rows_is_that_of_their_json(models, monkeypatch):
    policy = load_policy(models["llama"], LoraSettings(), RunSettings(), None)
    rows = [[[1, 2], [False, True]], [[3], [True]]]
    monkeypatch.setattr(reference_cache.hashlib, "sha256", lambda start=b"": Spelled([start]))
    for given in (rows, []):
        found = reference_cache.fingerprint(policy, iter(given))
        assert found.endswith(json.dumps(given, separators=(",", ":")).encode())


class Spelled(list):
    """A hash that is what it was given."""

    update = list.append

    def hexdigest(self):
        return b"".join(bytes(part) for part in self)
