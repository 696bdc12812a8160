"""A world as files: what the commands and a user's own trainer need to run on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedModel

from . import policies
from .world import Array, World, bradley_terry

REWARD = '''"""Rewards of this world: `fiducial ppo --reward reward.py:gold` or `:proxy`."""

from pathlib import Path

from fiducial.lab.worlds.world import World

world = World.load(Path(__file__).with_name("world.npz"))


def gold(prompts, completions):
    """The true reward of each response."""
    return world.scores(prompts, completions)


def proxy(prompts, completions):
    """The reward that a learned reward model would give, with its errors."""
    return world.scores(prompts, completions, "proxy")
'''


def write_world(
    world: World,
    model: PreTrainedModel,
    folder: Path,
    *,
    preference: Array | None = None,
    copies: int = 100,
) -> Path:
    """Write two policies (`transformer/`, `table/`), `prompts.jsonl`, `pairs.jsonl`, `reward.py`
    and `world.npz`. Returns `folder`.

    Args:
        model: the transformer whose logits are the world's reference.
        preference: [P, Y, Y] the annotators' probabilities; default: Bradley-Terry with the true
            rewards.
        copies: number of comparisons per pair of responses. Each outcome is written in proportion
            to its probability, rounded to whole numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world.save(folder / "world.npz")
    policies.save(model, folder / "transformer")
    policies.save(policies.table(world), folder / "table")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    write_rows(
        folder / "prompts.jsonl",
        ({"prompt": world.prompt_text(p)} for p in range(len(world.prompts))),
    )
    if preference is None:
        preference = bradley_terry(world.reward)
    write_rows(folder / "pairs.jsonl", comparisons(world, preference, copies))
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, object]] | Iterable[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def comparisons(world: World, preference: Array, copies: int) -> Iterator[dict[str, str]]:
    """Preference rows: every pair of responses to a prompt, `copies` times, each outcome in
    proportion to its probability.

    Raises:
        ValueError: the prompts differ in length. Only the common length limit of the rows tells a
            truncated response from a finished one.
    """
    if len({len(p) for p in world.prompts}) > 1:
        raise ValueError(
            "all prompts must have the same length: --rows.max-length decides whether a response "
            "was truncated or ended"
        )
    texts = [world.response_text(y) for y in range(len(world.responses))]
    for p in range(len(world.prompts)):
        prompt = world.prompt_text(p)
        # The optimum depends on each response's total number of wins, so the rounding error of one
        # comparison is carried over to the next.
        owed = [0.0] * len(world.responses)
        for i in reversed(range(len(world.responses))):
            over = 0.0
            for j in reversed(range(i)):
                exact_wins = copies * float(preference[p, i, j])
                wanted = exact_wins + owed[i] / i + over
                wins = min(copies, max(0, round(wanted)))
                over, owed[j] = wanted - wins, owed[j] + wins - exact_wins
                a, b = texts[i], texts[j]
                yield from [{"prompt": prompt, "chosen": a, "rejected": b}] * wins
                yield from [{"prompt": prompt, "chosen": b, "rejected": a}] * (copies - wins)
