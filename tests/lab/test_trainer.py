"""A trainer is told where it ended: at the optimum, at the optimum of a wrong objective, or nowhere
yet.
"""

import itertools
import json

import numpy as np
import pytest
import torch

from fiducial.lab.kit.trainer import arrival, check_trainer, places
from fiducial.lab.worlds import exact, policies
from fiducial.lab.worlds.world import World
from fiducial.methods.dpo import DPO, dpo
from fiducial.settings import OptimizerSettings, RowSettings, RunSettings
from world import difference

WORLD = policies.mild(0)[0]


def ascend(world: World, objective, steps: int = 2000) -> np.ndarray:
    """[P, Y] log-probabilities of the table that makes `objective(logp)` largest: gradient ascent
    through torch, from the reference.
    """
    table = torch.tensor(world.reference, requires_grad=True)
    path, token = torch.tensor(world.tree.path), torch.tensor(world.tree.token)

    def logprobs() -> torch.Tensor:
        return torch.where(path >= 0, table.log_softmax(-1)[:, path, token], 0.0).sum(-1)

    optimizer = torch.optim.Adam([table], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        (-objective(logprobs())).backward()
        optimizer.step()
    return logprobs().detach().numpy()


REWARD, REF, BETA = torch.tensor(WORLD.reward), torch.tensor(exact.reference(WORLD)), WORLD.beta
OBJECTIVES = {
    "correct": lambda lp: (lp.exp() * (REWARD - BETA * (lp - REF))).sum(),
    "reward has the wrong sign": lambda lp: (lp.exp() * (-REWARD - BETA * (lp - REF))).sum(),
    "no KL penalty": lambda lp: (lp.exp() * REWARD).sum(),
    "beta halved": lambda lp: (lp.exp() * (REWARD - BETA / 2 * (lp - REF))).sum(),
    "beta doubled": lambda lp: (lp.exp() * (REWARD - BETA * 2 * (lp - REF))).sum(),
    "no reference": lambda lp: (lp.exp() * (REWARD - BETA * lp)).sum(),
    "forward KL": lambda lp: (lp.exp() * REWARD).sum() - BETA * (REF.exp() * (REF - lp)).sum(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_policy_trained_on_a_wrong_objective_is_told_which(name):
    found = arrival(WORLD, ascend(WORLD, OBJECTIVES[name]))
    assert found.name == name
    assert found.ok == (name == "correct")
    at_rest = {"correct": found.total_variation, **found.distances}[name]
    assert at_rest < (
        0.02 if name == "no KL penalty" else 1e-3
    )  # of that objective's own optimum, which is known exactly
    assert found.name in str(found) and f"{100 * found.relative_gap:.3g}%" in str(found)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.2, 3.0])
def test_a_beta_that_is_off_is_measured(factor):
    def objective(lp):
        return (lp.exp() * (REWARD - factor * BETA * (lp - REF))).sum()

    found = arrival(WORLD, ascend(WORLD, objective, steps=600))
    assert not found.ok
    assert found.name == ("wrong beta" if factor < 1 else "wrong beta or unfinished")
    assert found.beta == pytest.approx(factor, rel=0.01)
    assert f"{found.beta:.3g} times the beta" in found.sentence


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_a_beta_that_is_off_by_less_than_the_noise_of_sampling_is_not_held_against_a_trainer(
    factor,
):
    place = exact.optimum(WORLD, beta=factor * BETA)[0]
    found = arrival(WORLD, place)
    assert found.ok and found.beta == pytest.approx(factor)


def test_noise_of_all_directions_is_not_taken_for_a_beta():
    rng, best = np.random.default_rng(0), exact.optimum(WORLD)[0]
    for size in (0.05, 0.1, 0.2):
        for _ in range(20):
            logp = best + size * rng.normal(size=best.shape)
            logp -= np.logaddexp.reduce(logp, axis=1, keepdims=True)
            assert arrival(WORLD, logp).name == "correct"


def test_the_reference_is_not_trained_and_half_way_is_unfinished():
    assert arrival(WORLD, exact.reference(WORLD)).name == "not trained"
    half = ascend(WORLD, OBJECTIVES["correct"], steps=12)
    found = arrival(WORLD, half)
    assert not found.ok and found.name == "unfinished" and "Train longer" in found.sentence


def test_every_place_is_a_distribution_and_they_lie_apart():
    found = places(WORLD)
    for logp in found.values():
        np.testing.assert_allclose(np.exp(logp).sum(1), 1.0, atol=1e-12)
    assert (
        min(exact.total_variation(a, b) for a, b in itertools.combinations(found.values(), 2)) > 0.1
    )


def test_the_optimum_under_the_forward_kl_is_stationary():
    logits = exact.logits_of(WORLD.tree, places(WORLD)["forward KL"])

    def objective(x: np.ndarray) -> float:
        logp = exact.logprobs(WORLD.tree, x)
        return float(
            (np.exp(logp) * WORLD.reward).sum()
            - WORLD.beta * (np.exp(REF.numpy()) * (REF.numpy() - logp)).sum()
        )

    assert np.abs(difference(objective, logits)).max() < 1e-7
    assert np.abs(difference(objective, WORLD.reference)).max() > 1e-2


def settings(folder, out, **changes) -> DPO:
    beta = World.load(folder / "world.npz").beta
    return DPO(
        **{
            "model": str(folder / "table"),
            "data": str(folder / "pairs.jsonl"),
            "out": str(out),
            "beta": beta,
            "steps": 500,
            "batch_size": 256,
            "learning_rate": 0.1,
            "rows": RowSettings(max_length=4, held_out=0.0),
            "optimizer": OptimizerSettings(schedule="linear"),
            "run": RunSettings(checkpoint_every=0, samples=0),
            **changes,
        }
    )


def test_the_shipped_dpo_passes_as_a_folder_and_as_a_model(tmp_path):
    runs = []

    def train(folder):
        runs.append(dpo(settings(folder, tmp_path / "run")))
        return runs[0].path / "model"

    found = check_trainer(train, copies=50)
    assert found.ok and found.name == "correct" and found.relative_gap < 0.05
    assert check_trainer(lambda folder: runs[0].model.lm, copies=50) == found


@pytest.mark.parametrize(
    ("fault", "name"),
    [("exchanged", "reward has the wrong sign"), ("beta", "wrong beta or unfinished")],
)
def test_a_trainer_with_a_planted_fault_is_told_which(tmp_path, fault, name):
    def train(folder):
        if fault == "beta":
            return dpo(settings(folder, tmp_path / "run", beta=1.2 * BETA)).path / "model"
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        (folder / "wrong.jsonl").write_text(
            "".join(
                json.dumps(r | {"chosen": r["rejected"], "rejected": r["chosen"]}) + "\n"
                for r in rows
            )
        )
        return (
            dpo(settings(folder, tmp_path / "run", data=str(folder / "wrong.jsonl"))).path / "model"
        )

    found = check_trainer(train, folder=tmp_path, copies=50)
    assert not found.ok and found.name == name
    if fault == "beta":
        assert found.beta == pytest.approx(1.2, rel=0.05) and found.relative_gap < 0.05
