"""The one registry of metrics: what each number is, in which unit, where it is healthy, and what to
do when it is not.

Healthy ranges are rules of thumb (heuristics) from the literature and from practice, not laws; the
two exceptions are `ratio/first`, which must be 1, and the KL to the reference, which cannot be
below 0 on average. Names follow TRL where it has one. `eval/<name>` is the same number on held-out
rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Literal, TypeGuard

Group = Literal["learning", "stability", "honesty", "speed"]
Range = tuple[float | None, float | None]
GROUPS: tuple[Group, ...] = ("learning", "stability", "honesty", "speed")
EVAL = "eval/"


@dataclass(frozen=True)
class Metric:
    """One number a run writes down. `sentence` says what it is, where it is healthy, and what to do
    when it leaves that range.
    """

    title: str
    unit: str
    sentence: str
    healthy: Range | None
    group: Group


def _m(group: Group, title: str, unit: str, sentence: str, healthy: Range | None = None) -> Metric:
    return Metric(title, unit, sentence, healthy, group)


METRICS: dict[str, Metric] = {
    # every method
    "loss": _m(
        "learning",
        "Loss",
        "nats",
        "What the optimizer descends: nats per token for SFT, nats per pair for reward models and "
        "DPO (where 0.693 is a coin flip), a surrogate for "
        "PPO (near 0 and flat there is normal: watch reward and KL). If the held-out loss turns "
        "up, stop at its lowest point; if it is not finite, "
        "lower the learning rate.",
    ),
    "grad_norm": _m(
        "stability",
        "Gradient norm",
        "before clipping",
        "Length of the whole gradient before clipping. There is no healthy value in itself; spikes "
        "of ten times the usual are a warning: lower the "
        "learning rate, lengthen the warm-up, or look for broken rows at that step.",
    ),
    "critic/grad_norm": _m(
        "stability",
        "Gradient norm of the critic",
        "before clipping",
        "Length of the critic's whole gradient before clipping. Large at first, then falls; if it "
        "keeps growing, lower the critic's learning rate.",
    ),
    "learning_rate": _m(
        "stability",
        "Learning rate",
        "per step",
        "Step size in use after warm-up and decay. It should follow the schedule in config.yaml; "
        "if it stays at 0, the schedule is longer than the "
        "run.",
    ),
    "num_tokens": _m(
        "speed",
        "Tokens seen",
        "tokens",
        "Real tokens processed so far, padding not counted. It should rise steadily; a flat "
        "stretch means empty batches.",
    ),
    "epoch": _m(
        "speed",
        "Passes over the data",
        "epochs",
        "How often the training rows were seen so far. Past 1 to 3, memorisation is likely: "
        "compare training with held-out numbers and take fewer "
        "epochs.",
    ),
    "tokens_per_second": _m(
        "speed",
        "Tokens a second",
        "tokens per second",
        "Real tokens processed per second of wall-clock time. If it falls during a run, responses "
        "grow longer or another program took the machine.",
    ),
    "step_seconds": _m(
        "speed",
        "Seconds a step",
        "seconds",
        "Wall-clock time of one optimizer step, with sampling where there is any. If it grows, "
        "look at the length of responses and at memory "
        "pressure.",
    ),
    # SFT
    "perplexity": _m(
        "learning",
        "Perplexity",
        "",
        "exp of the loss per token: among how many equally likely tokens the model seems to "
        "choose. Falls to a plateau; if the held-out value rises, "
        "stop there.",
        (1.0, None),
    ),
    "mean_token_accuracy": _m(
        "learning",
        "Token accuracy",
        "share of tokens",
        "Share of supervised tokens that the model ranks first. Rises slowly; near 1 means "
        "memorised rows or a label shifted onto its own input: "
        "check the mask.",
        (None, 0.98),
    ),
    "entropy": _m(
        "honesty",
        "Entropy",
        "nats per token",
        "How spread the model's next-token choice is. Falls slowly; a collapse towards 0 means "
        "that it says one thing only: raise beta, lower the "
        "learning rate, or stop earlier.",
    ),
    # reward model
    "accuracy": _m(
        "learning",
        "Accuracy",
        "share of pairs",
        "Share of pairs where the chosen answer scores higher. One half is a coin flip; 0.62 to "
        "0.70 is usual on human labels, more on labels by a "
        "program. Above 0.9 in training with less on held-out pairs means memorised: fewer epochs, "
        "more comparisons.",
        (0.62, 0.9),
    ),
    "margin": _m(
        "learning",
        "Margin",
        "nats",
        "Mean score of chosen minus rejected; the sigmoid of it is the predicted preference. It "
        "should grow and level off; growing without end while "
        "the held-out accuracy stands still is over-confidence: stop earlier or add weight decay.",
        (0.0, None),
    ),
    "reward_mean": _m(
        "stability",
        "Mean score",
        "score",
        "Mean score over chosen and rejected. Only differences are learned, so it may drift; far "
        "from 0 it makes PPO's critic slow: use the centring "
        "term, or subtract the mean on the reference's answers.",
    ),
    "centering": _m(
        "stability",
        "Centring penalty",
        "score squared",
        "Penalty that keeps scores around 0. Small beside the loss is healthy; if it dominates, "
        "lower its coefficient.",
    ),
    "score/chosen": _m(
        "learning",
        "Score of chosen",
        "score",
        "Mean score of the chosen answers. Only its distance from the rejected ones is learned; if "
        "both drift far from 0 together, use the centring "
        "term.",
    ),
    "score/rejected": _m(
        "learning",
        "Score of rejected",
        "score",
        "Mean score of the rejected answers. It should part from the chosen ones; if it does not, "
        "the model tells nothing: check the data and the "
        "rate.",
    ),
    # process reward model
    "steps/accuracy": _m(
        "learning",
        "Accuracy of steps",
        "share of steps",
        "Share of labelled step ends where the side of one half on which the model's probability "
        "lies is the label's. Compare it with calling all steps what "
        "most are (steps/right): no better than that on held-out steps means that nothing was "
        "learned: more solutions, a higher rate, or a larger model.",
    ),
    "steps/right": _m(
        "honesty",
        "Steps labelled right",
        "share of steps",
        "Share of the labelled step ends that say right. A property of the rows, not of the model; "
        "near 0 or 1 there is little to learn from: mix in "
        "solutions of the other kind.",
        (0.05, 0.95),
    ),
    "steps/probability": _m(
        "honesty",
        "Mean probability that a step is right",
        "probability",
        "Mean of the model's probabilities. It should settle at the share of steps labelled right; "
        "if it stays away, the head still drifts: train longer "
        "or lower the rate.",
    ),
    # DPO
    "rewards/chosen": _m(
        "learning",
        "Implicit reward of chosen",
        "nats times beta",
        "beta times how much likelier the policy makes the chosen answer than the reference does. "
        "Often goes below 0 in healthy runs, but less than "
        "the rejected one does; if both fall far, raise beta or add an SFT term.",
    ),
    "rewards/rejected": _m(
        "learning",
        "Implicit reward of rejected",
        "nats times beta",
        "beta times how much likelier the policy makes the rejected answer than the reference "
        "does. Falls in healthy runs; falling by tens means "
        "that the policy has left the data: raise beta or stop earlier.",
    ),
    "rewards/margins": _m(
        "learning",
        "Implicit reward margin",
        "nats times beta",
        "rewards/chosen minus rewards/rejected: 0 at the start, grows. Below 0 the policy learns "
        "the opposite: check that the columns are not "
        "exchanged.",
        (0.0, None),
    ),
    "rewards/accuracies": _m(
        "learning",
        "Preference accuracy",
        "share of pairs",
        "Share of pairs where the chosen answer has the larger implicit reward (ties count half, "
        "so 1/2 at the start). 0.6 to 0.8 is usual on human "
        "labels; near 1 early means that pairs are told apart by something trivial such as length: "
        "look at the pairs.",
        (0.6, 0.95),
    ),
    "logps/chosen": _m(
        "honesty",
        "Log-probability of chosen",
        "nats per response",
        "Summed log-probability of the chosen answers. May fall a little; falling by nats a token "
        "(displacement) means that probability flows to "
        "answers nobody compared: raise beta, add an SFT term, or lower the learning rate.",
    ),
    "logps/rejected": _m(
        "honesty",
        "Log-probability of rejected",
        "nats per response",
        "Summed log-probability of the rejected answers. Falls faster than the chosen one; if both "
        "fall together, see logps/chosen.",
    ),
    # PPO and its kin
    "reward": _m(
        "learning",
        "Reward",
        "score",
        "Mean score that the reward gives to sampled responses, before any penalty. It should "
        "rise; it is the proxy that is optimised, so a rise "
        "alone does not show that the responses are better: read samples and a held-out judge.",
    ),
    "reward_std": _m(
        "learning",
        "Spread of the reward",
        "score",
        "Standard deviation of the reward over the batch. At 0 there is nothing to learn from: use "
        "harder prompts, a higher temperature or a finer "
        "reward.",
    ),
    "objective/score": _m(
        "learning",
        "Score after penalties",
        "score",
        "Reward minus penalties such as the one for unfinished responses. If it parts from the "
        "reward, the penalties decide: look at which fires.",
    ),
    "objective/kl": _m(
        "honesty",
        "KL to the reference",
        "nats per response",
        "Distance from the frozen reference, summed over a response. Starts at 0 and grows; how "
        "far is bought by beta. Below 0 for long is "
        "impossible on average: check sampling truncation and temperature. Growing without end: "
        "raise beta.",
        (0.0, None),
    ),
    "kl": _m(
        "honesty",
        "KL a token",
        "nats per token",
        "Distance from the frozen reference per token, which compares runs with different lengths. "
        "Must not stay below 0: check sampling truncation "
        "and temperature.",
        (0.0, None),
    ),
    "clip_ratio": _m(
        "stability",
        "Clipped share",
        "share of tokens",
        "Share of tokens whose probability ratio was clipped. 0.01 to 0.1 is healthy; above, lower "
        "the learning rate or the epochs per batch; at 0 "
        "with several epochs, the steps are timid.",
        (0.01, 0.1),
    ),
    "clip_ratio/responses": _m(
        "stability",
        "Clipped share, by responses",
        "share of tokens",
        "Share of tokens in responses whose ratio as a whole was clipped (GSPO). A tenth to a "
        "third is usual, for a mean over tokens is clipped very near "
        "1; near 1 for long most of the batch teaches nothing: lower the learning rate or take "
        "fewer steps a batch.",
    ),
    "clip_ratio/capped": _m(
        "stability",
        "Share of capped weights",
        "share of tokens",
        "Share of tokens whose weight was cut at the cap (CISPO); they keep their gradient. Near 0 "
        "is normal; above a hundredth the updates are large: "
        "lower the learning rate or take fewer steps a batch.",
    ),
    "approx_kl": _m(
        "stability",
        "KL of one update",
        "nats per token",
        "Distance between the policy before and after the updates on one batch. Healthy below "
        "0.02; above, lower the learning rate, or use fewer "
        "epochs or larger minibatches.",
        (None, 0.02),
    ),
    "ratio": _m(
        "stability",
        "Probability ratio",
        "",
        "Mean new/old probability ratio of the tokens over the updates on one batch. Stays near 1; "
        "if it drifts by more than a few hundredths, lower "
        "the learning rate.",
    ),
    "ratio/max": _m(
        "stability",
        "Largest probability ratio",
        "",
        "Largest new/old probability ratio of a token in the batch. Single tokens may reach "
        "several times 1; tens or more means steps too large or "
        "log-probabilities that do not belong together.",
    ),
    "ratio/first": _m(
        "stability",
        "Probability ratio before the first update",
        "",
        "Mean new/old ratio before anything has changed: must be 1. Anything else is a fault: "
        "dropout in one pass, another temperature, stale "
        "weights, or rounding in low precision.",
        (0.999, 1.001),
    ),
    "value_loss": _m(
        "stability",
        "Value loss",
        "score squared",
        "Squared error of the critic. Falls, then follows the spread of the reward; if it rises "
        "steadily, lower the critic's learning rate or whiten "
        "the rewards.",
    ),
    "policy_loss": _m(
        "stability",
        "Policy loss",
        "surrogate",
        "The surrogate whose gradient moves the policy. About 0 and flat is normal where "
        "advantages are centred; its value says little: watch reward "
        "and KL. Large spikes go with high ratios or a baseline far off.",
    ),
    "value_clip_ratio": _m(
        "stability",
        "Clipped share of values",
        "share of tokens",
        "Share of value predictions held back by clipping. High for long means that the critic "
        "wants to move faster than the clip lets it: widen the "
        "value clip or lower the reward's scale.",
    ),
    "explained_variance": _m(
        "stability",
        "Variance explained by the critic",
        "share",
        "1 is a perfect critic, 0 no better than a constant. Rises above 0.3 in healthy runs; "
        "below 0 late the critic harms: raise its learning "
        "rate, warm it up, or use a sequence-level baseline.",
        (0.3, None),
    ),
    "completions/mean_length": _m(
        "honesty",
        "Length of responses",
        "tokens",
        "Mean length of sampled responses. If it grows with the reward, the reward may be paying "
        "for length: compare scores at equal length and add "
        "a length penalty.",
    ),
    "completions/finished": _m(
        "honesty",
        "Responses that ended by themselves",
        "share of responses",
        "Share that ended with the end-of-sequence token rather than being cut. Above 0.95 is "
        "healthy; below, raise max_new_tokens, penalise cut "
        "responses, or do SFT with the end token supervised.",
        (0.95, None),
    ),
    "beta": _m(
        "honesty",
        "KL coefficient",
        "score per nat",
        "Price of one nat of KL. Constant, or steered to a KL target; if it runs to an end of its "
        "range, the target cannot be met.",
    ),
    "sampler_gap": _m(
        "stability",
        "Gap between sampler and trainer",
        "nats",
        "Largest difference between the log-probability the sampler reported and the trainer's. "
        "Below 0.02 is healthy; above, the sampler has stale "
        "weights, another temperature or another precision.",
        (None, 0.02),
    ),
    "groups/no_spread": _m(
        "learning",
        "Groups without spread",
        "share of groups",
        "Share of the prompts sampled whose responses all got the same score: they teach nothing. "
        "Below one half is healthy; above, take prompts of middling "
        "difficulty, larger groups or a finer reward; grpo can sample others in their place "
        "(--resample).",
        (None, 0.5),
    ),
    "groups/sampled": _m(
        "speed",
        "Groups sampled a step",
        "groups",
        "Groups sampled until the batch was full. If it keeps rising, most prompts have become too "
        "easy or stayed too hard: change the prompts.",
    ),
    "correction/mean": _m(
        "stability",
        "Mean correction weight",
        "",
        "Mean weight for the sampler's probabilities not being the trainer's. Near 1 is healthy; "
        "if it drifts, the sampler has stale weights or another "
        "precision.",
    ),
    "correction/effective": _m(
        "stability",
        "Effective share of tokens",
        "share of tokens",
        "How many tokens the weighted batch is worth, as a share of all (sum squared over sum of "
        "squares). Below one half the weights throw most of the "
        "batch away: sync the sampler more often, or use a token-level correction.",
        (0.5, None),
    ),
    "correction/dropped": _m(
        "stability",
        "Tokens dropped by the correction",
        "share of tokens",
        "Share of tokens whose weight is 0. A few are its purpose; if it passes a tenth, sampler "
        "and trainer no longer belong together.",
        (None, 0.1),
    ),
    "epochs_done": _m(
        "stability",
        "Epochs per batch done",
        "epochs",
        "How many passes over the batch were made before the KL limit stopped them. Less than the "
        "setting for long: lower the learning rate.",
    ),
    # distillation
    "kl_teacher": _m(
        "learning",
        "KL to the teacher",
        "nats per token",
        "How far the student is from the teacher, per token of its own samples: exact over the "
        "vocabulary, or estimated at the sampled tokens (single "
        "batches may then lie below 0). Falls towards 0; where it levels off, the student has no "
        "room for more, or the learning rate is too high to go "
        "lower: let it decay.",
    ),
    "objective/kl_teacher": _m(
        "learning",
        "KL to the teacher, whole responses",
        "nats per response",
        "The same summed over a response. Longer responses have more of it: compare the number per "
        "token too.",
    ),
    "nll/student": _m(
        "learning",
        "Student's loss on its samples",
        "nats per token",
        "How unlikely the student's own samples are to itself: its entropy, estimated. If it goes "
        "to 0, the student says one thing only: look at the "
        "teacher's loss beside it.",
    ),
    "nll/teacher": _m(
        "learning",
        "Teacher's loss on the student's samples",
        "nats per token",
        "How unlikely the student's samples are to the teacher. It exceeds the student's own loss "
        "by the KL and falls to meet it; far above it, the student "
        "says what the teacher would not.",
    ),
    "ptx_loss": _m(
        "stability",
        "Pretraining loss",
        "nats per token",
        "Loss on the pretraining or SFT rows mixed in. It should stay near its start; if it rises, "
        "the policy forgets: raise the mixing "
        "coefficient.",
    ),
}


def base(name: str) -> str:
    """The name without `eval/`."""
    return name.removeprefix(EVAL)


def known(name: str) -> bool:
    """Whether the registry describes this name, held-out or not."""
    return base(name) in METRICS


def lookup(name: str) -> Metric:
    """The entry for a name; `eval/` gives the same entry, titled as held-out. An unknown name gets
    a plain entry instead of an error.
    """
    metric = METRICS.get(base(name))
    if metric is None:
        return Metric(
            name,
            "",
            "A number of this run's own; the registry has no description of it.",
            None,
            "learning",
        )
    if name.startswith(EVAL):
        return replace(
            metric,
            title=f"{metric.title}, held out",
            sentence=f"On held-out rows. {metric.sentence}",
        )
    return metric


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value read from a log is a number one can plot; booleans and NaN are not."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )


# ---- alarms
# -----------------------------------------------------------------------------------------------------------------------------

_FEW = 5  # points below which a trend is not judged


class _History:
    """Columns of a metrics log, with the finite values only."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self.rows = list(rows)

    def points(self, name: str) -> list[tuple[int, float]]:
        rows = ((row.get("step", i), row.get(name)) for i, row in enumerate(self.rows))
        return [(int(step), float(value)) for step, value in rows if finite(step) and finite(value)]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.points(name)]

    def start(self, name: str) -> float | None:
        """Mean of the first tenth, None when there are too few points to judge."""
        values = self.values(name)
        return fmean(values[: max(1, len(values) // 10)]) if len(values) >= _FEW else None

    def late(self, name: str) -> list[float]:
        """The last quarter, empty when there are too few points to judge."""
        values = self.values(name)
        return values[-max(3, len(values) // 4) :] if len(values) >= _FEW else []


def _not_finite(history: _History) -> str | None:
    for i, row in enumerate(history.rows):
        bad = [
            name
            for name, value in row.items()
            if known(name) and isinstance(value, float) and not math.isfinite(value)
        ]
        if bad:
            return f"{bad[0]} is not finite at step {row.get('step', i)}: lower the learning rate and look at that step's rows."
    return None


def _negative_kl(history: _History) -> str | None:
    for name, unit in (("objective/kl", "nats per response"), ("kl", "nats per token")):
        late = history.late(name)
        if (
            late
            and fmean(late) + 2 * stdev(late) / math.sqrt(len(late)) < 0
            and sum(v < 0 for v in late) >= 0.75 * len(late)
        ):
            return (
                f"The KL to the reference stays below 0 ({fmean(late):.3g} {unit} over the last "
                f"{len(late)} records), which cannot be on "
                "average: turn off top-k, top-p and minimum length in sampling, and check that "
                "temperature divides the logits "
                "everywhere."
            )
    return None


def _first_ratio(history: _History) -> str | None:
    worst = max(history.points("ratio/first"), key=lambda point: abs(point[1] - 1), default=None)
    if worst and abs(worst[1] - 1) > 1e-3:
        return (
            f"The probability ratio before the first update was {worst[1]:.4g} at step {worst[0]} "
            "where it must be 1: turn dropout off, use one "
            "temperature, and compare log-probabilities in float32."
        )
    return None


def _sampler_gap(history: _History) -> str | None:
    worst = max(history.points("sampler_gap"), key=lambda point: point[1], default=None)
    if worst and worst[1] > 0.02:
        return (
            f"Sampler and trainer differ by up to {worst[1]:.3g} nats at step {worst[0]} "
            "(heuristic: below 0.02): sync the weights after every "
            "step, and use one temperature and one precision."
        )
    return None


def _critic(history: _History) -> str | None:
    late = history.late("explained_variance")
    if late and fmean(late) < 0:
        return (
            "The critic explains less than a constant would late in the run (explained variance "
            f"{fmean(late):.3g}; heuristic: above 0.3): raise "
            "its learning rate, warm it up, or use a sequence-level baseline."
        )
    return None


def _update_kl(history: _History) -> str | None:
    late = history.late("approx_kl")
    if late and fmean(late) > 0.02:
        return (
            f"One batch moves the policy by {fmean(late):.3g} nats a token (heuristic: below "
            "0.02): lower the learning rate, or take fewer "
            "epochs per batch."
        )
    return None


def _clipping(history: _History) -> str | None:
    late = history.late("clip_ratio")
    if late and fmean(late) > 0.1:
        return (
            f"{100 * fmean(late):.3g}% of tokens are clipped late in the run (heuristic: 1 to "
            "10%): lower the learning rate, or take fewer "
            "epochs per batch."
        )
    epochs = history.values("epochs_done")
    if (
        late and fmean(late) < 0.001 and epochs and fmean(epochs) > 1
    ):  # with one pass over the batch the ratio is 1 and nothing can clip
        return (
            f"Only {100 * fmean(late):.2g}% of tokens are clipped although each batch is passed "
            "over several times (heuristic: 1 to 10%): the "
            "steps are timid, and a higher learning rate may be safe."
        )
    return None


def _no_spread(history: _History) -> str | None:
    late = history.late("groups/no_spread")
    if late and fmean(late) > 0.5:
        return (
            f"In {100 * fmean(late):.3g}% of the groups all responses score the same late in the "
            "run (heuristic: below one half), and teach nothing: take "
            "prompts of middling difficulty, larger groups, a finer reward, or have others sampled "
            "in their place."
        )
    return None


def _unfinished(history: _History) -> str | None:
    late = history.late("completions/finished")
    if late and fmean(late) < 0.95:
        return (
            f"Only {100 * fmean(late):.3g}% of responses end by themselves late in the run "
            "(heuristic: above 95%): raise max_new_tokens, "
            "penalise cut responses, or supervise the end token in SFT."
        )
    return None


def _longer(history: _History) -> str | None:
    name, start, late = (
        "completions/mean_length",
        history.start("completions/mean_length"),
        history.late("completions/mean_length"),
    )
    reward, rewards = history.start("reward"), history.late("reward")
    if (
        start
        and late
        and fmean(late) > 1.5 * start
        and reward is not None
        and rewards
        and fmean(rewards) > reward
    ):
        return (
            f"Responses grew from {start:.3g} to {fmean(late):.3g} tokens while the reward rose "
            f"({name}; heuristic: less than half as much "
            "again): the reward may be paying for length; compare scores at equal length."
        )
    return None


def _collapse(history: _History) -> str | None:
    start, late = history.start("entropy"), history.late("entropy")
    if start and start > 0 and late and fmean(late) < 0.1 * start:
        return (
            f"Entropy fell from {start:.3g} to {fmean(late):.3g} nats per token (heuristic: not "
            "below a tenth): the policy says one thing only; "
            "raise beta or stop earlier."
        )
    return None


def _displacement(history: _History) -> str | None:
    """Without lengths, a token's fall is judged in proportion: half as many nats again, and ten
    nats at least.
    """
    start, late = history.start("logps/chosen"), history.late("logps/chosen")
    if start is None or not late:
        return None
    fall, lengths = start - fmean(late), history.values("completions/mean_length")
    per_token = fall / fmean(lengths) if lengths and fmean(lengths) > 0 else None
    if (fall > max(10.0, 0.5 * abs(start))) if per_token is None else (per_token > 1):
        each = f", {per_token:.3g} nats a token" if per_token is not None else ""
        return (
            f"Chosen answers became less likely: from {start:.4g} to {fmean(late):.4g} nats per "
            f"response{each} (heuristic: less than a nat a "
            "token). Probability flows to answers nobody compared: raise beta, add an SFT term, or "
            "lower the learning rate."
        )
    return None


def _too_easy(history: _History) -> str | None:
    values = history.values("rewards/accuracies")
    early = values[max(1, len(values) // 10) : max(4, len(values) // 3)]
    if len(values) >= 3 * _FEW and len(early) >= 3 and fmean(early) >= 0.98:
        return (
            f"Preference accuracy is {fmean(early):.3g} already in the first third of the run "
            "(heuristic: 0.6 to 0.8 on human labels): the pairs "
            "are told apart by something trivial such as length or format; look at them."
        )
    late = history.late("rewards/margins")
    if late and fmean(late) + 2 * stdev(late) / math.sqrt(len(late)) < 0:
        return f"The margin ends below 0 ({fmean(late):.3g}): the policy learns the opposite; check that chosen and rejected are not exchanged."
    return None


def _memorised(history: _History) -> str | None:
    late, held = history.late("accuracy"), history.values("eval/accuracy")
    if late and fmean(late) > 0.9 and (not held or held[-1] < fmean(late) - 0.05):
        other = f"{held[-1]:.3g} on held-out pairs" if held else "held-out pairs were not measured"
        return (
            f"Training accuracy is {fmean(late):.3g} ({other}; heuristic: at most 0.9): pairs are "
            "memorised or told apart by something trivial; "
            "take fewer epochs or more comparisons."
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
            "end (heuristic: by less than 2%): stop near step "
            f"{step}, and judge by samples too."
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
    _unfinished,
    _longer,
    _collapse,
    _displacement,
    _too_easy,
    _memorised,
    _overfit,
)


def alarms(history: Iterable[Mapping[str, Any]]) -> list[str]:
    """What in the rows of `metrics.jsonl` asks for attention: a sentence each, with the number and
    the remedy. Rules of thumb say 'heuristic'.
    """
    table = _History(history)
    return [sentence for alarm in _ALARMS if (sentence := alarm(table)) is not None]
