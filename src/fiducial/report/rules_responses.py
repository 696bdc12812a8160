"""Alarms about the responses: what the model says, what it is paid for, and what it forgets."""

from __future__ import annotations

from .rules import Found, Rule, Tracks, bounds, factors, recent
from .tracks import FIRST, RECENT, Setup, clearly_below, error


def _no_spread(tracks: Tracks, setup: Setup) -> Found | None:
    spread = tracks.get("reward_std")
    if spread and spread.count >= FIRST and not any(spread.last(FIRST)):
        reward = tracks["reward"].newest if "reward" in tracks else 0.0
        return Found(
            {"reward_std": 0.0, "reward": reward},
            f"All responses got the same reward ({reward:.4g}) in the last {FIRST} records, so "
            "that there is nothing to learn: the prompts are too easy or too hard, or the reward "
            "tells too little apart. Use other prompts or a finer reward, or raise "
            "--temperature.",
        )
    mean, high = recent(tracks, "groups/no_spread"), bounds("groups/no_spread")[1]
    if mean is None or mean <= high:
        return None
    return Found(
        {"groups/no_spread": mean},
        f"All responses get the same score in {100 * mean:.3g}% of the groups over the last "
        f"{RECENT} records (heuristic: below one half), and such groups teach nothing: the prompts "
        "are too easy or too hard. "
        + setup.sentence(
            "Use prompts of medium difficulty or a finer reward",
            "raise --group-size",
            "replace such prompts with --resample 8",
        ),
    )


def _ends(tracks: Tracks, setup: Setup) -> Found | None:
    name = "completions/finished"
    track = tracks[name]
    remedies = setup.sentence(
        "Raise --max-new-tokens",
        "name the token that ends an answer of this model with --stop",
        "make cut responses cost something with --score.missing-eos-penalty 1",
    )
    if track.count == 1 and track.newest == 0:
        return Found(
            {name: 0.0},
            "None of the responses of the first batch ended by itself: they are cut at "
            f"--max-new-tokens, or the model ends its answers in another way. {remedies}",
        )
    if track.count < RECENT:
        return None
    mean, low = track.mean, bounds(name)[0]
    if track.start >= low and mean < factors(name)[0] * track.start:
        return Found(
            {name: mean},
            f"Ends vanish: {100 * mean:.3g}% of the responses end by themselves over the last "
            f"{RECENT} records, where {100 * track.start:.3g}% did at the start: the policy is "
            f"paid for going on. {remedies}",
        )
    if mean < low and track.newest_five <= mean + 0.02:  # the ends are not being learned
        return Found(
            {name: mean},
            f"Only {100 * mean:.3g}% of the responses end by themselves over the last {RECENT} "
            f"records (heuristic: above {100 * low:g}%), so that most scores are those of "
            f"fragments. {remedies}",
        )
    return None


def _longer(tracks: Tracks, setup: Setup) -> Found | None:
    name = "completions/mean_length"
    track, reward = tracks[name], tracks.get("reward")
    if not reward or min(track.count, reward.count) < RECENT + FIRST:
        return None
    length, most = track.mean, factors(name)[1]
    better = reward.mean - reward.start > 3 * error(reward.last())
    if not better or length <= most * track.start:
        return None
    return Found(
        {name: length, "reward": reward.mean},
        f"Responses grew from {track.start:.3g} to {length:.3g} tokens while the reward rose from "
        f"{reward.start:.3g} to {reward.mean:.3g} (heuristic: less than {most:g} times the "
        "length): the reward may be paying for length. Compare scores at equal length. "
        + setup.sentence("raise --beta", "charge for length with --score.length-buffer"),
    )


def _repetition(tracks: Tracks, setup: Setup) -> Found | None:
    name = "completions/repetition"
    track, high = tracks[name], bounds(name)[1]
    # a model that repeats itself from the start has not learned it here
    if track.count < RECENT or track.mean <= max(high, 1.5 * track.start):
        return None
    return Found(
        {name: track.mean},
        f"{100 * track.mean:.3g}% of what the responses say stood in them before, over the last "
        f"{RECENT} records ({100 * track.start:.3g}% at the start; heuristic: below "
        f"{100 * high:g}%): the policy has learned to repeat itself. Look at the samples. "
        + setup.sentence(
            "charge for repetition in a --reward function", "raise --beta", "lower --learning-rate"
        ),
    )


def _collapse(tracks: Tracks, setup: Setup) -> Found | None:
    track, least = tracks["entropy"], factors("entropy")[0]
    if track.count < RECENT or track.start <= 0 or track.mean >= least * track.start:
        return None
    return Found(
        {"entropy": track.mean},
        f"Entropy fell from {track.start:.3g} to {track.mean:.3g} nats per token (heuristic: not "
        f"below {least:g} of the start): the policy always says the same, and can find nothing "
        "better. " + setup.sentence("Raise --beta", "lower --learning-rate", "stop earlier"),
    )


def _outside(tracks: Tracks, setup: Setup) -> Found | None:
    name = "calibration/outside"
    mean, high = recent(tracks, name), bounds(name)[1]
    if mean is None or mean <= high:
        return None
    return Found(
        {name: mean},
        f"{100 * mean:.3g}% of the responses score outside the range of the reward model's "
        f"held-out scores over the last {RECENT} records (heuristic: at most {100 * high:g}%): "
        "the policy has left what the model was trained on, and its scores are guesses "
        "(over-optimization). "
        + setup.sentence(
            "Raise --beta", "stop earlier", "train the reward model on responses of this policy"
        ),
    )


def _falling(tracks: Tracks, setup: Setup) -> Found | None:
    track, spread = tracks["reward"], tracks.get("reward_std")
    if not spread or track.count < 2 * RECENT:
        return None
    mean, noise = track.mean, error(track.last())
    # the best of many windows is lucky: it takes more than their noise
    if track.best - mean <= max(spread.start, 7 * noise):
        return None
    return Found(
        {"reward": mean},
        f"The reward fell from {track.best:.3g} to {mean:.3g}, by more than the standard deviation "
        f"of a batch at the start (heuristic: {spread.start:.3g}): the policy has lost what it had "
        "learned. " + setup.sentence("lower --learning-rate", "raise --beta"),
    )


def _displacement(tracks: Tracks, setup: Setup) -> Found | None:
    """Where beta is known, the fall is that of the same answers under policy and reference."""
    track, implicit = tracks["logps/chosen"], tracks.get("rewards/chosen")
    if track.count < RECENT:
        return None
    beta = setup.value("beta")
    fall = track.start - track.mean
    if implicit and isinstance(beta, int | float) and beta > 0:
        fall = -implicit.mean / beta
    least = (factors("logps/chosen")[1] - 1) * abs(track.start)
    if fall <= max(10.0, least, 5 * error(track.last())):
        return None
    return Found(
        {"logps/chosen": track.mean},
        f"Chosen answers became less likely by {fall:.3g} nats per response, from "
        f"{track.start:.4g} to {track.mean:.4g} (heuristic: by less than ten nats or half of the "
        "start): probability moves to answers that nobody compared (displacement). "
        + setup.sentence(
            "Raise --beta", "lower --learning-rate", "fine-tune on the chosen answers"
        ),
    )


def _reversed(tracks: Tracks, setup: Setup) -> Found | None:
    track = tracks["rewards/margins"]
    if track.count < 2 * RECENT or not clearly_below(track, 0.0):
        return None
    return Found(
        {"rewards/margins": track.mean},
        f"The margin of the implicit rewards stays below 0 ({track.mean:.3g}): the policy learns "
        "the opposite of the labels. Check that chosen and rejected are not exchanged in --data. "
        + setup.sentence("lower --learning-rate"),
    )


RESPONSES = (
    Rule("no-spread", ("reward_std", "groups/no_spread"), _no_spread),
    Rule("ends", ("completions/finished",), _ends),
    Rule("length", ("completions/mean_length",), _longer),
    Rule("repetition", ("completions/repetition",), _repetition),
    Rule("entropy-collapse", ("entropy",), _collapse),
    Rule("reward-range", ("calibration/outside",), _outside),
    Rule("reward-falling", ("reward",), _falling),
    Rule("displacement", ("logps/chosen",), _displacement),
    Rule("margin-negative", ("rewards/margins",), _reversed),
)
"""In the order in which they are judged."""
