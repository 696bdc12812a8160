"""Alarms about the updates: how far they move the model, and whether their numbers can be true."""

from __future__ import annotations

import math
from statistics import fmean, median

from ..metrics import lookup
from .rules import Find, Found, Rule, Tracks, bounds, factors, recent
from .tracks import KEPT, RECENT, Setup, clearly_below, error


def _negative_kl(tracks: Tracks, setup: Setup) -> Found | None:
    for name, whose in (
        ("objective/kl", "reference"),
        ("kl", "reference"),
        ("kl_teacher", "teacher"),
    ):
        track = tracks.get(name)
        if track and clearly_below(track, 0.0):
            mean = track.mean
            return Found(
                {name: mean},
                f"The KL to the {whose} stays below 0 ({mean:.3g} {lookup(name).unit} over the "
                f"last {RECENT} records), which cannot be true on average: the sampler draws from "
                "other probabilities than the trainer computes. "
                + setup.sentence(
                    "Turn off top-k, top-p and minimum length in the sampler, and try "
                    "--temperature 1 to see whether the temperature divides the logits everywhere"
                ),
            )
    return None


def _runaway_kl(tracks: Tracks, setup: Setup) -> Found | None:
    target, nats = setup.value("kl.target"), recent(tracks, "objective/kl")
    remedies = (
        "Raise --beta",
        "hold the KL with --kl.target",
        "lower --learning-rate",
        "stop earlier",
    )
    if isinstance(target, int | float) and nats is not None:
        most = factors("objective/kl")[1]
        if target > 0 and nats > most * target:
            return Found(
                {"objective/kl": nats},
                f"The KL to the reference is {nats:.3g} nats per response over the last {RECENT} "
                f"records, {nats / target:.2g} times --kl.target {target:g} (heuristic: at most "
                f"{most:g} times): beta does not rise fast enough to hold it. "
                + setup.sentence(
                    "Raise --beta to start from", "lower --kl.horizon", "lower --learning-rate"
                ),
            )
        return None
    track = tracks.get("kl")
    if not track or track.count < RECENT or nats is None:
        return None
    # short responses may be far away per token, and long ones in all; a runaway is both
    far = nats > bounds("objective/kl")[1] and track.mean > bounds("kl")[1]
    if not far or track.newest_five < 0.8 * track.mean:  # on its way back is no runaway
        return None
    return Found(
        {"objective/kl": nats, "kl": track.mean},
        f"The policy runs away from the reference: the KL is {nats:.3g} nats per response and "
        f"{track.mean:.3g} per token over the last {RECENT} records (heuristic: at most "
        f"{bounds('objective/kl')[1]:g} and {bounds('kl')[1]:g}), and a reward is seldom right so "
        f"far from where it was learned. {setup.sentence(*remedies)}",
    )


def _first_ratio(tracks: Tracks, setup: Setup) -> Found | None:
    value, (low, high) = tracks["ratio/first"].newest, bounds("ratio/first")
    if low <= value <= high:
        return None
    return Found(
        {"ratio/first": value},
        f"The probability ratio before the first update was {value:.4g}, but it must be 1: the "
        "policy that sampled is not the one that is trained. "
        + setup.sentence(
            "Turn dropout off, use one temperature everywhere, and compute log-probabilities with "
            "--run.precision float32"
        ),
    )


def _sampler_gap(tracks: Tracks, setup: Setup) -> Found | None:
    value, high = tracks["sampler_gap"].newest, bounds("sampler_gap")[1]
    if value <= high:
        return None
    return Found(
        {"sampler_gap": value},
        f"The log-probabilities of sampler and trainer differ by up to {value:.3g} nats "
        f"(heuristic: below {high:g}): the sampler has outdated weights, another temperature or "
        "another precision. "
        + setup.sentence(
            "Sync the weights after every step",
            "use --run.precision float32",
            "correct for it with --long.correction sequence_tis",
        ),
    )


def _weights(tracks: Tracks, setup: Setup) -> Found | None:
    effective, dropped = (recent(tracks, f"correction/{n}") for n in ("effective", "dropped"))
    remedies = setup.sentence(
        "Sync the sampler more often",
        "use a correction per token (--long.correction tis)",
        "raise --long.cap",
    )
    if effective is not None and effective < (low := bounds("correction/effective")[0]):
        return Found(
            {"correction/effective": effective},
            f"The importance weights leave {100 * effective:.3g}% of the batch over the last "
            f"{RECENT} records (heuristic: at least {100 * low:g}%): the sampler's probabilities "
            f"are far from the trainer's. {remedies}",
        )
    if dropped is not None and dropped > (high := bounds("correction/dropped")[1]):
        return Found(
            {"correction/dropped": dropped},
            f"The correction drops {100 * dropped:.3g}% of the tokens over the last {RECENT} "
            f"records (heuristic: at most {100 * high:g}%): the sampler and the trainer no longer "
            f"belong together. {remedies}",
        )
    return None


def _critic(tracks: Tracks, setup: Setup) -> Found | None:
    track, low = tracks["explained_variance"], bounds("explained_variance")[0]
    values = track.last(KEPT)
    if track.count < KEPT or track.mean >= low or fmean(values) + 3 * error(values) >= low:
        return None
    if track.mean > fmean(values) + error(values):  # a new critic begins below 0, and rises
        return None
    return Found(
        {"explained_variance": track.mean},
        "The critic explains less than a constant would (explained variance "
        f"{track.mean:.3g} over the last {RECENT} records; heuristic: above 0.3), so its "
        "advantages are noise: it learns too slowly for what the policy changes. "
        + more_critic(setup),
    )


def more_critic(setup: Setup) -> str:
    """What to do about a critic that learns too slowly."""
    start = setup.value("critic.start")
    remedies = ["raise --critic.coefficient", "give it a trunk of its own (--critic.start policy)"]
    if start != "shared":
        remedies = ["raise --critic.learning-rate"]
        if start != "reward":
            remedies.append("start it from the reward model (--critic.start reward)")
    return setup.sentence(*remedies, "lower --learning-rate")


def _update_kl(tracks: Tracks, setup: Setup) -> Found | None:
    mean, high = recent(tracks, "approx_kl"), bounds("approx_kl")[1]
    if mean is None or mean <= high:
        return None
    return Found(
        {"approx_kl": mean},
        f"The updates on one batch move the policy by {mean:.3g} nats per token over the last "
        f"{RECENT} records (heuristic: below {high:g}): the steps are too large. "
        f"{_smaller_steps(setup)}",
    )


def _clipping(tracks: Tracks, setup: Setup) -> Found | None:
    for name, what in (
        ("clip_ratio", "tokens are clipped"),
        ("clip_ratio/responses", "tokens lie in clipped responses"),
        ("clip_ratio/capped", "tokens have a capped weight"),
    ):
        mean = recent(tracks, name)
        if mean is not None and mean > (high := bounds(name)[1]):
            return Found(
                {name: mean},
                f"{100 * mean:.3g}% of {what} over the last {RECENT} records (heuristic: at most "
                f"{100 * high:g}%): the policy moves far within one batch. "
                f"{_smaller_steps(setup)}",
            )
    return None


def _smaller_steps(setup: Setup) -> str:
    several = [
        f"lower --{name}" for name in ("epochs", "minibatches") if (setup.value(name) or 2) != 1
    ]
    return setup.sentence("lower --learning-rate", *several)


def _spike(name: str, rate: str) -> Find:
    def find(tracks: Tracks, setup: Setup) -> Found | None:
        track, times = tracks[name], factors(name)[1]
        # a batch without advantages has no gradient, which is not the usual one
        norms = [v for v in track.last(KEPT) if v > 0]
        if len(norms) <= RECENT or track.newest <= times * (usual := median(norms)):
            return None
        # where norms differ a lot from batch to batch, a spike must stand out of that
        spread = median(abs(math.log(v / usual)) for v in norms)
        spikes = sum(v > usual * max(times, math.exp(min(8 * spread, 50.0))) for v in norms)
        # one that is clipped does no harm in a healthy run, unless it is huge
        if spikes == 0 or (spikes < 3 and track.newest <= times**2 * usual):
            return None
        whose = "critic's gradient" if name.startswith("critic") else "gradient"
        return Found(
            {name: track.newest},
            f"The norm of the {whose} is {track.newest:.3g}, {track.newest / usual:.3g} "
            f"times its median over the last {len(norms)} records, and {spikes} of them are spikes "
            f"(heuristic: at most two of {times:g} times, and none of {times**2:g}): "
            "a broken row, or steps that are too large. "
            + setup.sentence(
                "Look at the rows of this step",
                f"lower --{rate}",
                "lengthen --optimizer.warmup-steps",
                "lower --optimizer.max-grad-norm",
            ),
        )

    return find


def _rising(name: str) -> Find:
    def find(tracks: Tracks, setup: Setup) -> Found | None:
        track, most = tracks[name], factors(name)[1]
        if track.count < RECENT or track.first <= 0:
            return None
        # the first five may themselves be the explosion, and the first batch an easy one
        above_start = track.mean > most * track.start and track.count >= 2 * RECENT
        exploded = track.mean > 2 * track.first and min(track.last()) > track.first
        noise = 5 * error(track.last())
        usual = track.start if above_start else track.first
        if not (above_start or exploded) or track.mean - usual <= noise:
            return None
        unit = lookup(name).unit
        return Found(
            {name: track.mean},
            f"{lookup(name).title} rose from {usual:.3g} to {track.mean:.3g} {unit} over the last "
            f"{RECENT} records (heuristic: at most {most:g} times its start, and twice its first "
            "value): training diverges. "
            + setup.sentence("Lower --learning-rate", "lengthen --optimizer.warmup-steps"),
        )

    return find


UPDATES = (
    Rule("kl-negative", ("objective/kl", "kl", "kl_teacher"), _negative_kl),
    Rule("kl-runaway", ("kl", "objective/kl"), _runaway_kl),
    Rule("ratio-first", ("ratio/first",), _first_ratio),
    Rule("sampler-gap", ("sampler_gap",), _sampler_gap),
    Rule("weights", ("correction/effective", "correction/dropped"), _weights),
    Rule("critic", ("explained_variance",), _critic),
    Rule("update-kl", ("approx_kl",), _update_kl),
    Rule("clipping", ("clip_ratio", "clip_ratio/responses", "clip_ratio/capped"), _clipping),
    Rule("gradient-spike", ("grad_norm",), _spike("grad_norm", "learning-rate")),
    Rule(
        "critic-gradient-spike",
        ("critic/grad_norm",),
        _spike("critic/grad_norm", "critic.learning-rate"),
    ),
    Rule("loss-rising", ("loss",), _rising("loss")),
    Rule("teacher-kl-rising", ("kl_teacher",), _rising("kl_teacher")),
)
"""In the order in which they are judged."""
