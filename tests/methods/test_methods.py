"""The methods end to end on tiny models: what they save, what must not change their result, and
that each of them learns.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fiducial as fd
from fiducial.core import kl as kl_module
from fiducial.data.batches import stream
from fiducial.data.row_types import PromptRow
from fiducial.errors import InputError, RunError
from fiducial.methods.settings.ppo import CriticSettings, PtxSettings
from fiducial.models.load import SHARED, load_policy, load_roles, load_tokenizer
from fiducial.rewards.load import load_rewards
from fiducial.rewards.model import ModelReward
from fiducial.rewards.shaping import ScoreScale, normalize_scores, shape
from fiducial.rewards.types import Responses, Scored
from fiducial.rollout.forward import RolloutLogprobs
from fiducial.rollout.trajectory import Trajectory
from fiducial.settings import (
    KLSettings,
    LoraSettings,
    OptimizerSettings,
    RowSettings,
    RunSettings,
    ScoreSettings,
)
from fiducial.train import reference_cache as cache_module
from fiducial.train.processes import Processes
from fiducial.train.renderer import load_renderer
from fiducial.train.step import Stepper
from support import ARCHITECTURES, BAD, GOOD, PROMPTS, sample, write_jsonl

each = pytest.mark.parametrize("kind", ARCHITECTURES)
METHODS = ("sft", "reward", "dpo", "ppo", "reinforce", "grpo")
GENTLE = OptimizerSettings(eps=1e-3, schedule="constant", max_grad_norm=1e9)
"""Close to plain gradient descent and never clipped: a wrong scale of the gradient shows, and
rounding does not flip Adam's sign.
"""

REWARDS = """
def count_e(prompts, completions):
    return [float(c.count("e")) for c in completions]

def length(completions, number, **columns):
    assert len(number) == len(completions) and all(isinstance(n, int) for n in number)
    return [len(c) / 10 for c in completions]

def raises(prompts, completions):
    return [1 / 0 for c in completions]

def too_few(prompts, completions):
    return [1.0]

def not_a_number(prompts, completions):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return lambda *names: tuple(f"{path}:{name}" for name in names)


@pytest.fixture(scope="module")
def go(models, data, rewards, tmp_path_factory):
    """go("dpo", "llama", steps=3, ...): a short run in a folder of its own."""

    def run(method, kind, **changes):
        common = {
            "model": models.get(kind, kind),
            "out": str(tmp_path_factory.mktemp(method) / "run"),
            "steps": 2,
            "learning_rate": 1e-3,
        }
        common |= {"batch_size": 4, "run": RunSettings(eval_every=1, samples=2)}
        cls, extra = {
            "sft": (fd.SFT, {"data": data["completions"], "max_new_tokens": 4}),
            "reward": (fd.RewardModel, {"data": data["pairs"]}),
            "dpo": (
                fd.DPO,
                {
                    "data": data["pairs"],
                    "max_new_tokens": 4,
                    "optimizer": OptimizerSettings(schedule="constant"),
                },
            ),
            "ppo": (
                fd.PPO,
                {
                    "data": data["prompts"],
                    "reward": rewards("count_e"),
                    "max_new_tokens": 6,
                    "epochs": 2,
                },
            ),
            "reinforce": (
                fd.Reinforce,
                {
                    "data": data["prompts"],
                    "reward": rewards("count_e", "length"),
                    "max_new_tokens": 6,
                    "group_size": 2,
                },
            ),
            "grpo": (
                fd.GRPO,
                {
                    "data": data["prompts"],
                    "reward": rewards("count_e", "length"),
                    "max_new_tokens": 6,
                    "group_size": 2,
                    "epochs": 2,
                },
            ),
        }[method]
        return getattr(fd, method)(cls(**(common | extra | changes)))

    return run


def lines(run, step=None):
    """Lines of metrics.jsonl of training steps."""
    found = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in found if "num_tokens" in line]
    return found if step is None else found[step]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def flat(state):
    return torch.cat([state[k].flatten() for k in sorted(state)])


# What is saved
# ------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "rank"), [("llama", 0), ("gpt2", 0), ("qwen3", 0), ("llama", 4)])
@torch.no_grad()
def test_the_saved_model_is_an_ordinary_one_and_the_trained_one(go, models, method, kind, rank):
    with torch.enable_grad():
        run = go(method, kind, lora=LoraSettings(r=rank), learning_rate=1e-2)
    ids = torch.tensor([[5, 9, 14, 22, 7, 31, 12]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    if method == "reward":
        again = AutoModelForSequenceClassification.from_pretrained(run.path / "model").eval()
        assert again.num_labels == 1
        assert torch.allclose(
            again(input_ids=ids).logits[:, 0], run.model(ids, torch.tensor([7])), atol=1e-5
        )
    else:
        again = AutoModelForCausalLM.from_pretrained(run.path / "model").eval()
        logp = (
            again(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        )
        assert torch.allclose(logp, run.model(ids, mask).logprobs[:, 1:], atol=1e-5)
        start = (
            AutoModelForCausalLM.from_pretrained(models[kind])(input_ids=ids)
            .logits[:, :-1]
            .log_softmax(-1)
        )
        assert (
            start.gather(-1, ids[:, 1:, None])[..., 0] - logp
        ).abs().max() > 1e-3  # it has moved
    theirs = AutoTokenizer.from_pretrained(run.path / "model")
    assert theirs("the cat").input_ids == load_tokenizer(models[kind])("the cat").input_ids
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 2 == len(lines(run))
    assert (run.path / "report.html").is_file() and (run.path / "config.yaml").is_file()
    assert not (run.path / ".model-aside").exists()


def test_the_pipeline_with_adapters_from_sft_to_ppo(go, data):
    """Each stage starts from the folder that the one before has left, adapters on adapters."""
    lora = LoraSettings(r=2)
    first = go("sft", "gpt2", lora=lora)
    judge = go("reward", str(first.path / "model"), lora=lora)
    aligned = go(
        "ppo",
        str(first.path / "model"),
        lora=lora,
        reward=(str(judge.path / "model"),),
        learning_rate=1e-2,
    )
    assert abs(lines(aligned, 0)["objective/kl"]) < 1e-5
    for method in ("reinforce", "grpo"):
        also = go(
            method,
            str(first.path / "model"),
            lora=lora,
            reward=(str(judge.path / "model"),),
            learning_rate=1e-2,
        )
        assert (
            abs(lines(also, 0)["objective/kl"]) < 1e-5
            and abs(lines(also, 1)["objective/kl"]) > 1e-5
        )
    preferred = go("dpo", str(first.path / "model"), lora=lora)
    assert lines(preferred, 0)["loss"] == pytest.approx(math.log(2), abs=1e-5)


# What must not change the result
# ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_how_a_batch_is_cut_changes_nothing(go, models, method, kind):
    """Lengths differ by a factor of eight: a mean of means would differ by much more."""

    def train(tokens):
        more = (
            {"critic": CriticSettings(start="shared"), "minibatches": 2} if method == "ppo" else {}
        )
        more |= {
            "reinforce": {"baseline": "reinforce++", "batch_size": 6},
            "grpo": {"batch_size": 6, "group_size": 3, "minibatches": 2},
        }.get(method, {})
        common = {
            "steps": 3,
            "batch_size": 5,
            "learning_rate": 1e-2,
            "optimizer": GENTLE,
            "run": RunSettings(tokens=tokens, samples=1),
        }
        return go(method, kind, **(common | more))

    whole, cut = train(10**6), train(1)
    for a, b in zip(lines(whole), lines(cut), strict=True):
        assert set(a) == set(b)
        counted = {
            "rewards/accuracies",
            "value_clip_ratio",
            "clip_ratio",
        }  # of ties: rounding decides them
        for name in set(a) - {"seconds", "tokens_per_second"} - counted:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    start, one, other = (
        flat(weights(models[kind])),
        flat(weights(whole.path / "model")),
        flat(weights(cut.path / "model")),
    )
    if method == "reward":  # another head than the language model's
        assert torch.allclose(one, other, atol=1e-5)
        return
    assert (one - other).norm() < 1e-4 * (one - start).norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_is_the_same_run(go, method):
    one, other = go(method, "llama"), go(method, "llama")
    assert torch.equal(flat(weights(one.path / "model")), flat(weights(other.path / "model")))
    changed = go(method, "llama", seed=1)
    assert not torch.equal(flat(weights(one.path / "model")), flat(weights(changed.path / "model")))


# That they learn
# ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_sft_learns_its_rows_by_heart_and_when_to_stop(go, kind):
    with torch.enable_grad():
        run = go(
            "sft",
            kind,
            steps=70,
            batch_size=10,
            learning_rate=1e-2,
            rows=RowSettings(held_out=0),
            run=RunSettings(samples=0),
        )
    assert lines(run, 0)["loss"] > 2 and lines(run, -1)["loss"] < 0.05
    renderer = load_renderer(str(run.path / "model"), RowSettings())
    prompts = [renderer.prompt(p, "") for p in PROMPTS]
    said = sample(
        run.model, prompts, max_new_tokens=20, temperature=0, stop_ids=frozenset({renderer.eos})
    )
    assert [renderer.decode(r) for r in said.responses()] == GOOD and said.finished.all()


def pairs_by(rule, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def word(letters, length):
        return " " + "".join(
            letters[int(torch.randint(len(letters), (), generator=generator))]
            for _ in range(length)
        )

    def pair(i):
        if rule == "letters":
            return word("aeiou", 2 + i % 5), word("kqvxz", 2 + (i * 3) % 5)
        return word("abcdef", 5 + i % 4), word("abcdef", 1 + i % 3)

    rows = [
        {
            "prompt": f"{PROMPTS[i % 10]} {word('mnop', 8)}",
            "chosen": pair(i)[0],
            "rejected": pair(i)[1],
        }
        for i in range(60)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@each
def test_dpo_learns_what_is_preferred(go, tmp_path, kind):
    run = go(
        "dpo",
        kind,
        data=pairs_by("letters", tmp_path),
        steps=24,
        batch_size=16,
        learning_rate=3e-3,
        rows=RowSettings(held_out=0.2),
    )
    first, last = lines(run, 0), lines(run, -1)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first[
        "rewards/margins"
    ] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.3 and last["rewards/margins"] > 1 and last["rewards/accuracies"] == 1
    assert run.metrics["eval/rewards/accuracies"] >= 0.9 and run.metrics["eval/rewards/margins"] > 1
    assert run.evaluation["implicit reward accuracy on held-out pairs"]["n"] == 12


@pytest.mark.parametrize("rule", ["letters", "length"])
def test_a_reward_model_learns_what_is_preferred(go, tmp_path, rule):
    run = go(
        "reward",
        "gpt2",
        data=pairs_by(rule, tmp_path),
        steps=40,
        batch_size=16,
        learning_rate=3e-3,
        rows=RowSettings(held_out=0.2),
    )
    assert lines(run, -1)["loss"] < 0.2 and run.metrics["eval/accuracy"] >= 0.8
    alone = next(v["value"] for k, v in run.evaluation.items() if k.startswith("length alone"))
    assert (alone == 1.0) == (
        rule == "length"
    )  # a judge who only looks at the length is as good for the one and not for the other
    config = json.loads((run.path / "model" / "config.json").read_text())
    scores = [run.metrics["score/chosen"], run.metrics["score/rejected"]]
    assert min(scores) < config["reward_mean"] < max(scores) and config["reward_std"] > 0.5
    assert config["reward_low"] < config["reward_mean"] < config["reward_high"]


@each
def test_ppo_raises_the_reward(go, kind):
    run = go(
        "ppo",
        kind,
        steps=25,
        batch_size=32,
        learning_rate=3e-3,
        epochs=3,
        max_new_tokens=8,
        beta=0.01,
        run=RunSettings(samples=1),
    )
    assert (
        lines(run, 0)["reward"] < 1
        and lines(run, -1)["reward"] > 4
        and lines(run, -1)["objective/kl"] > 1
    )


@each
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("reinforce", {"group_size": 8}),
        ("grpo", {"group_size": 8, "variant": "dr_grpo", "epochs": 3}),
    ],
)
def test_without_a_critic_the_reward_is_raised_too(go, rewards, kind, method, more):
    more = more | {"reward": rewards("count_e")}
    run = go(
        method,
        kind,
        steps=25,
        batch_size=32,
        learning_rate=5e-3,
        max_new_tokens=8,
        beta=0.01,
        run=RunSettings(samples=1),
        **more,
    )
    assert (
        lines(run, 0)["reward"] < 1
        and lines(run, -1)["reward"] > 4
        and lines(run, -1)["objective/kl"] > 1
    )


@pytest.mark.parametrize("start", ["policy", "shared"])
def test_the_critic_learns_what_a_response_will_earn(go, tmp_path, start):
    """A response earns 1 whatever it says: that is what each of its states is worth."""
    (tmp_path / "one.py").write_text(
        "def one(prompts, completions):\n    return [1.0] * len(completions)\n"
    )
    critic = CriticSettings(start=start, learning_rate=1e-2, clip=None, coefficient=1.0)
    run = go(
        "ppo",
        "llama",
        reward=(f"{tmp_path}/one.py:one",),
        beta=0.0,
        critic=critic,
        steps=15,
        batch_size=16,
        learning_rate=5e-3,
        lam=1.0,
    )
    assert lines(run, 0)["value_loss"] > 0.2 and lines(run, -1)["value_loss"] < 0.02


# PPO
# ------------------------------------------------------------


@each
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("method", ["ppo", "reinforce", "grpo"])
def test_the_first_ratio_is_one_and_the_first_kl_zero_at_any_temperature(go, method, kind, rank):
    run = go(
        method,
        kind,
        temperature=0.6,
        learning_rate=1e-2,
        batch_size=8,
        lora=LoraSettings(r=rank),
        steps=3,
    )
    for line in lines(run):
        assert method == "reinforce" or line["ratio/first"] == pytest.approx(1, abs=1e-5)
        assert line["sampler_gap"] < 1e-4
    assert lines(run, 0)["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(lines(run, -1)["objective/kl"]) > 1e-3


def trajectory(*responses, finished, prompts=None, eos=2):
    prompts = prompts or [[5, 9]] * len(responses)
    n = range(len(responses))
    return Trajectory.build(
        prompts,
        responses,
        [[-1.0] * len(r) for r in responses],
        finished,
        list(n),
        [0] * len(n),
        1.0,
    )


def logprobs_of(t):
    generator = torch.Generator().manual_seed(1)

    def numbers():
        return torch.where(
            t.mask, torch.randn(t.ids.shape, generator=generator), torch.tensor(math.nan)
        )  # padding holds rubbish

    return RolloutLogprobs(numbers(), numbers(), torch.where(t.mask, 1.0, 0.0), numbers())


def test_the_rewards_of_a_response_add_up_to_its_score_less_beta_times_its_kl():
    t = trajectory(
        [7, 8, 2],
        [4],
        [6, 6, 6, 6, 6],
        finished=[True, False, False],
        prompts=[[5], [9, 9, 9, 9], [3, 3]],
    )
    logprobs, scores = logprobs_of(t), torch.tensor([3.0, -1.0, 0.5])
    rewards, metrics, _ = shape(t, Scored(scores.tolist(), {}), logprobs, ScoreSettings(), beta=0.3)
    kl = [sum((logprobs.logprobs - logprobs.ref_logprobs)[i][t.mask[i]].tolist()) for i in range(3)]
    assert (rewards[~t.mask] == 0).all()
    for i in range(3):
        assert float(rewards[i].sum()) == pytest.approx(float(scores[i]) - 0.3 * kl[i], abs=1e-5)
        last = (
            int(t.lengths[i]) - 1
        )  # the score stands on the last token of the response, and there alone
        here = float(logprobs.logprobs[i, last] - logprobs.ref_logprobs[i, last])
        assert float(rewards[i, last]) == pytest.approx(float(scores[i]) - 0.3 * here, abs=1e-5)
    assert metrics["objective/kl"] == pytest.approx(sum(kl) / 3, abs=1e-5)
    assert metrics["kl"] == pytest.approx(sum(kl) / int(t.mask.sum()), abs=1e-5)
    assert (
        metrics["completions/finished"] == pytest.approx(1 / 3)
        and metrics["completions/mean_length"] == 3
    )


@torch.no_grad()
def test_the_penalty_for_a_missing_eos_looks_at_the_response_alone(models):
    policy = load_policy(models["llama"], LoraSettings(), RunSettings())
    prompts = [[5, 2, 9], [5, 9, 2], [5, 9]] * 20  # an EOS inside the prompt, and at its end
    t = sample(policy, prompts, max_new_tokens=6, stop_ids=frozenset({2, *range(20, 26)}))
    logprobs, scored = logprobs_of(t), Scored([0.0] * 60, {})
    without, _, _ = shape(t, scored, logprobs, ScoreSettings(), beta=0.1)
    settings = ScoreSettings(missing_eos_penalty=1.5)
    penalised, metrics, _ = shape(t, scored, logprobs, settings, beta=0.1)
    missing = [not {2, *range(20, 26)} & set(r) for r in t.responses(ending=True)]
    assert 5 < sum(missing) < 55
    assert torch.allclose(
        (without - penalised).sum(1), 1.5 * torch.tensor(missing).float(), atol=1e-5
    )
    assert metrics["reward"] == 0 and metrics["objective/score"] == pytest.approx(
        -1.5 * sum(missing) / 60
    )


@pytest.mark.parametrize("how", ["none", "first", "batch"])
def test_scores_are_normalised_as_asked_and_then_clipped(how):
    first, second = (torch.tensor(x).double() for x in ([1.0, 2.0, 6.0], [7.0, 0.0, 1.0]))
    t = trajectory([7, 2], [7, 2], [7, 2], finished=[True] * 3)
    settings = ScoreSettings(normalise=how)
    one, scale, held = normalize_scores(first.tolist(), t, settings)
    two, _, again = normalize_scores(second.tolist(), t, settings, first=held)
    std = math.sqrt(14 / 3)  # of the first scores: mean 3, deviations -2, -1, 3
    assert again == held == (ScoreScale(3.0, pytest.approx(std)) if how == "first" else None)
    expected = {"none": (first, second), "first": ((first - 3) / std, (second - 3) / std)}
    if how == "batch":
        assert (
            abs(float(two.mean())) < 1e-6
            and float(two.std(correction=0)) == pytest.approx(1)
            and float(one.std(correction=0)) == pytest.approx(1)
        )
    else:
        assert torch.allclose(one, expected[how][0]) and torch.allclose(two, expected[how][1])
    assert torch.allclose(one[1:] - one[:-1], scale * (first[1:] - first[:-1]))
    settings = ScoreSettings(normalise=how, clip=0.5)
    clipped, _, _ = normalize_scores(second.tolist(), t, settings, first=held)
    assert torch.allclose(clipped, two.clamp(-0.5, 0.5))


def test_beta_follows_the_kl_and_moves_a_fifth_at_most(go):
    changes = {"batch_size": 8, "steps": 5, "learning_rate": 2e-2, "beta": 0.2, "epochs": 3}
    run = go("ppo", "llama", kl=KLSettings(target=0.01, horizon=8), **changes)
    betas, kls = [[line[k] for line in lines(run)] for k in ("beta", "objective/kl")]
    assert betas[0] == 0.2 and betas[1] == pytest.approx(0.2 * 0.8)  # KL was 0
    for before, after, kl in zip(betas, betas[1:], kls, strict=False):
        assert after == pytest.approx(
            kl_module.adapt(before, kl, target=0.01, episodes=8, horizon=8)
        )
        assert 0.8 - 1e-9 <= after / before <= 1.2 + 1e-9
    assert kls[-1] > 0.01 and betas[-1] > betas[1]
    fixed = go("ppo", "llama", **changes)
    assert {line["beta"] for line in lines(fixed)} == {0.2}


def test_epochs_end_where_the_policy_has_moved_far_enough(go):
    changes = {"batch_size": 8, "steps": 2, "learning_rate": 5e-3, "epochs": 6}
    free, held = go("ppo", "llama", **changes), go("ppo", "llama", target_kl=1e-5, **changes)
    assert [line["epochs_done"] for line in lines(free)] == [6, 6]
    assert all(1 <= line["epochs_done"] < 6 for line in lines(held))
    one_epoch = go(
        "ppo",
        "llama",
        **(
            changes | {"epochs": 1, "steps": 1, "optimizer": OptimizerSettings(schedule="constant")}
        ),
    )
    stopped = go(
        "ppo",
        "llama",
        target_kl=1e-9,
        **(changes | {"steps": 1, "optimizer": OptimizerSettings(schedule="constant")}),
    )
    assert torch.equal(
        flat(weights(one_epoch.path / "model")), flat(weights(stopped.path / "model"))
    )


@each
def test_a_shared_critic_learns_and_is_not_saved_with_the_policy(go, kind):
    run = go("ppo", kind, critic=CriticSettings(start="shared"), learning_rate=1e-2, steps=3)
    assert float(run.model.value_head.weight.detach().abs().max()) > 0
    assert "critic/grad_norm" not in lines(run, 0)
    assert not any("value" in name for name in weights(run.path / "model"))
    with pytest.raises(InputError, match=r"--critic.start shared: with --lora.r"):
        go("ppo", kind, critic=CriticSettings(start="shared"), lora=LoraSettings(r=2))


def test_ptx_adds_the_gradient_of_its_rows_and_nothing_else(go, models, data, monkeypatch):
    seen = []
    step = Stepper.step

    def spy(self, number):
        seen.append(torch.cat([p.grad.flatten().clone() for p in self.module.parameters()]))
        return step(self, number)

    monkeypatch.setattr(Stepper, "step", spy)
    changes = {
        "steps": 1,
        "epochs": 1,
        "batch_size": 4,
        "critic": CriticSettings(start="shared"),
    }
    go("ppo", "llama", **changes)
    mixed = go(
        "ppo",
        "llama",
        ptx=PtxSettings(data=data["completions"], coefficient=3.0, batch_size=4),
        **changes,
    )
    monkeypatch.undo()

    renderer = load_renderer(models["llama"], RowSettings())
    cpu = torch.device("cpu")
    roles = load_roles(models["llama"], LoraSettings(), RunSettings(), None, cpu, critic=SHARED)
    policy = roles.policy
    rows = [renderer.completion(PROMPTS[i], GOOD[i], "") for i, _ in stream(10, 0, 4, 0)]
    nll = 0.0
    for row in rows:
        nll = nll - policy(torch.tensor([row.ids]), torch.tensor([row.mask])).logprobs.sum()
    nll = nll / sum(r.num_labels for r in rows)
    nll.backward()
    expected = torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else 3.0 * p.grad).flatten()
            for p in policy.parameters()
        ]
    )
    assert (seen[1] - seen[0] - expected).norm() < 1e-4 * expected.norm()
    assert lines(mixed, 0)["ptx_loss"] == pytest.approx(nll.item(), rel=1e-5)


# Rewards
# ------------------------------------------------------------


def test_several_rewards_are_added_with_their_weights(go, rewards):
    run = go(
        "ppo",
        "llama",
        reward=rewards("count_e", "length"),
        reward_weights=(2.0, -0.5),
        batch_size=8,
    )
    for line in lines(run):
        assert line["reward"] == pytest.approx(
            2 * line["reward/count_e"] - 0.5 * line["reward/length"]
        )
    assert lines(run, 0)["reward/length"] > 0
    with pytest.raises(InputError, match="1 weights for 2 rewards"):
        go("ppo", "llama", reward=rewards("count_e", "length"), reward_weights=(2.0,))
    with pytest.raises(InputError, match="--reward is required"):
        go("ppo", "llama", reward=())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", r"raised ZeroDivisionError: division by zero \(rewards.py:10\)"),
        ("too_few", "returned 1 numbers for 2 responses"),
        ("not_a_number", "returned nan for response 0"),
        ("nowhere", r"has no function nowhere; it has count_e, length"),
    ],
)
def test_a_broken_reward_function_is_refused_before_training(go, rewards, tmp_path, name, said):
    with pytest.raises(InputError, match=said) as caught:
        go("ppo", "llama", reward=rewards(name), out=str(tmp_path / "run"))
    assert "rewards.py" in str(caught.value)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or metrics.read_text() == ""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise ValueError('no')", "raised ValueError: no"),
        ("return [float('inf')] * len(completions)", "returned inf"),
    ],
)
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_reward_function_that_breaks_later_costs_nothing_that_was_trained(
    go, tmp_path, method, fault, said
):
    broken = tmp_path / "broken"
    file = tmp_path / "later.py"
    file.write_text(
        "import pathlib\ncalls = 0\n\ndef score(prompts, completions):\n    global calls\n    "
        "calls += 1\n"
        f"    if calls == 5 and pathlib.Path({str(broken)!r}).exists():\n        {fault}\n    "
        "return [float(c.count('e')) for c in completions]\n"
    )
    changes = {"reward": (f"{file}:score",), "steps": 6, "learning_rate": 1e-2}
    whole = go(method, "llama", **changes)
    broken.touch()
    with pytest.raises(RunError, match=rf"later.py:score .*{said}"):
        go(method, "llama", out=str(tmp_path / "run"), **changes)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "checkpoint-3"
    ]  # the first call was the sample before training
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    broken.unlink()
    resumed = go(method, "llama", out=str(tmp_path / "run"), resume=True, **changes)
    assert torch.equal(flat(weights(whole.path / "model")), flat(weights(resumed.path / "model")))


@each
@torch.no_grad()
def test_a_reward_model_scores_the_very_tokens_that_were_sampled(go, models, kind):
    with torch.enable_grad():
        judge = str(go("reward", kind, learning_rate=1e-2).path / "model")
    renderer = load_renderer(models[kind], RowSettings())
    policy = load_policy(models[kind], LoraSettings(), RunSettings())
    prompts = [renderer.prompt(p, "") for p in PROMPTS]
    t = sample(policy, prompts, max_new_tokens=8, stop_ids=frozenset({renderer.eos, 20, 21}))
    reward = load_rewards((judge,), None, RunSettings(), Processes())
    assert isinstance(reward.parts[0], ModelReward) and reward.parts[0].same_tokens(renderer)
    rows = [PromptRow(p, {}, "") for p in PROMPTS]
    scores = reward.score(Responses.of(rows, t, renderer)).scores
    again = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    for i, score in enumerate(scores):
        raw = again.score(
            again.base_model(input_ids=t.ids[i, : t.lengths[i]][None]).last_hidden_state
        )[0, -1]
        assert score == pytest.approx(float(raw) - again.config.reward_mean, abs=1e-5)
    with torch.enable_grad():  # and the critic starts from it
        run = go("ppo", kind, reward=(judge,), critic=CriticSettings(start="reward"))
    assert abs(lines(run, 0)["explained_variance"]) > 1e-6  # a zero head would explain nothing


# The reference of DPO
# ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_dpo_starts_at_log_two_also_with_a_reference_from_the_disk(
    go, tmp_path, monkeypatch, kind, rank
):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path))
    read = []
    inner = cache_module._read
    monkeypatch.setattr(
        cache_module,
        "_read",
        lambda path: read.append(value) or value if (value := inner(path)) is not None else None,
    )
    runs = [go("dpo", kind, lora=LoraSettings(r=rank), beta=0.5) for _ in range(2)]
    assert (
        len(read) == 1 and len(list(tmp_path.iterdir())) == 1
    )  # computed by the first, read by the second
    for run in runs:
        assert lines(run, 0)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert torch.equal(flat_of(runs[0]), flat_of(runs[1]))


def test_a_changed_byte_in_the_stored_reference_is_seen_and_it_is_computed_again(
    go, tmp_path, monkeypatch
):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path))
    first = go("dpo", "llama")
    (stored,) = tmp_path.iterdir()
    whole = stored.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 64]), whole[: len(whole) // 2], b""):
        stored.write_bytes(damaged)
        assert torch.equal(flat_of(go("dpo", "llama")), flat_of(first))
        assert stored.read_bytes() == whole


def flat_of(run):
    return flat(load_file(next((run.path / "model").glob("*.safetensors"))))


def test_another_model_or_other_rows_have_another_reference(
    go, models, data, make, tmp_path, monkeypatch
):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / "cache"))

    def train(kind, **changes):
        go("dpo", kind, steps=3, **changes)  # a whole epoch, which reads every row

    def references():
        return len(list((tmp_path / "cache").iterdir()))

    train("llama")
    assert references() == 1
    text = Path(data["pairs"]).read_text()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(text.replace(BAD[0], " xyz zz"))
    train("llama", data=str(changed))
    assert references() == 2
    other = Path(make("llama"))
    state = weights(other)
    state["model.norm.weight"][3] += 1e-3
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    train(str(other))
    assert references() == 3
    train(
        str(make("llama", rope_parameters={"rope_type": "default", "rope_theta": 50.0}))
    )  # the same weights, other positions
    assert references() == 4
    train("llama", rows=RowSettings(max_length=19))
    assert references() == 5
    train(str(make("llama")))  # the same model in another folder
    assert references() == 5
