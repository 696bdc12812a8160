"""What was sampled keeps its ids through the file: it is trained on as it was sampled."""

import json

import pytest

from fiducial.methods import dpo, prm, reward_model, sft
from fiducial.methods.settings.dpo import DPO
from fiducial.methods.settings.prm import PRM
from fiducial.methods.settings.reward_model import RewardModel
from fiducial.methods.settings.sft import SFT
from fiducial.settings import RowSettings
from fiducial.train.processes import Processes
from fiducial.train.renderer import load_renderer
from fiducial.use.collect import Collect, collect
from fiducial.use.generate import generate
from fiducial.use.label_steps import label_steps
from fiducial.use.settings import Generate, LabelSteps
from support import write_jsonl

JUDGE = """
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]
"""
ALL = RowSettings(held_out=0)


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """What the three verbs write, of one model."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "judge.py").write_text(JUDGE)
    prompts = write_jsonl(folder / "p.jsonl", [{"prompt": p} for p in ("the cat", "a", "on")])
    common = {"model": models["llama"], "prompts": prompts, "max_new_tokens": 8}
    judge = f"{folder}/judge.py:length"
    collect(Collect(**common, judge=judge, out=str(folder / "pairs.jsonl"), samples=4))
    generate(Generate(**common, samples=4, out=str(folder / "answers.jsonl")))
    how = {"separator": "e", "completions": 1, "samples": 4, "threshold": 3}
    label_steps(LabelSteps(**common, **how, judge=judge, out=str(folder / "steps.jsonl")))
    return {n: str(folder / f"{n}.jsonl") for n in ("pairs", "answers", "steps")}


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encoded_anew(renderer, prompt, text):
    return renderer.completion(prompt, text, "f:1").ids


def test_pairs_are_trained_on_with_the_tokens_that_were_sampled(models, files):
    settings = {"model": models["llama"], "data": files["pairs"], "rows": ALL}
    pairs = dpo.prepare(DPO(**settings), Processes())
    rankings = reward_model.prepare(RewardModel(**settings), Processes()).train.items
    renderer, rows = load_renderer(models["llama"], ALL), lines(files["pairs"])
    scored = {tuple(r.ids) for ranking in rankings for r in ranking.responses}
    unlike = 0
    for pair, row in zip(pairs.train.items, rows, strict=True):
        prompt = renderer.prompt(row["prompt"], "")
        for side, ids, text in (
            (pair.chosen, row["chosen_ids"], row["chosen"]),
            (pair.rejected, row["rejected_ids"], row["rejected"]),
        ):
            assert side.ids == prompt + ids and side.num_labels == len(ids)
            assert (ids[-1] == renderer.eos) == (len(ids) < 8 or ids[-1] == 2)
            assert tuple(side.ids) in scored
            unlike += side.ids != encoded_anew(renderer, row["prompt"], text)
    assert unlike > 0  # some would have other ids, or an end that was never sampled
    assert f"{len(rows)} of {len(rows)} rows (100.0%) are trained on the very" in pairs.note


def test_answers_and_steps_are_trained_on_with_the_tokens_that_were_sampled(models, files):
    renderer = load_renderer(models["llama"], ALL)
    answers = sft.prepare(
        SFT(model=models["llama"], data=files["answers"], rows=RowSettings(on_error="skip")),
        Processes(),
    )
    given = {
        (*renderer.prompt(r["prompt"], ""), *r["completion_ids"]) for r in lines(files["answers"])
    }
    for item in answers.train.items:
        assert tuple(item.ids) in given
    settings = PRM(model=models["llama"], data=files["steps"], separator="e", rows=ALL)
    solutions, rows = prm.prepare(settings, Processes()).train.items, lines(files["steps"])
    for solution, row in zip(solutions, rows, strict=True):
        prompt = renderer.prompt(row["prompt"], "")
        assert solution.rendered.ids == prompt + row["completion_ids"]
        assert len(solution.ends) == len(row["completions"])


def test_ids_of_another_tokenizer_are_not_used_and_this_is_said(models, files):
    settings = DPO(model=models["gpt2"], data=files["pairs"], rows=ALL)
    ready = dpo.prepare(settings, Processes())
    count = len(lines(files["pairs"]))
    assert f"{count} of {count} rows (100.0%) hold token ids of another tokenizer" in ready.note
    for pair, row in zip(ready.train.items, lines(files["pairs"]), strict=True):
        assert pair.chosen.ids == encoded_anew(ready.renderer, row["prompt"], row["chosen"])
