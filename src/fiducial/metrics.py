"""The registry of metrics: what each number of a run is, its unit, where it is healthy, and what to
do when it is not.

Healthy ranges are rules of thumb (heuristics) from the literature and from practice, not laws. The
two exceptions are `ratio/first`, which must be 1, and the KL to the reference, which cannot be
below 0 on average. Names follow TRL where it has one. `eval/<name>` is the same number on held-out
rows.
"""

import math
from dataclasses import replace
from typing import Any, TypeGuard

from .metric import Metric, metric

EVAL = "eval/"

METRICS: dict[str, Metric] = {
    # every method
    "loss": metric("learning", "Loss", "nats", change=(None, 1.2))(
        "The value that the optimizer minimizes: nats per token for SFT, nats per step for process "
        "reward models, nats per pair for reward models and DPO (0.693 is a coin flip). If the "
        "held-out loss turns up, stop at its lowest point."
    ),
    "grad_norm": metric("stability", "Gradient norm", "before clipping", change=(None, 10.0))(
        "Norm of the whole gradient before clipping. No value is healthy in itself; spikes of ten "
        "times the usual value are a warning: lower the learning rate, lengthen the warm-up, or "
        "look for broken rows at that step."
    ),
    "skipped_updates": metric("stability", "Updates left out", "updates")(
        "Updates left out so far because their gradient was not finite (--run.on-nonfinite skip). "
        "If it grows, lower the learning rate, or look at the rows in bad-batch.jsonl."
    ),
    "learning_rate": metric("stability", "Learning rate", "per step")(
        "Step size after warm-up and decay. It follows the schedule in config.yaml; if it stays at "
        "0, the schedule is longer than the run."
    ),
    "num_tokens": metric("speed", "Tokens seen", "tokens")(
        "Tokens processed so far, without padding. It should rise steadily; a flat stretch means "
        "empty batches."
    ),
    "tokens_per_second": metric("speed", "Tokens per second", "tokens per second")(
        "Tokens processed per second of wall-clock time, without padding. If it falls during a "
        "run, responses grow longer or another program uses the machine."
    ),
    # reward models
    "accuracy": metric("learning", "Accuracy", "share of pairs", (0.62, 0.9))(
        "Share of pairs in which the chosen answer scores higher; one half is a coin flip. 0.62 to "
        "0.70 is usual on labels by people, more on labels by a program. Above 0.9 in training and "
        "lower on held-out pairs means that pairs are memorized: use fewer epochs or more pairs."
    ),
    "margin": metric("learning", "Margin", "nats", (0.0, None))(
        "Mean score of chosen minus rejected; its sigmoid is the predicted preference. It should "
        "grow and level off. If it keeps growing while the held-out accuracy stands still, the "
        "model is overconfident: stop earlier or add weight decay."
    ),
    "score/chosen": metric("learning", "Score of chosen", "score")(
        "Mean score of the chosen answers. Only its distance from the rejected ones is learned; if "
        "both drift far from 0 together, use the centering term."
    ),
    "score/rejected": metric("learning", "Score of rejected", "score")(
        "Mean score of the rejected answers. It should move away from the score of the chosen "
        "ones; if it does not, the model has learned nothing: check the data and the learning rate."
    ),
    # process reward models
    "steps/accuracy": metric("learning", "Accuracy of steps", "share of steps")(
        "Share of labeled step ends at which the model's probability lies on the label's side of "
        "one half. Compare it with always giving the more frequent label (steps/right): if it is "
        "no better than that on held-out steps, nothing was learned: use more solutions, a higher "
        "learning rate, or a larger model."
    ),
    "steps/right": metric("honesty", "Steps labeled right", "share of steps", (0.05, 0.95))(
        "Share of the labeled step ends that are labeled right. It is a property of the rows, not "
        "of the model. Near 0 or 1 there is little to learn: add solutions of the other kind."
    ),
    "steps/probability": metric("honesty", "Mean probability that a step is right", "probability")(
        "Mean of the model's probabilities. It should settle at the share of steps labeled right; "
        "if it does not, train longer or lower the learning rate."
    ),
    # DPO
    "rewards/chosen": metric("learning", "Implicit reward of chosen", "nats times beta")(
        "beta times the log-probability ratio of policy to reference on the chosen answers. It "
        "often falls below 0 in healthy runs, but less than the rejected one does; if both fall "
        "far, raise beta or add an SFT term."
    ),
    "rewards/rejected": metric("learning", "Implicit reward of rejected", "nats times beta")(
        "beta times the log-probability ratio of policy to reference on the rejected answers. It "
        "falls in healthy runs; if it falls by tens, the policy has left the data: raise beta or "
        "stop earlier."
    ),
    "rewards/margins": metric("learning", "Implicit reward margin", "nats times beta", (0.0, None))(
        "rewards/chosen minus rewards/rejected. It starts at 0 and grows. Below 0 the policy "
        "learns the opposite: check that the columns are not exchanged."
    ),
    "rewards/accuracies": metric("learning", "Preference accuracy", "share of pairs", (0.6, 0.95))(
        "Share of pairs in which the chosen answer has the larger implicit reward. A tie counts "
        "one half, so it starts at 1/2. 0.6 to 0.8 is usual on labels by people; near 1 early on "
        "means that something trivial such as length tells the pairs apart: read some pairs."
    ),
    "logps/chosen": metric(
        "honesty", "Log-probability of chosen", "nats per response", change=(None, 1.5)
    )(
        "Summed log-probability of the chosen answers. It may fall a little. If it falls by nats "
        "per token (displacement), probability moves to answers that nobody compared: raise beta, "
        "add an SFT term, or lower the learning rate."
    ),
    "logps/rejected": metric("honesty", "Log-probability of rejected", "nats per response")(
        "Summed log-probability of the rejected answers. It falls faster than that of the chosen "
        "ones; if both fall together, see logps/chosen."
    ),
    # PPO, REINFORCE and GRPO
    "reward": metric("learning", "Reward", "score")(
        "Mean score of the sampled responses, before any penalty. It should rise. It is the proxy "
        "that is optimized, so a rise alone does not show that responses are better: read samples "
        "and use a judge on held-out prompts."
    ),
    "reward/<name>": metric("learning", "Reward: <name>", "score")(
        "Mean score by one of several rewards, before its weight. If one rises while another "
        "falls, the weights decide which of them wins."
    ),
    "reward/<name>/not_judged": metric("learning", "Not judged: <name>", "share")(
        "Share of the responses for which this reward returned None, because it does not apply. "
        "There the other rewards count with its weight as well. If it is larger than the share of "
        "such rows in the data, look at the reward function."
    ),
    "reward_std": metric("learning", "Standard deviation of the reward", "score")(
        "Standard deviation of the reward over the batch. At 0 there is nothing to learn: use "
        "harder prompts, a higher temperature or a finer reward."
    ),
    "objective/score": metric("learning", "Score after penalties", "score")(
        "Reward on the scale that the settings ask for, minus penalties such as the one for "
        "unfinished responses. If it moves away from the reward, look at which penalty applies."
    ),
    "objective/scale": metric("learning", "Factor of the scores", "")(
        "What --score.normalise multiplies scores by, after it has subtracted their mean. 1 means "
        "that the scores have not differed yet, so that they are not scaled."
    ),
    "objective/kl": metric(
        "honesty",
        "KL to the reference",
        "nats per response",
        (0.0, None),
        alarm=(0.0, 20.0),
        change=(None, 3.0),
    )(
        "KL divergence from the frozen reference, summed over a response. It starts at 0 and "
        "grows; beta limits how far. It cannot stay below 0 on average: check the truncation of "
        "sampling and the temperature. If it grows without end, raise beta."
    ),
    "kl": metric("honesty", "KL per token", "nats per token", (0.0, None), alarm=(0.0, 0.5))(
        "KL divergence from the frozen reference per token, which makes runs with different "
        "lengths comparable. It cannot stay below 0: check the truncation of sampling and the "
        "temperature."
    ),
    "beta": metric("honesty", "KL coefficient", "score per nat")(
        "Price of one nat of KL. It is constant, or steered toward a KL target; if it reaches an "
        "end of its range, the target cannot be met."
    ),
    "entropy": metric("honesty", "Entropy", "nats per token", change=(0.1, None))(
        "Entropy of the model's next-token distribution. It falls slowly. A collapse toward 0 "
        "means that the model always says the same: raise beta, lower the learning rate, or stop "
        "earlier."
    ),
    "completions/mean_length": metric(
        "honesty", "Length of responses", "tokens", change=(None, 1.5)
    )(
        "Mean length of the sampled responses. If it grows with the reward, the reward may be "
        "paying for length: compare scores at equal length and add a length penalty."
    ),
    "completions/finished": metric(
        "honesty",
        "Responses that ended by themselves",
        "share of responses",
        (0.95, None),
        alarm=(0.5, None),
        change=(0.75, None),
    )(
        "Share of responses that ended with the end-of-sequence token rather than at the length "
        "limit. Above 0.95 is healthy; below, raise max_new_tokens, penalize cut responses, or "
        "train the end token in SFT."
    ),
    "completions/repetition": metric(
        "honesty", "Repetition", "share of four-token sequences", (None, 0.5)
    )(
        "Share of the sequences of four tokens of a response that stood in it before, on average "
        "over the responses. A few hundredths are usual for prose. If it grows with the reward, "
        "the policy has learned to say the same again and again: penalize it in the reward, or "
        "raise beta."
    ),
    "calibration/outside": metric(
        "honesty",
        "Outside the reward model's range",
        "share of responses",
        (None, 0.5),
        alarm=(None, 0.7),
    )(
        "Share of responses that the reward model scores outside the range that held 98% of its "
        "scores of held-out responses when it was trained. Such responses are unlike all that it "
        "was measured on, so its scores of them are guesses. If it grows, the policy is leaving "
        "the model's range (over-optimization): raise beta, stop earlier, or train the reward "
        "model on responses of this policy."
    ),
    "policy_loss": metric("stability", "Policy loss", "surrogate")(
        "The surrogate whose gradient moves the policy. About 0 and flat is normal where "
        "advantages are centered, and its value says little: watch the reward and the KL. Large "
        "spikes come with large ratios or a baseline that is far off."
    ),
    "clip_ratio": metric("stability", "Clipped share", "share of tokens", (0.01, 0.1))(
        "Share of tokens whose probability ratio was clipped. 0.01 to 0.1 is healthy. Above, lower "
        "the learning rate or use fewer epochs per batch; at 0 with several epochs, the steps are "
        "too small."
    ),
    "clip_ratio/responses": metric(
        "stability", "Clipped share, by responses", "share of tokens", alarm=(None, 0.9)
    )(
        "Share of tokens in responses whose ratio as a whole was clipped (GSPO). A tenth to a "
        "third is usual, because a mean over tokens is clipped very near 1. If it stays near 1, "
        "most of the batch teaches nothing: lower the learning rate or take fewer steps per batch."
    ),
    "clip_ratio/capped": metric(
        "stability", "Share of capped weights", "share of tokens", alarm=(None, 0.05)
    )(
        "Share of tokens whose weight was limited by the cap (CISPO); they keep their gradient. "
        "Near 0 is normal. Above 0.01 the updates are large: lower the learning rate or take fewer "
        "steps per batch."
    ),
    "approx_kl": metric("stability", "KL of one update", "nats per token", (None, 0.02))(
        "KL divergence between the policy before and after the updates on one batch. Below 0.02 is "
        "healthy; above, lower the learning rate, or use fewer epochs or larger minibatches."
    ),
    "ratio": metric("stability", "Probability ratio", "")(
        "Mean ratio of new to old probability of the tokens over the updates on one batch. It "
        "stays near 1; if it drifts by more than a few hundredths, lower the learning rate."
    ),
    "ratio/max": metric("stability", "Largest probability ratio", "")(
        "Largest ratio of new to old probability of a token in the batch. Single tokens may reach "
        "several times 1; tens or more mean that the steps are too large or that the "
        "log-probabilities do not belong together."
    ),
    "ratio/first": metric(
        "stability", "Probability ratio before the first update", "", (0.999, 1.001)
    )(
        "Mean ratio of new to old probability before anything has changed; it must be 1. Anything "
        "else is a fault: dropout in one pass, another temperature, outdated weights, or rounding "
        "in low precision."
    ),
    "sampler_gap": metric("stability", "Gap between sampler and trainer", "nats", (None, 0.02))(
        "Largest difference between the log-probability that the sampler reported and the "
        "trainer's. Below 0.02 is healthy; above, the sampler has outdated weights, another "
        "temperature or another precision."
    ),
    "correction/mean": metric("stability", "Mean importance weight", "")(
        "Mean weight that corrects for the difference between the sampler's probabilities and the "
        "trainer's. Near 1 is healthy; if it drifts, the sampler has outdated weights or another "
        "precision."
    ),
    "correction/effective": metric(
        "stability", "Effective share of tokens", "share of tokens", (0.5, None)
    )(
        "Effective sample size of the weighted batch (squared sum over sum of squares) as a share "
        "of its tokens. Below one half the weights discard most of the batch: sync the sampler "
        "more often, or use a token-level correction."
    ),
    "correction/dropped": metric(
        "stability", "Tokens dropped by the correction", "share of tokens", (None, 0.1)
    )(
        "Share of tokens whose importance weight is 0. A few are its purpose; above a tenth, the "
        "sampler and the trainer no longer belong together."
    ),
    "groups/no_spread": metric("learning", "Groups without spread", "share of groups", (None, 0.5))(
        "Share of the sampled prompts whose responses all got the same score: they teach nothing. "
        "Below one half is healthy; above, use prompts of medium difficulty, larger groups or a "
        "finer reward; grpo can sample other prompts in their place."
    ),
    "groups/sampled": metric("speed", "Groups sampled per step", "groups")(
        "Groups sampled until the batch was full. If it keeps rising, most prompts have become too "
        "easy or stayed too hard: change the prompts."
    ),
    # the critic of PPO, its epochs, and its pretraining term
    "value_loss": metric("stability", "Value loss", "score squared")(
        "Squared error of the critic. It falls, then follows the variance of the reward; if it "
        "rises steadily, lower the critic's learning rate or normalize the scores."
    ),
    "value_clip_ratio": metric("stability", "Clipped share of values", "share of tokens")(
        "Share of value predictions that were clipped. If it stays high, the critic would move "
        "faster than the clip allows: widen the value clip or reduce the scale of the reward."
    ),
    "explained_variance": metric(
        "stability", "Variance explained by the critic", "share", (0.3, None), alarm=(0.0, None)
    )(
        "1 is a perfect critic, 0 no better than a constant. It rises above 0.3 in healthy runs. "
        "If it is below 0 late in the run, the critic does harm: raise its learning rate, warm it "
        "up, or use a sequence-level baseline."
    ),
    "critic/grad_norm": metric(
        "stability", "Gradient norm of the critic", "before clipping", change=(None, 10.0)
    )(
        "Norm of the critic's whole gradient before clipping. It is large at first, then falls; if "
        "it keeps growing, lower the critic's learning rate."
    ),
    "epochs_done": metric("stability", "Epochs done per batch", "epochs")(
        "Number of passes over the batch before the KL limit stopped them. If it stays below the "
        "setting, lower the learning rate."
    ),
    "ptx_loss": metric("stability", "Pretraining loss", "nats per token")(
        "Loss on the pretraining or SFT rows that are mixed in. It should stay near its start; if "
        "it rises, the policy forgets: raise the mixing coefficient."
    ),
    # distillation
    "kl_teacher": metric("learning", "KL to the teacher", "nats per token", change=(None, 1.5))(
        "KL divergence of the student from the teacher, per token of the student's own samples: "
        "exact over the vocabulary, or estimated at the sampled tokens (single batches may then "
        "lie below 0). It falls toward 0. Where it levels off, the student has no more capacity, "
        "or the learning rate is too high: let it decay."
    ),
    "objective/kl_teacher": metric(
        "learning", "KL to the teacher, whole responses", "nats per response"
    )(
        "The KL to the teacher summed over a response. Longer responses have more of it: compare "
        "the number per token too."
    ),
    "nll/student": metric("learning", "Student's loss on its samples", "nats per token")(
        "Negative log-probability of the student's own samples under the student: an estimate of "
        "its entropy. If it goes to 0, the student always says the same: compare it with the "
        "teacher's loss."
    ),
    "nll/teacher": metric("learning", "Teacher's loss on the student's samples", "nats per token")(
        "Negative log-probability of the student's samples under the teacher. It exceeds the "
        "student's own loss by the KL and falls to meet it; if it stays far above, the student "
        "says what the teacher would not."
    ),
}

_PART = "reward/"
"""Begins the name of a reward that is one of several; what follows is the user's own name."""
_WITHOUT = "/not_judged"
"""Ends the name of the share of responses that such a reward does not judge."""


def base(name: str) -> str:
    """The name without `eval/`."""
    return name.removeprefix(EVAL)


def entry(name: str) -> str:
    """The registry's key for a name: without `eval/`, and one for all of several rewards."""
    if not base(name).startswith(_PART):
        return base(name)
    return f"{_PART}<name>{_WITHOUT if name.endswith(_WITHOUT) else ''}"


def known(name: str) -> bool:
    """Whether the registry describes this name, held-out or not."""
    return entry(name) in METRICS


def lookup(name: str) -> Metric:
    """The entry for a name. The title of `eval/<name>` says that it is held out; an unknown name
    gets a plain entry instead of an error.
    """
    found = METRICS.get(entry(name))
    if found is None:
        sentence = "A metric of the run's own code; the registry has no description of it."
        return Metric(name, "", sentence, None, "learning")
    found = replace(
        found,
        title=found.title.replace("<name>", base(name).removeprefix(_PART).removesuffix(_WITHOUT)),
    )
    if not name.startswith(EVAL):
        return found
    return replace(
        found,
        title=f"{found.title}, held out",
        sentence=f"On held-out rows. {found.sentence}",
    )


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value read from a log is a number that can be plotted; booleans and NaN are not."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )
