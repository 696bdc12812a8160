"""Reward models: what they read of a response, adapters, the numbers in their config, their zero
and their scale, and a critic that starts from one. Plain transformers and peft say what is right.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fiducial.core.advantages import group_normalised, whitened
from fiducial.core.reductions import whiten
from fiducial.data.render import Rendered
from fiducial.data.row_types import Message, PromptRow
from fiducial.errors import InputError, RunError
from fiducial.methods import reward_model as reward_page
from fiducial.methods.ppo import prepare
from fiducial.methods.reward_model import Ranking, score_facts
from fiducial.methods.settings.ppo import PPO, CriticSettings
from fiducial.rewards.load import load_reward, load_rewards
from fiducial.rewards.shaping import ScoreScale, normalize_scores, shape
from fiducial.rewards.types import Responses, Scored
from fiducial.rollout.forward import RolloutLogprobs
from fiducial.rollout.trajectory import Trajectory
from fiducial.settings import LoraSettings, RowSettings, RunSettings, ScoreSettings
from fiducial.train.processes import Processes
from fiducial.train.renderer import load_renderer


def make_scorer(base, folder, seed=0, **facts):
    """A reward model with random weights on top of a model folder."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.config.pad_token_id = tokenizer.pad_token_id or 0
    for key, value in facts.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorers(models, tmp_path_factory):
    return {
        k: make_scorer(m, tmp_path_factory.mktemp("rm"), k == "gpt2") for k, m in models.items()
    }


def load(name):
    return load_reward(name, RunSettings(), Processes())


@torch.no_grad()
def theirs(model, ids):
    """The score of plain transformers at the last of these ids."""
    hidden = model.eval().base_model(input_ids=torch.tensor([ids])).last_hidden_state
    return float(model.score(hidden)[0, -1, 0])


def responses(policy, prompts, completions, finished, template=None):
    """Responses of a policy, in its tokens."""
    renderer = load_renderer(policy, RowSettings(chat_template=template))
    asked = [renderer.prompt(p, "") for p in prompts]
    ids = [
        renderer.tokenizer(c, add_special_tokens=False).input_ids + [renderer.eos] * f
        for c, f in zip(completions, finished, strict=True)
    ]
    n = len(ids)
    trajectory = Trajectory.build(
        asked, ids, [[0.0] * len(x) for x in ids], finished, range(n), [0] * n, 1.0
    )
    where = [f"p.jsonl:{i + 1}" for i in range(n)]
    return Responses(list(prompts), list(completions), [{}] * n, trajectory, renderer, where)


# What a model of other tokens reads
# ------------------------------------------------------------

PROMPTS = ["the cat", "who is in", "say", "say"]
COMPLETIONS = [" sat", " no.", "", ""]
FINISHED = [True, False, True, False]


@pytest.mark.parametrize(("judge", "policy"), [("gpt2", "llama"), ("llama", "qwen3")])
def test_text_ends_as_in_training_and_a_cut_response_has_no_end(scorers, models, judge, policy):
    part = load(scorers[judge])
    batch = responses(models[policy], PROMPTS, COMPLETIONS, FINISHED)
    assert not part.same_tokens(batch.renderer)
    tokenizer = AutoTokenizer.from_pretrained(scorers[judge])
    model = AutoModelForSequenceClassification.from_pretrained(scorers[judge])
    begin = [tokenizer.bos_token_id] if judge == "llama" else []
    expected = []
    for prompt, completion, finished in zip(PROMPTS, COMPLETIONS, FINISHED, strict=True):
        ids = tokenizer(prompt + completion, add_special_tokens=False).input_ids
        ending = [tokenizer.eos_token_id] if finished else []
        expected.append(theirs(model, begin + ids + ending))
    assert part.score(batch).scores == pytest.approx(expected, abs=1e-5)
    assert expected[2] != pytest.approx(expected[3], abs=1e-3)


def test_chats_go_through_the_reward_models_own_template(scorers, models, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    part = load(scorers["qwen3"])
    chats = [(Message("system", "yes"), Message("user", "the cat")), (Message("user", "say"),)] * 2
    completions, finished = ["sat on", "no", "sat on", ""], [True, True, False, False]
    batch = responses(
        models["llama"], chats, completions, finished, template=str(tmp_path / "t.jinja")
    )
    tokenizer = AutoTokenizer.from_pretrained(scorers["qwen3"])
    model = AutoModelForSequenceClassification.from_pretrained(scorers["qwen3"])
    first = "<|im_start|>system\nyes<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n"
    heads = [first, "<|im_start|>user\nsay<|im_end|>\n"] * 2
    texts = [
        f"{head}<|im_start|>assistant\n{c}{'<|im_end|>' if f else ''}"
        for head, c, f in zip(heads, completions, finished, strict=True)
    ]
    expected = [theirs(model, tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    assert part.score(batch).scores == pytest.approx(expected, abs=1e-5)
    part.reader._endings[False] = [5, 5]  # as where the text's last token holds some of the ending
    assert part.score(batch).scores == pytest.approx(expected, abs=1e-5)


def test_a_cut_solution_is_read_at_its_last_token_step_by_step(models, tmp_path):
    folder = make_scorer(models["gpt2"], tmp_path, process_reward={"separator": "\n"})
    part = load(folder)
    prompts, completions = ["the cat", "the cat", "say"], ["on\nin", "on\nin", ""]
    batch = responses(models["llama"], prompts, completions, [True, False, False])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)

    def at(text, *ending):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return float(torch.tensor(theirs(model, ids + list(ending))).sigmoid())

    one = at("the caton\n")
    whole, cut, nothing = part.steps(batch)
    assert whole == pytest.approx([one, at("the caton\nin", tokenizer.eos_token_id)], abs=1e-5)
    assert cut == pytest.approx([one, at("the caton\nin")], abs=1e-5)
    assert nothing == pytest.approx([at("say")], abs=1e-5)


@pytest.mark.parametrize("policy", ["gpt2", "llama"])
def test_what_is_longer_than_the_models_context_is_told_by_its_row(make, models, tmp_path, policy):
    small = make_scorer(make("gpt2", n_positions=9), tmp_path)
    batch = responses(models[policy], ["the", "say"], [" cat", " a b c d e f"], [True, True])
    with pytest.raises(RunError, match=r"p.jsonl:2: prompt and response are 1\d tokens, and .* 9:"):
        load(small).score(batch)


def test_chats_for_a_model_without_a_template_are_refused_before_any_sampling(scorers):
    rows = [PromptRow("text", {}, "p:1"), PromptRow((Message("user", "a"),), {}, "p:2")]
    with pytest.raises(InputError, match=r"^p:2: the prompt is made of chat messages, and the rew"):
        load_rewards((scorers["gpt2"],), None, RunSettings(), Processes()).check_rows(rows)
    load(scorers["qwen3"]).check_rows(rows)
    load(scorers["gpt2"]).check_rows(rows[:1])


# Adapters
# ------------------------------------------------------------


def make_adapter(base, folder, labels=1):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    torch.manual_seed(3)
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("trained", [False, True], ids=["language model", "reward model"])
def test_a_reward_adapter_scores_as_peft_does(models, scorers, tmp_path, trained):
    base = models["llama"]
    if trained:  # whose mean is not the adapter's
        base = make_scorer(models["llama"], tmp_path / "base", reward_mean=5.0)
    folder = make_adapter(base, tmp_path / "adapter")
    part = load(folder)
    batch = responses(models["llama"], PROMPTS[:2], COMPLETIONS[:2], FINISHED[:2])
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    peft = PeftModel.from_pretrained(plain, folder).eval()
    peft.config.pad_token_id = 0
    t = batch.trajectory
    with torch.no_grad():
        expected = [float(peft(input_ids=t.ids[i, : t.lengths[i]][None]).logits) for i in range(2)]
    assert part.score(batch).scores == pytest.approx(expected, abs=1e-4)
    assert part.same_tokens(batch.renderer)  # its tokenizer is the base's


def test_an_adapter_without_a_head_of_one_score_is_no_reward_model(models, tmp_path):
    policy, config = str(tmp_path / "policy"), LoraConfig(r=2, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    get_peft_model(base, config).save_pretrained(policy)
    two = make_adapter(models["llama"], tmp_path / "two", labels=2)
    for folder in (policy, two):
        with pytest.raises(
            InputError, match=r"^--reward: .* no reward model: its adapter holds no"
        ):
            load(folder)


# What the config says
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("reward_mean", x) for x in ("x", [1], None, float("nan"), float("inf"), True, 10**400)),
        *(("reward_std", x) for x in ("x", None)),
        *(("reward_low", x) for x in ("x", None, float("nan"))),
        ("reward_high", [1]),
        *(("process_reward", x) for x in ("x", {}, 5, None, {"separator": 5}, [])),
        ("process_reward", {"separator": "\n", "aggregate": "best"}),
        ("process_reward", {"separator": "\n", "aggregate": ["last"]}),
    ],
)
def test_broken_facts_in_a_config_are_refused_in_a_sentence(scorers, tmp_path, key, value):
    shutil.copytree(scorers["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError) as caught:
        load(str(tmp_path / "m"))
    said = str(caught.value)
    assert said.startswith(f"--reward: {tmp_path}/m/config.json: ") and f"'{key}'" in said
    assert len(said) < 400 and "\n" not in said


def test_the_zero_of_the_scores_is_that_of_a_random_sample(monkeypatch):
    def train(count):
        """Responses sorted by their score, which is their number."""
        return [
            Ranking([Rendered([k], [True], "") for k in (i, i + 1)], [(1, 0)], [0.0])
            for i in range(0, count, 2)
        ]

    def settings(seed):
        return SimpleNamespace(reference_data=None, seed=seed)

    def scored(count, seed):
        return score_facts(None, train(count), [], settings(seed), None, None)

    monkeypatch.setattr(
        reward_page, "all_scores", lambda s, rows, *a: torch.tensor([float(r.ids[0]) for r in rows])
    )
    facts = scored(4000, 0)
    error = facts.std / 512**0.5
    assert abs(facts.mean - 1999.5) < 4 * error and 1000 < facts.std < 1300
    assert scored(4000, 0) == facts != scored(4000, 1)
    assert scored(20, 0).mean == 9.5  # few are all taken
    assert scored(20, 0).low == pytest.approx(0.01 * 19)  # the 1% quantile of 0, 1, ... 19
    assert scored(20, 0).high == pytest.approx(0.99 * 19)
    held = [Ranking([Rendered([i], [True], "") for i in (100, 300)], [(1, 0)], [0.0])]
    apart = score_facts(None, train(20), held, settings(0), None, None)
    assert (apart.mean, apart.low, apart.high) == (9.5, 102.0, 298.0)


# A scale
# ------------------------------------------------------------


def trajectory(n):
    return Trajectory.build(
        [[5]] * n, [[7, 8]] * n, [[0.0] * 2] * n, [True] * n, range(n), [0] * n, 1.0
    )


FIRST, BATCH = (ScoreSettings(normalise=how) for how in ("first", "batch"))


def test_scores_that_do_not_differ_set_no_scale():
    t = trajectory(4)
    for equal in ([0.3] * 4, [5.0, 5.0 + 3e-7, 5.0, 5.0 - 3e-7], [0.0] * 4, [1e6] * 4):
        values, scale, held = normalize_scores(equal, t, FIRST)
        assert values.abs().max() < 1e-6 and scale == 1.0 and held is None
        values, scale, _ = normalize_scores(equal, t, BATCH)
        assert values.abs().max() < 1e-6 and scale == 1.0
    scores = [1.0, 2.0, 3.0, 6.0]  # mean 3, mean square of the deviations 3.5
    values, scale, held = normalize_scores(scores, t, FIRST, first=None)
    assert held == ScoreScale(3.0, pytest.approx(3.5**0.5)) and scale == pytest.approx(3.5**-0.5)
    assert values.tolist() == pytest.approx([x * 3.5**-0.5 for x in (-2, -1, 0, 3)])
    later, _, again = normalize_scores([0.3] * 4, t, FIRST, first=held)
    assert again == held and later.tolist() == pytest.approx([-2.7 * 3.5**-0.5] * 4)


def test_a_small_but_real_spread_sets_the_scale():
    values, scale, _ = normalize_scores([1e-3, 3e-3], trajectory(2), BATCH)
    assert values.tolist() == pytest.approx([-1, 1], rel=1e-4) and scale == pytest.approx(
        1e3, rel=1e-4
    )


def test_a_greedy_score_beside_equal_ones_is_not_blown_up():
    values, _, _ = normalize_scores([2.5], trajectory(1), BATCH, batch=[1.0, 1.0, 1.0])
    assert values.tolist() == [1.5]


@pytest.mark.parametrize("settings", [FIRST, BATCH])
def test_step_rewards_of_equal_totals_keep_their_scale(settings):
    t, zero = trajectory(2), torch.zeros(2, 3)
    steps = torch.tensor([[0.0, 0.25, 0.25], [0.0, 0.5, 0.0]], dtype=torch.float64)
    found = RolloutLogprobs(zero, zero, zero, zero)
    rewards, metrics, held = shape(t, Scored([0.5, 0.5], {}, steps), found, settings, beta=0.0)
    assert rewards.tolist() == [[0.0, 0.25, -0.25], [0.0, 0.5, -0.5]] and held is None
    assert metrics["objective/scale"] == 1.0
    steps = steps * torch.tensor([[1.0], [3.0]])
    rewards, metrics, held = shape(t, Scored([0.5, 1.5], {}, steps), found, settings, beta=0.0)
    assert metrics["objective/scale"] == pytest.approx(2.0)
    assert rewards[1].tolist() == pytest.approx([0.0, 3.0, -2.0])
    assert held == (ScoreScale(1.0, 0.5) if settings is FIRST else None)


def test_equal_advantages_are_whitened_to_nothing_also_in_float32():
    for value in (1000.1, -3e5 - 0.3, 1e-3):
        equal = torch.full((7, 31), value)
        assert (whiten(equal, torch.ones_like(equal)) == 0).all()
        assert (whitened(equal, torch.ones_like(equal)) == 0).all()
        groups = torch.arange(7).repeat_interleave(31)
        assert (group_normalised(equal.flatten(), groups) == 0).all()


def test_a_range_that_ends_before_it_begins_is_refused(models, tmp_path):
    folder = make_scorer(models["llama"], tmp_path / "m", reward_low=1.0, reward_high=-1.0)
    with pytest.raises(InputError, match=r"config\.json: 'reward_low' is 1 and 'reward_high' -1"):
        load(folder)


def test_scores_outside_the_range_of_the_reward_model_are_counted(ready, judge, tmp_path):
    chosen = [(i, 0) for i in range(6)]
    there = ready()
    t = there.sample(chosen, 0)
    scores = there.score(chosen, t, 0, 0)
    assert "calibration/outside" not in scores.metrics()  # the range is not known
    raw = sorted(score + 0.75 for score in scores.floats())  # reward_mean is subtracted
    for low, high, outside in (
        (raw[0] - 1e-3, raw[-1] + 1e-3, 0),
        (raw[0] + 1e-4, raw[-1] + 1, 1),
        (raw[0] - 1, raw[3] - 1e-4, 3),
    ):
        config = json.loads((Path(judge) / "config.json").read_text())
        shutil.copytree(judge, tmp_path / str(outside))
        text = json.dumps(config | {"reward_low": low, "reward_high": high})
        (tmp_path / str(outside) / "config.json").write_text(text)
        again = ready(reward=(str(tmp_path / str(outside)),)).score(chosen, t, 0, 0)
        assert again.floats() == scores.floats()
        assert again.metrics()["calibration/outside"] == pytest.approx(outside / 6)


# A critic that starts from a reward model
# ------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(models, tmp_path_factory):
    return make_scorer(models["llama"], tmp_path_factory.mktemp("judge"), reward_mean=0.75)


@pytest.fixture
def ready(models, data, judge, tmp_path):
    """What PPO begins with, for settings that differ."""

    def build(**changes):
        common = {"model": models["llama"], "data": data["prompts"], "reward": (judge,)}
        settings = PPO(**(common | {"out": str(tmp_path / "run"), "max_new_tokens": 4} | changes))
        return prepare(settings, Processes())[0]

    return build


@torch.no_grad()
def values_and_rewards(ready):
    """The critic's value of whole responses, and the rewards that these get."""
    chosen = [(i, 0) for i in range(6)]
    t = ready.sample(chosen, 0)
    return ready.roles.critic(t.ids, t.lengths).tolist(), ready.score(chosen, t, 0, 0).floats()


ZERO = "def zero(completions):\n    return [9.0] * len(completions)\n"


@pytest.mark.parametrize("rank", [0, 2])
def test_the_first_values_are_the_rewards(ready, judge, scorers, tmp_path, rank):
    (tmp_path / "r.py").write_text(ZERO)
    other = f"{tmp_path}/r.py:zero"
    lora = LoraSettings(r=rank)
    for changes in (
        {},
        {"reward_weights": (-2.5,)},
        {"reward": (scorers["llama"], judge, other), "reward_weights": (0.0, 0.5, 0.0)},
    ):
        values, rewards = values_and_rewards(ready(lora=lora, **changes))
        assert values == pytest.approx(rewards, abs=1e-4)
        assert max(rewards) - min(rewards) > 0.1


def test_where_the_scale_is_not_known_the_critic_starts_at_zero_or_is_refused(
    ready, judge, tmp_path
):
    (tmp_path / "r.py").write_text(ZERO)
    two = (judge, f"{tmp_path}/r.py:zero")
    for changes in ({"score": FIRST}, {"score": ScoreSettings(clip=1.0)}, {"reward": two}):
        values, _ = values_and_rewards(ready(**changes))
        assert values == [0.0] * 6
    asked = CriticSettings(start="reward")
    for score, flag in ((BATCH, "normalise"), (ScoreSettings(clip=1.0), "clip")):
        with pytest.raises(InputError, match=rf"--critic.start reward with --score.{flag}: "):
            ready(critic=asked, score=score)
    with pytest.raises(InputError, match=r"no --reward is a reward model .* other than 0"):
        ready(critic=asked, reward=two, reward_weights=(0.0, 1.0))
