"""REINFORCE with each baseline and GRPO with each variant, as shipped, on the mild world; GRPO's
own optimum; and credit, token by token, by enumeration.
"""

from pathlib import Path

import numpy as np
import pytest

from fiducial.lab.runs.measured import responses, run
from fiducial.lab.runs.plan import METHODS, Plan
from fiducial.lab.runs.process_reward import teach_steps
from fiducial.lab.study.credit import compared, decisive, exact_advantages, of_methods, worked
from fiducial.lab.worlds import exact, policies
from fiducial.lab.worlds.files import write_world
from fiducial.lab.worlds.world import World

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The files of the mild world of each seed, as a user of the commands has them."""
    out = {}
    for seed in SEEDS:
        world, model = policies.mild(seed)
        out[seed] = write_world(world, model, tmp_path_factory.mktemp(f"mild-{seed}"), copies=0)
    return out


def gap_of(
    folders: dict[int, Path], out: Path, method: str, seed: int = 0, **settings: object
) -> float:
    plan = Plan(method, "table", 0.05, 150, seed=seed, points=0, settings=settings)
    return run(plan, folders[seed], out / "run").result.relative_gap


@pytest.mark.parametrize(
    ("method", "seed"),
    [(m, 0) for m in METHODS if m not in ("dpo", "ppo", "rloo", "grpo")]
    + [("rloo", s) for s in SEEDS],
)
def test_every_method_closes_all_but_a_fiftieth_of_the_gap(folders, tmp_path, method, seed):
    assert gap_of(folders, tmp_path, method, seed) < 0.02


def test_grpo_as_its_paper_has_it_stops_at_another_optimum_and_arrives_when_its_parts_are_exchanged(
    folders, tmp_path
):
    assert gap_of(folders, tmp_path / "paper", "grpo") > 0.05
    assert (
        gap_of(
            folders,
            tmp_path / "exchanged",
            "grpo",
            advantage="rloo",
            loss_aggregation="constant",
            kl={"estimator": "k2"},
        )
        < 0.01
    )
    assert (
        gap_of(folders, tmp_path / "reward", "grpo", kl={"estimator": "k1"}) < 0.01
    )  # both divisions stay


def test_greedy_responses_and_groups_that_were_passed_over_are_counted(tmp_path):
    lines = (
        '{"step": 1, "reward": 0, "groups/sampled": 40}\n'
        '{"step": 2, "reward": 0, "groups/sampled": 32}\n'
        '{"eval/loss": 1}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert responses(Plan("dapo", "table", 0.1, 2), tmp_path) == [0, 320, 576]  # groups of 8
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0}\n{"step": 2, "reward": 0}\n')
    assert responses(Plan("rloo", "table", 0.1, 2), tmp_path) == [0, 256, 512]
    assert responses(Plan("remax", "table", 0.1, 2), tmp_path) == [
        0,
        320,
        640,
    ]  # a greedy one for each group of 4


# ---- credit ----


@pytest.fixture(scope="module")
def small() -> tuple[World, np.ndarray]:
    """15 responses to each of 2 prompts, and a policy that is not the reference."""
    world, _ = policies.make("small", seed=3)
    return world, world.reference + np.random.default_rng(5).normal(size=world.reference.shape)


def returns_from(world: World, logits: np.ndarray, p: int, y: int) -> list[float]:
    """What is earned from each token of a response on, by hand."""
    lp, lr = exact.log_softmax(logits), exact.log_softmax(world.reference)
    each = []
    for s, v in zip(world.tree.path[y], world.tree.token[y], strict=True):
        if s >= 0:
            each.append(-world.beta * (lp[p, s, v] - lr[p, s, v]))
    each[-1] += world.reward[p, y]
    return [sum(each[t:]) for t in range(len(each))]


def test_the_exact_advantage_of_a_token_is_what_saying_it_changes(small):
    world, logits = small
    lp = exact.logprobs(world.tree, logits)
    found = exact_advantages(world, logits)
    for p in range(2):
        for y, response in enumerate(world.responses):
            for t in range(len(response)):

                def mean(prefix: tuple[int, ...], t: int = t, p: int = p) -> float:
                    """E of the return from token t on, over all responses that begin so."""
                    those = [k for k, r in enumerate(world.responses) if r[: len(prefix)] == prefix]
                    weight = np.exp(lp[p, those])
                    return float(
                        weight
                        @ [returns_from(world, logits, p, k)[t] for k in those]
                        / weight.sum()
                    )

                assert found[p, y, t] == pytest.approx(
                    mean(response[: t + 1]) - mean(response[:t]), abs=1e-12
                )
            assert not found[p, y, len(response) :].any()


def test_what_methods_credit_is_their_formula(small):
    world, logits = small
    value, _ = exact.values(world, logits)
    judge = np.random.default_rng(1).uniform(size=value.shape)
    found = of_methods(world, logits, np.zeros_like(value), judge)
    likely = np.exp(exact.logprobs(world.tree, logits))
    for p in range(2):
        wholes = np.array([returns_from(world, logits, p, y)[0] for y in range(15)])
        for y, response in enumerate(world.responses):
            n, to_go = len(response), returns_from(world, logits, p, y)
            np.testing.assert_allclose(found["reinforce_none"][p, y, :n], wholes[y], atol=1e-12)
            np.testing.assert_allclose(
                found["rloo"][p, y, :n], wholes[y] - likely[p] @ wholes, atol=1e-12
            )
            states = world.tree.path[y, :n]
            score = [0.0, *judge[p, states[1:]], 0.5]  # nothing said, after each token, the whole
            np.testing.assert_allclose(found["step"][p, y, :n], np.diff(score), atol=1e-12)
            # GAE with a critic of 0 is the return with a discount of lambda
            each = np.diff([*to_go, 0.0]) * -1
            np.testing.assert_allclose(
                found["ppo"][p, y, :n],
                [sum(0.95 ** (k - t) * each[k] for k in range(t, n)) for t in range(n)],
                atol=1e-12,
            )
            perfect = [
                sum(
                    0.95 ** (k - t)
                    * (
                        each[k]
                        + (value[p, states[k + 1]] if k + 1 < n else 0.0)
                        - value[p, states[k]]
                    )
                    for k in range(t, n)
                )
                for t in range(n)
            ]
            np.testing.assert_allclose(found["perfect"][p, y, :n], perfect, atol=1e-12)


def test_numbers_over_all_tokens_are_those_of_a_long_list(small):
    world, logits = small
    found = of_methods(world, logits, np.zeros(world.reference.shape[:2]))
    numbers, true = (
        compared(world, logits, {**found, "exact": exact_advantages(world, logits)}),
        exact_advantages(world, logits),
    )
    likely = np.exp(exact.logprobs(world.tree, logits))
    rows = [
        (likely[p, y], found["rloo"][p, y, t], true[p, y, t])
        for p in range(2)
        for y, r in enumerate(world.responses)
        for t in range(len(r))
    ]
    w, a, b = np.array(rows).T
    cov = np.cov(a, b, aweights=w, ddof=0)
    assert numbers["rloo"]["correlation"] == pytest.approx(
        cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])
    )
    size = np.average(b**2, weights=w)
    assert numbers["rloo"]["relative_error"] == pytest.approx(
        np.sqrt(np.average((a - b) ** 2, weights=w) / size)
    )
    assert numbers["rloo"]["variance"] == pytest.approx(cov[0, 0] / size)
    assert numbers["exact"] == pytest.approx(
        {"correlation": 1.0, "relative_error": 0.0, "variance": 1.0}
    )
    assert 0 < numbers["rloo"]["correlation"] < 1


def test_a_worked_pair_differs_by_the_one_letter_that_decides():
    world, _ = policies.long(0)
    for logits in (world.reference, exact.logits_of(world.tree, exact.optimum(world)[0])):
        p, right, wrong = worked(world, logits)
        a, b = world.responses[right], world.responses[wrong]
        apart = [t for t in range(len(a)) if a[t] != b[t]]
        assert (
            len(a) == len(b)
            and len(apart) == 1
            and apart[0] in decisive(world, p)
            and len(decisive(world, p)) == 5
        )
        assert (world.reward[p, right], world.reward[p, wrong]) == (1.0, 0.0)


def test_the_judge_of_steps_learns_the_chance_that_the_reference_ends_right(tmp_path):
    from transformers import AutoModelForSequenceClassification

    world, model = policies.long(0)
    folder = write_world(world, model, tmp_path / "world", copies=0)
    where = teach_steps(world, folder / "table", tmp_path / "prm", 0)
    score = (
        AutoModelForSequenceClassification.from_pretrained(where)
        .score.weight.detach()
        .double()
        .sigmoid()
        .numpy()
        .reshape(2, -1)
    )
    value, _ = exact.values(world, world.reference, beta=0.0)
    seen = exact.visits(world.tree, world.reference)
    seen[:, 0] = 0.0  # before the first token there is no step
    error = np.sqrt((seen * (score - value) ** 2).sum() / seen.sum())
    spread = np.sqrt((seen * (value - (seen * value).sum() / seen.sum()) ** 2).sum() / seen.sum())
    assert error < spread / 2
    assert len((tmp_path / "prm" / "outcomes.jsonl").read_text().splitlines()) == 2000
