"""Alarms: what in a run's history asks for attention, one sentence each, with the number and the
remedy.

Rules of thumb say "heuristic". An alarm is a function of the history that returns a sentence or
None.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

from ..metrics import finite, known

_FEW = 5
"""With fewer points than this, a trend is not judged."""


class _History:
    """The rows of metrics.jsonl as columns of finite values."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self.rows = list(rows)

    def points(self, name: str) -> list[tuple[int, float]]:
        rows = ((row.get("step", i), row.get(name)) for i, row in enumerate(self.rows))
        return [(int(step), float(value)) for step, value in rows if finite(step) and finite(value)]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.points(name)]

    def start(self, name: str) -> float | None:
        """Mean of the first tenth; None if there are too few points to judge."""
        values = self.values(name)
        return fmean(values[: max(1, len(values) // 10)]) if len(values) >= _FEW else None

    def late(self, name: str) -> list[float]:
        """The last quarter; empty if there are too few points to judge."""
        values = self.values(name)
        return values[-max(3, len(values) // 4) :] if len(values) >= _FEW else []


def _clearly_negative(values: list[float]) -> bool:
    return fmean(values) + 2 * stdev(values) / math.sqrt(len(values)) < 0


def _not_finite(history: _History) -> str | None:
    for i, row in enumerate(history.rows):
        bad = [
            name
            for name, value in row.items()
            if known(name) and isinstance(value, float) and not math.isfinite(value)
        ]
        if bad:
            return (
                f"{bad[0]} is not finite at step {row.get('step', i)}: lower the learning rate and "
                "look at the rows of that step."
            )
    return None


def _negative_kl(history: _History) -> str | None:
    for name, unit in (("objective/kl", "nats per response"), ("kl", "nats per token")):
        late = history.late(name)
        if late and _clearly_negative(late) and sum(v < 0 for v in late) >= 0.75 * len(late):
            return (
                f"The KL to the reference stays below 0 ({fmean(late):.3g} {unit} over the last "
                f"{len(late)} records), which cannot be true on average: turn off top-k, top-p and "
                "minimum length in sampling, and check that the temperature divides the logits "
                "everywhere."
            )
    return None


def _first_ratio(history: _History) -> str | None:
    worst = max(history.points("ratio/first"), key=lambda point: abs(point[1] - 1), default=None)
    if worst and abs(worst[1] - 1) > 1e-3:
        return (
            f"The probability ratio before the first update was {worst[1]:.4g} at step {worst[0]}, "
            "but it must be 1: turn dropout off, use one temperature everywhere, and compute "
            "log-probabilities in float32."
        )
    return None


def _sampler_gap(history: _History) -> str | None:
    worst = max(history.points("sampler_gap"), key=lambda point: point[1], default=None)
    if worst and worst[1] > 0.02:
        return (
            f"The log-probabilities of sampler and trainer differ by up to {worst[1]:.3g} nats at "
            f"step {worst[0]} (heuristic: below 0.02): sync the weights after every step, and use "
            "one temperature and one precision."
        )
    return None


def _critic(history: _History) -> str | None:
    late = history.late("explained_variance")
    if late and fmean(late) < 0:
        return (
            "Late in the run the critic explains less than a constant would (explained variance "
            f"{fmean(late):.3g}; heuristic: above 0.3): raise its learning rate, warm it up, or "
            "use a sequence-level baseline."
        )
    return None


def _update_kl(history: _History) -> str | None:
    late = history.late("approx_kl")
    if late and fmean(late) > 0.02:
        return (
            f"The updates on one batch move the policy by {fmean(late):.3g} nats per token "
            "(heuristic: below 0.02): lower the learning rate, or use fewer epochs per batch."
        )
    return None


def _clipping(history: _History) -> str | None:
    late = history.late("clip_ratio")
    if late and fmean(late) > 0.1:
        return (
            f"{100 * fmean(late):.3g}% of tokens are clipped late in the run (heuristic: 1 to "
            "10%): lower the learning rate, or use fewer epochs per batch."
        )
    epochs = history.values("epochs_done")
    # with one pass over the batch the ratio is 1 and nothing can be clipped
    if late and fmean(late) < 0.001 and epochs and fmean(epochs) > 1:
        return (
            f"Only {100 * fmean(late):.2g}% of tokens are clipped although every batch is used for "
            "several epochs (heuristic: 1 to 10%): the steps are too small, and a higher learning "
            "rate may be safe."
        )
    return None


def _no_spread(history: _History) -> str | None:
    late = history.late("groups/no_spread")
    if late and fmean(late) > 0.5:
        return (
            f"Late in the run all responses get the same score in {100 * fmean(late):.3g}% of the "
            "groups (heuristic: below one half), and such groups teach nothing: use prompts of "
            "medium difficulty, larger groups or a finer reward, or sample other prompts in their "
            "place."
        )
    return None


def _unfinished(history: _History) -> str | None:
    late = history.late("completions/finished")
    if late and fmean(late) < 0.95:
        return (
            f"Only {100 * fmean(late):.3g}% of responses end by themselves late in the run "
            "(heuristic: above 95%): raise max_new_tokens, penalize cut responses, or train the "
            "end token in SFT."
        )
    return None


def _never_ended(history: _History) -> str | None:
    first = history.points("completions/finished")[:1]
    if first and first[0][1] == 0:
        return (
            f"None of the responses of the first batch (step {first[0][0]}) ended by itself: raise "
            "max_new_tokens, or name the token that ends an answer of this model with --stop."
        )
    return None


def _longer(history: _History) -> str | None:
    name = "completions/mean_length"
    start, late = history.start(name), history.late(name)
    reward, rewards = history.start("reward"), history.late("reward")
    if start and late and reward is not None and rewards:
        longer, better = fmean(late) > 1.5 * start, fmean(rewards) > reward
        if longer and better:
            return (
                f"Responses grew from {start:.3g} to {fmean(late):.3g} tokens while the reward "
                f"rose ({name}; heuristic: less than half as much again): the reward may be paying "
                "for length; compare scores at equal length."
            )
    return None


def _collapse(history: _History) -> str | None:
    start, late = history.start("entropy"), history.late("entropy")
    if start and start > 0 and late and fmean(late) < 0.1 * start:
        return (
            f"Entropy fell from {start:.3g} to {fmean(late):.3g} nats per token (heuristic: not "
            "below a tenth): the policy always says the same; raise beta or stop earlier."
        )
    return None


def _displacement(history: _History) -> str | None:
    """Lengths of answers are not recorded, so a fall is judged in proportion to the start."""
    start, late = history.start("logps/chosen"), history.late("logps/chosen")
    if start is None or not late or start - fmean(late) <= max(10.0, 0.5 * abs(start)):
        return None
    return (
        f"Chosen answers became less likely: from {start:.4g} to {fmean(late):.4g} nats per "
        "response (heuristic: by less than ten nats or half of the start). Probability moves to "
        "answers that nobody compared: raise beta, add an SFT term, or lower the learning rate."
    )


def _too_easy(history: _History) -> str | None:
    values = history.values("rewards/accuracies")
    early = values[max(1, len(values) // 10) : max(4, len(values) // 3)]
    if len(values) >= 3 * _FEW and len(early) >= 3 and fmean(early) >= 0.98:
        return (
            f"Preference accuracy is {fmean(early):.3g} already in the first third of the run "
            "(heuristic: 0.6 to 0.8 on labels by people): something trivial such as length or "
            "format tells the pairs apart; look at them."
        )
    return None


def _reversed(history: _History) -> str | None:
    late = history.late("rewards/margins")
    if late and _clearly_negative(late):
        return (
            f"The margin of the implicit rewards ends below 0 ({fmean(late):.3g}): the policy "
            "learns the opposite; check that chosen and rejected are not exchanged."
        )
    return None


def _memorized(history: _History) -> str | None:
    late, held = history.late("accuracy"), history.values("eval/accuracy")
    if late and fmean(late) > 0.9 and (not held or held[-1] < fmean(late) - 0.05):
        other = f"{held[-1]:.3g} on held-out pairs" if held else "held-out pairs were not measured"
        return (
            f"Training accuracy is {fmean(late):.3g} ({other}; heuristic: at most 0.9): the model "
            "memorizes pairs or tells them apart by something trivial; use fewer epochs or more "
            "pairs."
        )
    return None


def _overfit(history: _History) -> str | None:
    points = history.points("eval/loss")
    if len(points) < 3:
        return None
    step, lowest = min(points, key=lambda point: point[1])
    if points[-1][1] > lowest + max(0.02 * abs(lowest), 1e-9) and step != points[-1][0]:
        return (
            f"Held-out loss rose from {lowest:.4g} at step {step} to {points[-1][1]:.4g} at the "
            f"end (heuristic: by less than 2%): stop near step {step}, and judge by samples too."
        )
    return None


_ALARMS: tuple[Callable[[_History], str | None], ...] = (
    _not_finite,
    _negative_kl,
    _first_ratio,
    _sampler_gap,
    _critic,
    _update_kl,
    _clipping,
    _no_spread,
    _never_ended,
    _unfinished,
    _longer,
    _collapse,
    _displacement,
    _too_easy,
    _reversed,
    _memorized,
    _overfit,
)


def alarms(history: Iterable[Mapping[str, Any]]) -> list[str]:
    """The sentences of all alarms that fire on the rows of `metrics.jsonl`."""
    table = _History(history)
    return [sentence for alarm in _ALARMS if (sentence := alarm(table)) is not None]
