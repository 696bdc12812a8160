"""The table as a Hugging Face model: through the package it is the distribution that it holds, to
the last digit, and it is trained like any other.
"""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fiducial as fd
from fiducial.data.render import Rendered
from fiducial.lab.worlds import exact, policies
from fiducial.lab.worlds.world import EOS, World, bradley_terry, random_reward, tree
from fiducial.methods.dpo import Pair, pair_logprobs
from fiducial.models.load import load_policy, load_roles, load_scorer
from fiducial.models.roles import Policy
from fiducial.models.tabular import (
    TabularConfig,
    TabularForSequenceClassification,
    TabularLM,
    states_per_prompt,
)
from fiducial.rollout.trajectory import Trajectory
from fiducial.settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings
from support import sample, write_jsonl

EXACT = 1e-12
PLAIN = (LoraSettings(), RunSettings())


def single(x: np.ndarray) -> np.ndarray:
    """Rounded to what a float32 table can hold."""
    return x.astype(np.float32).astype(np.float64)


def random_world(prompts=((1,), (2, 1, 1), (2, 2)), vocabulary=3, horizon=3, seed=0) -> World:
    rng, size = np.random.default_rng(seed), tree(vocabulary, horizon)
    logits = single(rng.normal(size=(len(prompts), len(size.states), vocabulary)) * 1.5)
    return World(
        "random",
        prompts,
        logits,
        random_reward(len(prompts), len(size.responses), seed),
        0.5,
        horizon,
    )


WORLD = random_world()
WORLDS = [
    WORLD,
    random_world(((2, 0, 1), (0,), (3,)), 4, 2),
    random_world(((1,),), 2, 4),
    random_world(((1, 1, 1, 1, 1), (2,)), 3, 1),
]
worlds = pytest.mark.parametrize(
    "world", WORLDS, ids=lambda w: f"{w.vocabulary}-{w.horizon}-{w.prompts}"
)


def every(world: World, temperature: float = 1.0) -> Trajectory:
    """All responses to all prompts, side by side and padded, as if they had been sampled."""
    prompts = [list(x) for x in world.prompts for _ in world.responses]
    responses = [list(y) for _ in world.prompts for y in world.responses]
    number, nothing = list(range(len(prompts))), [[0.0] * len(y) for y in responses]
    return Trajectory.build(
        prompts, responses, nothing, [y[-1] == EOS for y in responses], number, number, temperature
    )


def logprobs(policy: Policy, world: World, temperature: float = 1.0) -> torch.Tensor:
    """[P, Y] by the package."""
    drawn = every(world)
    return (
        policy(drawn.ids, drawn.mask, temperature)
        .logprobs.sum(1)
        .view(len(world.prompts), len(world.responses))
    )


def as_table(logits: np.ndarray) -> torch.Tensor:
    """[P, S, V] in the layout of the model's weight, [V, rows]."""
    return torch.from_numpy(logits.reshape(-1, logits.shape[-1]).T.copy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(policies.save(policies.table(WORLD), tmp_path_factory.mktemp("table")))


# ---- its distribution ----


@worlds
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_responses_have_the_probabilities_of_the_table(world, temperature):
    truth = exact.logprobs(world.tree, world.reference / temperature)
    assert (
        np.abs(
            logprobs(Policy(policies.table(world)), world, temperature).detach().numpy() - truth
        ).max()
        < 1e-5
    )
    double = logprobs(Policy(policies.table(world).double()), world, temperature)
    assert double.dtype == torch.float64
    np.testing.assert_allclose(double.detach(), truth, atol=EXACT)


@worlds
def test_the_logits_behind_every_prefix_are_its_row_of_the_table(world):
    np.testing.assert_array_equal(
        policies.logits(policies.table(world), world.prompts, world.tree), world.reference
    )
    model, states = policies.table(world), states_per_prompt(world.vocabulary, world.horizon)
    assert states == len(world.tree.states)
    for (p, prompt), (s, state) in itertools.product(
        enumerate(world.prompts), enumerate(world.tree.states)
    ):
        hidden = model.model(input_ids=torch.tensor([[*prompt, *state]])).last_hidden_state[0, -1]
        assert hidden.nonzero().tolist() == [[p * states + s]] and hidden.sum() == 1


def test_what_is_outside_the_tree_has_logits_of_zero():
    model = policies.table(WORLD)
    outside = [
        [1, 0],
        [1, 0, 1],
        [1, 1, 1, 1],
        [1, 2, 2, 1, 2, 2],
        [0],
        [2, 2, 0, 0],
        [2, 2, 1, 1, 1, 1],
        [2],
        [2, 1],
    ]  # the last two: parts of a prompt
    for ids in outside:
        assert model(input_ids=torch.tensor([ids])).logits[0, -1].tolist() == [0.0] * 3
    assert model(input_ids=torch.tensor([[1, 2, 2]])).logits[0].all()


def test_padding_on_the_left_changes_nothing_whatever_it_is_made_of():
    model = policies.table(WORLD)
    row = [2, 2, 1, 2]
    alone = model(input_ids=torch.tensor([row])).logits[0]
    for padding in ([0], [1, 1], [2, 2, 1]):
        n = len(padding)
        mask = torch.tensor([[0] * n + [1] * 4])
        padded = model(
            input_ids=torch.tensor([padding + row]),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits[0]
        assert torch.equal(padded[n:], alone)


def test_token_by_token_with_a_cache_is_all_at_once():
    model = policies.table(WORLD)
    ids = torch.tensor([[2, 1, 1, 2, 1, 0], [2, 2, 1, 2, 0, 1]])
    whole = model(input_ids=ids).logits
    for first in (1, 2, 3):
        out = model(input_ids=ids[:, :first], use_cache=True)
        parts = [out.logits]
        for t in range(first, 6):
            out = model(
                input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True
            )
            parts.append(out.logits)
        assert torch.equal(torch.cat(parts, 1), whole)


# ---- sampling ----


@pytest.mark.parametrize(("temperature", "tokens"), [(1.0, 65_536), (0.7, 2_000)])
def test_prompts_of_three_lengths_in_one_batch_are_answered_with_the_exact_frequencies(
    temperature, tokens
):
    policy, each = Policy(policies.table(WORLD)), 10_000
    which = [0, 1, 2] * each
    drawn = sample(
        policy,
        [WORLD.prompts[p] for p in which],
        which,
        [i // 3 for i in range(len(which))],
        seed=1,
        step=2,
        context=policy.lm.config.max_position_embeddings,
        tokens=tokens,
        max_new_tokens=3,
        stop_ids=frozenset({EOS}),
        temperature=temperature,
    )
    number = {y: i for i, y in enumerate(WORLD.responses)}
    answers = np.array([number[tuple(y)] for y in drawn.responses(ending=True)])

    assert drawn.finished.tolist() == WORLD.tree.finished[answers].tolist()
    for p in range(3):
        expected = each * np.exp(exact.logprobs(WORLD.tree, WORLD.reference / temperature))[p]
        observed = np.bincount(answers[p::3], minlength=15)
        common = expected >= 5
        if not common.all():
            expected, observed = (
                np.append(x[common], x[~common].sum()) for x in (expected, observed)
            )
        assert len(expected) > 8
        half = torch.tensor(
            [(len(expected) - 1) / 2, ((observed - expected) ** 2 / expected).sum() / 2],
            dtype=torch.float64,
        )
        assert torch.special.gammaincc(*half) > 1e-4

    again = policy(drawn.ids[:3000], drawn.mask[:3000], temperature).logprobs
    torch.testing.assert_close(drawn.logprobs[:3000], again.detach(), atol=1e-5, rtol=0)
    truth = exact.logprobs(WORLD.tree, WORLD.reference / temperature)[which, answers]
    np.testing.assert_allclose(drawn.logprobs.double().sum(1), truth, atol=1e-5)


# ---- gradients ----


@worlds
def test_the_gradient_of_j_through_the_package_is_the_exact_one(world):
    policy = Policy(policies.table(world).double())
    away = world.reference + np.random.default_rng(3).normal(size=world.reference.shape)
    with torch.no_grad():
        policy.lm.lm_head.weight.copy_(as_table(away))
    logp, ref = logprobs(policy, world), torch.from_numpy(exact.reference(world))
    j = (logp.exp() * (torch.from_numpy(world.reward) - world.beta * (logp - ref))).sum(1).mean()
    assert j.item() == pytest.approx(
        exact.objective(world, exact.logprobs(world.tree, away)), abs=EXACT
    )
    (gradient,) = torch.autograd.grad(j, policy.lm.lm_head.weight)
    np.testing.assert_allclose(gradient, as_table(exact.gradient(world, away)), atol=EXACT)


def test_12_a_baseline_of_the_prompt_leaves_the_gradient_alone_and_one_of_the_response_does_not():
    policy = Policy(policies.table(WORLD).double())
    logp = logprobs(policy, WORLD)

    def push(baseline: torch.Tensor) -> float:
        (gradient,) = torch.autograd.grad(
            (logp.exp().detach() * baseline * logp).sum(),
            policy.lm.lm_head.weight,
            retain_graph=True,
        )
        return gradient.abs().max().item()

    assert push(torch.tensor([[3.0], [-5.0], [0.7]], dtype=torch.float64)) < EXACT
    assert push(torch.from_numpy(0.5 * WORLD.reward)) > 1e-2


# ---- saved and loaded ----


def test_a_saved_table_is_loaded_as_what_it_is_by_transformers_and_by_the_package(folder):
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(again, TabularLM) and torch.equal(
            again.lm_head.weight, policies.table(WORLD).lm_head.weight
        )
        assert (
            again.config.prompts == [list(p) for p in WORLD.prompts]
            and again.config.horizon == 3
            and again.config.eos_token_id == EOS
        )
        roles = load_roles(folder, *PLAIN, policies.tokenizer(3), torch.device("cpu"))
        policy, reference = roles.policy, roles.reference
        drawn = every(WORLD)
        assert torch.equal(policy(drawn.ids, drawn.mask).logprobs, reference(drawn.ids, drawn.mask))
        before = reference(drawn.ids, drawn.mask)
        policy.lm.lm_head.weight.mul_(2)
        assert torch.equal(
            reference(drawn.ids, drawn.mask), before
        )  # the mark stays when the policy moves
        np.testing.assert_allclose(
            logprobs(policy, WORLD), exact.logprobs(WORLD.tree, 2 * WORLD.reference), atol=1e-5
        )


def test_a_process_that_has_imported_nothing_of_the_lab_loads_it(folder):
    code = (
        "import sys; from fiducial.settings import LoraSettings, RunSettings; from "
        "fiducial.models.load import load_policy, load_scorer\n"
        f"both = LoraSettings(), RunSettings(); print(type(load_policy({folder!r}, "
        "*both).lm).__name__)\n"
        f"print(type(load_scorer({folder!r}, *both, head='zero').model).__name__, 'fiducial.lab' "
        "in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == ["TabularLM", "TabularForSequenceClassification", "False"]


def test_only_the_table_is_trained(folder):
    policy, critic = load_policy(folder, *PLAIN), load_scorer(folder, *PLAIN, head="zero")
    assert {n: list(p.shape) for n, p in policy.named_parameters() if p.requires_grad} == {
        "lm.lm_head.weight": [3, 21]
    }
    assert {n: list(p.shape) for n, p in critic.named_parameters() if p.requires_grad} == {
        "model.score.weight": [1, 21]
    }


# ---- the critic ----


def test_a_critic_starts_at_zero_and_has_a_value_of_its_own_for_every_state(folder):
    critic = load_scorer(folder, *PLAIN, head="zero", tokenizer=policies.tokenizer(3))
    assert (
        isinstance(critic.model, TabularForSequenceClassification)
        and not critic.model.score.weight.any()
    )
    drawn = every(WORLD)
    assert critic(drawn.ids).abs().max() == 0
    table = single(np.random.default_rng(0).normal(size=(3, 7)))
    with torch.no_grad():
        critic.model.score.weight.copy_(torch.from_numpy(table.reshape(1, -1)))
    values = critic(drawn.ids)
    for (p, prompt), (y, response) in itertools.product(
        enumerate(WORLD.prompts), enumerate(WORLD.responses)
    ):
        row = values[p * 15 + y, len(prompt) : len(prompt) + len(response)]
        assert row.tolist() == [
            table[p, WORLD.tree.states.index(response[:t])] for t in range(len(response))
        ]
    column = (
        len(WORLD.prompts[1]) + 1
    )  # of the second token of the response 1 2 ..., so the state is that behind the token 1
    y = WORLD.responses.index((1, 2, 0))
    (gradient,) = torch.autograd.grad(values[15 + y, column], critic.model.score.weight)
    assert gradient.nonzero().tolist() == [[0, 7 + WORLD.tree.states.index((1,))]]


def test_a_critic_in_training_finds_the_exact_values_of_the_policy(folder):
    """Least squares on the return of each token, over all responses as often as they are likely:
    the conditional mean in each state.
    """
    critic = load_scorer(folder, *PLAIN, head="zero").double()
    drawn = every(WORLD)
    returns = torch.zeros(drawn.ids.shape, dtype=torch.float64) + torch.from_numpy(
        WORLD.reward.reshape(-1, 1)
    )
    likely = torch.from_numpy(np.exp(exact.reference(WORLD)).reshape(-1, 1)) * drawn.mask
    optimizer = torch.optim.LBFGS(
        critic.parameters(),
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (likely * (critic(drawn.ids) - returns) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = critic.model.score.weight.detach().view(3, 7)
    np.testing.assert_allclose(
        found, exact.values(WORLD, WORLD.reference)[0], atol=1e-6
    )  # at the reference no log-ratio costs anything


def test_a_saved_critic_is_read_back_with_its_values(folder, tmp_path):
    critic = load_scorer(folder, *PLAIN, head="normal", seed=4)
    critic.model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(again, TabularForSequenceClassification) and again.config.num_labels == 1
    assert (
        torch.equal(again.score.weight, critic.model.score.weight)
        and critic.model.score.weight.all()
    )


# ---- two responses in one row ----


def test_a_table_walks_one_response_at_a_time_and_pairs_get_two_rows(folder):
    policy = load_policy(folder, *PLAIN)
    assert not policy.supports_shared_prefix

    def row(p: int, y: int) -> Rendered:
        prompt, response = WORLD.prompts[p], WORLD.responses[y]
        return Rendered([*prompt, *response], [False] * len(prompt) + [True] * len(response), "")

    picked = [
        (p, i, j) for p, (i, j) in itertools.product(range(3), itertools.combinations(range(15), 2))
    ]
    chosen, rejected = pair_logprobs(
        policy, [Pair(row(p, i), row(p, j)) for p, i, j in picked], torch.device("cpu")
    )
    p, i, j = np.array(picked).T
    np.testing.assert_allclose(chosen.detach(), exact.reference(WORLD)[p, i], atol=1e-5)
    np.testing.assert_allclose(rejected.detach(), exact.reference(WORLD)[p, j], atol=1e-5)


# ---- the methods ----

EVEN = random_world(((1,), (2,)), seed=5)  # prompts of one length, so that one limit fits all rows
QUICK = RunSettings(eval_every=0, checkpoint_every=0, samples=2)
ROWS = RowSettings(max_length=1 + EVEN.horizon, held_out=0.0)


def steps_of(run) -> list[dict[str, float]]:
    return [
        line
        for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
        if "num_tokens" in line
    ]


@torch.no_grad()
def end_of(run) -> np.ndarray:
    """[P, Y] of the model that a run has saved, which is the one that it has returned."""
    saved = policies.load(run.path / "model")
    assert isinstance(saved, TabularLM) and torch.equal(
        saved.lm_head.weight, run.model.lm.lm_head.weight
    )
    return exact.logprobs(EVEN.tree, policies.logits(saved, EVEN.prompts, EVEN.tree))


@pytest.fixture(scope="module")
def even(tmp_path_factory) -> str:
    return str(policies.save(policies.table(EVEN), tmp_path_factory.mktemp("even")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Every two responses, four labels each, as often for either as Bradley-Terry annotators would
    give them, to the nearest quarter.
    """
    rows = []
    for p, (i, j) in itertools.product(range(2), itertools.combinations(range(15), 2)):
        first = int(QUARTERS[p, i, j])
        for winner, loser in [(i, j)] * first + [(j, i)] * (4 - first):
            rows.append(
                {
                    "prompt": EVEN.prompt_text(p),
                    "chosen": EVEN.response_text(winner),
                    "rejected": EVEN.response_text(loser),
                }
            )
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


QUARTERS = np.triu((4 * bradley_terry(EVEN.reward)).round(), 1)
LABELS = (QUARTERS + np.triu(4 - QUARTERS, 1).swapaxes(1, 2)) / 4


def run_dpo(even: str, pairs: str, out, steps: int, rate: float = 0.05):
    optimizer = OptimizerSettings(schedule="constant", max_grad_norm=1e9)
    return fd.dpo(
        fd.DPO(
            model=even,
            data=pairs,
            out=str(out),
            steps=steps,
            batch_size=840,
            learning_rate=rate,
            beta=EVEN.beta,
            rows=ROWS,
            optimizer=optimizer,
            run=QUICK,
        )
    )


def test_dpo_reports_the_exact_population_loss_of_the_policy_it_has_at_each_step(
    even, pairs, tmp_path
):
    one, two = (run_dpo(even, pairs, tmp_path / str(steps), steps) for steps in (1, 2))
    losses = [line["loss"] for line in steps_of(two)]
    assert (
        losses[0]
        == pytest.approx(exact.dpo_loss(EVEN, exact.reference(EVEN), LABELS), abs=1e-6)
        == pytest.approx(np.log(2), abs=1e-6)
    )
    assert losses[1] == pytest.approx(exact.dpo_loss(EVEN, end_of(one), LABELS), abs=1e-5)
    assert exact.dpo_loss(EVEN, end_of(two), LABELS) < losses[1] < losses[0] - 1e-3


def test_dpo_on_a_table_ends_at_the_least_loss_there_is(even, pairs, tmp_path):
    end = end_of(run_dpo(even, pairs, tmp_path / "run", 40, rate=0.1))
    assert exact.dpo_loss(EVEN, end, LABELS) < exact.dpo_loss(
        EVEN, exact.optimum(EVEN)[0], LABELS
    )  # labels in quarters: it is not quite theirs
    assert exact.gap(EVEN, end).relative < 0.05


REWARD = """
from pathlib import Path
from fiducial.lab.worlds.world import World

def gold(prompts, completions):
    return World.load(Path(__file__).with_name("world.npz")).scores(prompts, completions)
"""


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory) -> dict[str, object]:
    path = tmp_path_factory.mktemp("reward")
    (path / "reward.py").write_text(REWARD)
    EVEN.save(path / "world.npz")
    data = write_jsonl(path / "prompts.jsonl", [{"prompt": EVEN.prompt_text(p)} for p in range(2)])
    return {"data": data, "reward": (f"{path / 'reward.py'}:gold",)}


def run_ppo(even: str, rewarded, out, **changes):
    common = {
        "batch_size": 64,
        "learning_rate": 0.05,
        "max_new_tokens": 3,
        "beta": EVEN.beta,
        "rows": ROWS,
        "run": QUICK,
    }
    return fd.ppo(fd.PPO(model=even, out=str(out), **(common | rewarded | changes)))


@pytest.mark.parametrize("start", ["policy", "shared"])
def test_ppo_samples_scores_and_moves_a_table(even, rewarded, tmp_path, start):
    run = run_ppo(even, rewarded, tmp_path / "run", steps=2, critic={"start": start})
    first, second = steps_of(run)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-6) and second["objective/kl"] != 0
    assert (
        first["ratio/first"] == pytest.approx(1, abs=1e-6)
        and max(first["sampler_gap"], second["sampler_gap"]) < 1e-5
    )
    drawn, deviation = np.exp(exact.reference(EVEN)), EVEN.reward.std()
    assert first["reward"] == pytest.approx(
        (drawn * EVEN.reward).sum(1).mean(), abs=4 * deviation / 8
    )
    assert exact.total_variation(end_of(run), exact.reference(EVEN)) > 0.01
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert samples and all(
        s["score"] == EVEN.scores([s["prompt"]], [s["completion"]])[0] for s in samples
    )


def test_ppo_on_a_table_closes_most_of_the_gap(even, rewarded, tmp_path):
    run = run_ppo(
        even,
        rewarded,
        tmp_path / "run",
        steps=40,
        batch_size=128,
        critic={"learning_rate": 0.2, "coefficient": 1.0, "clip": None},
    )
    assert exact.gap(EVEN, end_of(run)).relative < 0.15


def test_the_configuration_says_how_large_the_table_is():
    config = TabularConfig(vocab_size=4, prompts=[(1, 2), (3,)], horizon=3)
    assert (config.hidden_size, config.max_position_embeddings, states_per_prompt(4, 3)) == (
        2 * 13,
        5,
        13,
    )
    assert TabularLM(config).lm_head.weight.shape == (4, 26) and config.eos_token_id == EOS
