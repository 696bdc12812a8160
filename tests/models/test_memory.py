"""What a rehearsal without numbers counts, against what PyTorch's allocator hands out when the same
step is computed with numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fiducial.errors import InputError
from fiducial.models.load import SHARED, load_frozen, load_policy, load_scorer
from fiducial.models.memory import Models, Plan, Sampling, Shape, Work
from fiducial.models.rehearsal import Rehearsal
from fiducial.settings import LoraSettings, RunSettings
from support import ARCHITECTURES, sample
from tiny_models import tiny_model

CPU = torch.device("cpu")
SHAPE = Shape(6, 40, 20)


def handed_out(compute: Callable[[], object]) -> int:
    """The most bytes at a time that the allocator hands out while something is computed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        compute()
    total = most = 0
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def batch(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros((shape.rows, shape.width), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, -shape.labels :] = True
    return ids, mask


def work(first: Shape = SHAPE, later: Shape | None = None, **changes: object) -> Work:
    usual: dict[str, object] = {"tokens": 256, "probe": 8, "once": True}
    return Work(first=first, later=later, **(usual | changes))  # type: ignore[arg-type]


def plan(models: Models | str, what: Work, *, r: int = 0, run: RunSettings | None = None) -> Plan:
    models = Models(models) if isinstance(models, str) else models
    return Rehearsal(models, LoraSettings(r=r), run or RunSettings(), CPU).plan(what, 0)


def beyond_weights(planned: Plan, phase: str = "training") -> int:
    uses = planned.phases[phase]
    return sum(size for use, size in uses.items() if not use.startswith(("weights", "optimizer")))


SETTINGS = {
    "all weights": {},
    "adapters": {"r": 4},
    "checkpointing": {"run": RunSettings(gradient_checkpointing=True)},
    "bfloat16": {"run": RunSettings(precision="bfloat16")},
}


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_step_of_a_policy_is_counted_as_the_allocator_counts_it(models, kind, how):
    settings = SETTINGS[how]
    planned = plan(models[kind], work(), **settings)
    lora, run = LoraSettings(r=settings.get("r", 0)), settings.get("run", RunSettings())
    policy = load_policy(models[kind], lora, run)

    def step() -> None:
        ids, mask = batch(SHAPE)
        policy(ids, mask).logprobs.sum().backward()

    # kernels in bfloat16 widen some of their operands within themselves
    tolerance = 0.1 if how == "bfloat16" else 0.03
    assert beyond_weights(planned) == pytest.approx(handed_out(step), rel=tolerance)


def test_gradients_that_are_there_already_are_counted_once_more(models):
    policy = load_policy(models["llama"], LoraSettings(), RunSettings())

    def step() -> None:
        for _ in range(2):
            ids, mask = batch(SHAPE)
            policy(ids, mask).logprobs.sum().backward()

    both = plan(models["llama"], work(later=SHAPE))
    assert beyond_weights(both) == pytest.approx(handed_out(step), rel=0.01)
    assert beyond_weights(both) > beyond_weights(plan(models["llama"], work()))


def test_policy_and_critic_hold_their_activations_together(models):
    policy = load_policy(models["qwen3"], LoraSettings(), RunSettings())
    critic = load_scorer(models["llama"], LoraSettings(), RunSettings(), head="zero")

    def step() -> None:
        ids, mask = batch(SHAPE)
        now = policy(ids, mask)
        (now.logprobs.sum() + critic(ids).sum()).backward()

    planned = plan(Models(models["qwen3"], critic=models["llama"]), work())
    assert beyond_weights(planned) == pytest.approx(handed_out(step), rel=0.01)


def test_a_step_of_a_scorer_and_one_with_a_teacher(models):
    scorer = load_scorer(models["llama"], LoraSettings(), RunSettings(), head="zero")
    ids, mask = batch(SHAPE)
    lengths = torch.full((SHAPE.rows,), SHAPE.width)
    scored = plan(Models(models["llama"], scored=True), work())
    real = handed_out(lambda: scorer(ids, lengths).sum().backward())
    assert beyond_weights(scored) == pytest.approx(real, rel=0.02)

    policy = load_policy(models["llama"], LoraSettings(), RunSettings())
    teacher = load_frozen(models["llama"], RunSettings())
    taught = plan(Models(models["llama"], teacher=models["llama"]), work())
    real = handed_out(lambda: policy(ids, mask, teacher=teacher).kl.sum().backward())
    assert beyond_weights(taught) == pytest.approx(real, rel=0.02)


def test_sampling_holds_a_cache_as_long_as_prompt_and_response(models):
    policy = load_policy(models["llama"], LoraSettings(), RunSettings())
    rows, width, new = 8, 4, 100
    asked = Sampling(rows, rows, width, new)
    planned = plan(models["llama"], work(sampling=asked)).phases["sampling"]
    # 2 layers, keys and values, 2 heads of 8 numbers in float32, and one layer's while it grows
    cache = rows * (width + new - 1) * 2 * 2 * 2 * 8 * 4
    assert cache <= planned["cache of sampling"] <= 1.6 * cache
    prompts = [[i + 1] * width for i in range(rows)]
    real = handed_out(lambda: sample(policy, prompts, max_new_tokens=new))
    assert sum(planned.values()) - planned["weights of the policy"] == pytest.approx(real, rel=0.1)


def test_what_is_held_by_role(models):
    numbers = sum(
        p.numel() for p in load_policy(models["llama"], LoraSettings(), RunSettings()).parameters()
    )
    everything = Models(models["llama"], reference=True, critic=SHARED)
    held = plan(everything, work(once=False)).phases["training"]
    assert held["weights of the policy"] == held["weights of the reference"]
    assert held["weights of the policy"] == pytest.approx(4 * numbers, rel=0.001)
    assert held["optimizer state"] == 2 * (4 * numbers + held["weights of the critic"])
    adapters = plan(Models(models["llama"], reference=True), work(once=False), r=4)
    assert "weights of the reference" not in adapters.phases["training"]  # the base is
    assert adapters.peak < plan(models["llama"], work(once=False)).peak


def test_more_rows_take_proportionally_more_and_checkpointing_takes_less(models):
    one, two, four = (
        plan(models["llama"], work(Shape(n, 40, 20))).phases["training"]["activations"]
        for n in (8, 16, 32)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    run = RunSettings(gradient_checkpointing=True)
    less = plan(models["llama"], work(Shape(32, 40, 20)), run=run).phases["training"]
    assert less["activations"] < 0.7 * four


def test_a_model_that_cannot_be_computed_without_numbers_is_told(tmp_path: Path):
    folder = tiny_model("mixtral", tmp_path, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"give --run.tokens a number"):
        plan(folder, work())


def test_the_table_names_every_part_in_words(models):
    lines = "\n".join(plan(models["llama"], work(later=SHAPE, once=False)).lines())
    for part in ("weights of the policy", "gradients", "optimizer state", "activations"):
        assert part in lines
    assert "--run.tokens 256" in lines and "by phase: training" in lines
