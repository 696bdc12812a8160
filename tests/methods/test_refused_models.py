"""Each method refuses, before it trains, a model that is incomplete or that it does not compute as
plain transformers does; and each says what it compared.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fiducial as fd
from fiducial.errors import InputError
from fiducial.models.roles import Policy, ScoreModel
from fiducial.models.trunk import logits
from fiducial.rollout import local
from fiducial.settings import LoraSettings, RowSettings, RunSettings
from fiducial.train.renderer import load_renderer
from support import BAD, GOOD, PROMPTS, write_jsonl

ONLINE = ("ppo", "reinforce", "grpo", "distill")
SCORERS = ("reward", "prm")
METHODS = ("sft", "dpo", *SCORERS, *ONLINE)
ROLES = [(method, "--model") for method in METHODS] + [("distill", "--teacher")]
REWARD = "def score(completions, **columns):\n    return [float(len(c)) for c in completions]\n"


@pytest.fixture(scope="module")
def go(models, data, tmp_path_factory):
    """go("dpo", model=...): one step in a folder of its own."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "reward.py").write_text(REWARD)
    solutions = [
        {"prompt": p, "completion": text, "label": text in GOOD}
        for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)
        for text in (g, b)
    ]
    labeled = write_jsonl(folder / "solutions.jsonl", solutions)
    online = {"data": data["prompts"], "max_new_tokens": 6}
    rewarded = online | {"reward": (f"{folder / 'reward.py'}:score",)}
    kinds = {
        "sft": (fd.SFT, {"data": data["completions"], "max_new_tokens": 4}),
        "dpo": (fd.DPO, {"data": data["pairs"], "max_new_tokens": 4}),
        "reward": (fd.RewardModel, {"data": data["pairs"]}),
        "prm": (fd.PRM, {"data": labeled}),
        "ppo": (fd.PPO, rewarded),
        "reinforce": (fd.Reinforce, rewarded | {"group_size": 2}),
        "grpo": (fd.GRPO, rewarded | {"group_size": 2}),
        "distill": (fd.Distill, online | {"teacher": models["llama"]}),
    }

    def run(method, **changes):
        cls, own = kinds[method]
        common = {
            "model": models["llama"],
            "out": str(tmp_path_factory.mktemp(method) / "run"),
            "steps": 1,
            "batch_size": 4,
            "run": RunSettings(samples=1),
            "rows": RowSettings(held_out=0.0),
        }
        return getattr(fd, method)(cls(**(common | own | changes)))

    return run


@pytest.fixture(scope="module")
def incomplete(models, tmp_path_factory):
    """A folder in which one tensor is missing, and one in which all have other names."""

    def spoil(change):
        folder = Path(shutil.copytree(models["llama"], tmp_path_factory.mktemp("spoilt") / "m"))
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        return str(folder)

    lost = "model.layers.1.mlp.down_proj.weight"
    return {
        "deleted": spoil(lambda t: {n: w for n, w in t.items() if n != lost}),
        "renamed": spoil(lambda t: {f"x.{n}": w for n, w in t.items()}),
    }


@pytest.mark.parametrize("how", ["deleted", "renamed"])
@pytest.mark.parametrize(("method", "flag"), ROLES)
def test_no_weight_is_filled_in_at_random(go, incomplete, method, flag, how):
    name = {"--model": "model", "--teacher": "teacher"}[flag]
    with pytest.raises(InputError, match=rf"{flag}: .* lacks \d+ of the weights of Llama\w+: \w+"):
        go(method, **{name: incomplete[how]})


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_computed_otherwise_is_refused(go, monkeypatch, method):
    whose, part = (ScoreModel, "_score") if method in SCORERS else (Policy, "_head")
    known = getattr(whose, part)
    monkeypatch.setattr(whose, part, lambda self, hidden: known(self, hidden) * 1.1)
    with pytest.raises(InputError, match=r"than in plain transformers: they differ by up to"):
        go(method)


@pytest.mark.parametrize("method", ONLINE)
def test_a_sampler_that_draws_from_another_policy_is_not_used(go, monkeypatch, method):
    def colder(*given):
        return logits(*given) * 1.1

    monkeypatch.setattr(local, "logits", colder)  # the fast loop alone is wrong
    run = go(method)
    samples = [json.loads(x) for x in (run.path / "samples.jsonl").read_text().splitlines()]
    assert samples
    monkeypatch.setattr("fiducial.rollout.generated.choose", lambda z, *more: draw(z * 1.1, *more))
    from fiducial.rollout.draw import choose as draw

    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be sampled from: in our loop"):
        go(method)


@pytest.mark.parametrize("method", ["sft", "reward", "grpo"])
def test_a_run_says_what_was_compared(go, models, data, capsys, method):
    go(method)
    said = "scores" if method == "reward" else "log-probabilities"
    printed = " ".join(capsys.readouterr().err.split())
    assert f"checked: {said} equal plain transformers' to " in printed
    assert torch.is_grad_enabled()
    if method == "grpo":  # as long as the longest prompt with a whole response
        renderer = load_renderer(models["llama"], RowSettings())
        longest = max(len(renderer.prompt(p, "")) for p in PROMPTS) + 6
        assert f"(rows of {longest} and " in printed


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_reward_model_that_is_computed_otherwise_is_refused(go, monkeypatch, method):
    reward = str(go("reward").path / "model")
    known = ScoreModel._score
    monkeypatch.setattr(ScoreModel, "_score", lambda self, hidden: known(self, hidden) + 0.1)
    with pytest.raises(InputError, match=r"--reward: .* gives other scores here than in plain"):
        go(method, reward=(reward,))


@pytest.fixture(scope="module")
def sharp(models, tmp_path_factory):
    """A model of large logits, which bfloat16 rounds by about a nat, as it does a real model's."""
    folder = Path(shutil.copytree(models["llama"], tmp_path_factory.mktemp("sharp") / "m"))
    path = folder / "model.safetensors"
    tensors = {n: w * 10 if n == "lm_head.weight" else w for n, w in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_bfloat16_rounds_by_a_nat_is_trained_and_saved_as_it_is(
    go, sharp, capsys, method, rank
):
    found = []
    for precision in ("float32", "bfloat16"):
        changes = {"teacher": sharp} if method == "distill" else {}
        run = go(
            method,
            model=sharp,
            lora=LoraSettings(r=rank),
            run=RunSettings(samples=1, precision=precision),
            **changes,
        )
        assert (run.path / "model").is_dir()
        found.append(json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0]))
    said = " ".join(capsys.readouterr().err.split())
    assert "checked: " in said and "slower" not in said and "anew" not in said
    assert found[0]["grad_norm"] != found[1]["grad_norm"]  # it was computed in bfloat16
    gaps = re.findall(r"equal plain transformers' to (\S+)", said)
    assert len(gaps) == 2
