r"""What is known to go wrong in losses, and the gradient that each mistake has in expectation, in closed form.

Whoever wrote it, a policy loss has on a population the gradient :math:`-E\sum_t c_t(y)\,\nabla\log\pi(y_t|s_t)`. For the right one
:math:`c_t = r(y) - \beta\sum_{u\ge t}\log(\pi/\pi_{ref})(y_u|s_u) - b(s_t)` with any baseline b of the state. A mistake changes c in a known way, so its
gradient is a product of NumPy tables and no loss is run to get it. `explain` finds the fewest mistakes that give the gradient that was found.

Shapes: P prompts, S states of a prompt, V tokens, Y responses, T tokens of a response; see `fiducial.lab.population`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import exact
from .population import Population, Rows, likelihoods, outside, pairs
from .world import EOS, Array

LEFT = 1e-6
"""A gradient is explained where no more than this share of it is left over."""


@dataclass(frozen=True)
class Fault:
    """A known mistake: what it is, what to do, and who has met it (project#number of an issue or a change; a paper)."""

    name: str
    words: str
    remedy: str
    seen: str = ""


_SHIFT = "shift the mask as the labels are shifted: column t of both speaks of token t"
_WHOLE = "sum over tokens and divide once, by the tokens of the whole batch or by a constant"
_IN_REWARD = "put k1 into the reward, or use k2 of the whole response as a loss"
_LAST = "read it at column lengths - 1, the prompt included"
_MASK = "select with the mask of the policy's own tokens"

CATALOGUE: dict[str, Fault] = {fault.name: fault for fault in (
    # -- which tokens count, and how much
    Fault("mean of means", "every response weighs the same whatever its length, so a token of a short one counts for more", _WHOLE, "the 1/|o| of GRPO"),
    Fault("mean of micro-batch means", "every micro-batch weighs the same however many tokens it has", _WHOLE, "torchtune#1875, open-instruct#1161"),
    Fault("mean of groups' means", "every prompt or group weighs the same however many tokens its responses have", _WHOLE),
    Fault("EOS not a label", "the EOS that ends a response is masked out, as happens where labels are found by comparing ids with a pad token that is EOS",
          "take the mask that was made together with the tokens; never derive it from pad ids", "transformers#23530, trl#976"),
    Fault("mask one early", "the mask is a token early: it leaves out every response's last token and takes in the prompt's", _SHIFT, "ms-swift#8427"),
    Fault("mask one late", "the mask is a token late: it leaves out every response's first token and takes in one of the padding", _SHIFT, "ms-swift#8427"),
    Fault("last token left out", "the last token of every response is left out", "the mask includes the token that ends a response, EOS or not"),
    Fault("first token left out", "the first token of every response is left out", "it is predicted at the prompt's last position: begin there", "trl#3681"),
    Fault("cut responses left out", "responses without EOS are left out", "keep them, or say that the objective is another", "DAPO's filter, on purpose"),
    Fault("trains on the prompt", "tokens of the prompt have a gradient", _MASK),
    Fault("trains on padding", "padding has a gradient or a log-probability that counts", _MASK),
    Fault("labels not shifted", "a token is looked up in the logits of its own position, which predict the next one", "logits[:, :-1] predict ids[:, 1:]"),
    Fault("labels shifted twice", "a token is looked up two positions in front of it: shifted by hand, and once more inside",
          "shift once: logits[:, :-1] predict ids[:, 1:]", "transformers#46898"),
    Fault("temperature missing", "log-probabilities are those of softmax(logits), while tokens were sampled from softmax(logits / temperature)",
          "divide the logits by the sampling temperature, in the policy, the old policy and the reference", "trl#3029"),
    Fault("log-softmax missing", "logits are used as if they were log-probabilities", "take log_softmax before looking tokens up"),
    Fault("sign turned", "the loss goes up where it should go down", "a loss is the negative of what is to grow"),
    # -- KL
    Fault("KL missing", "the KL penalty has no effect on the expected gradient: left out, detached where it should act, or k1 used as a loss",
          "take beta * (logprobs - ref_logprobs), detached, from each token's reward", "open-instruct#535, NeMo-RL#2506"),
    Fault("KL sign turned", "the policy is paid for leaving the reference", "the reward loses beta * (logprobs - ref_logprobs)"),
    Fault("wrong beta", "the KL penalty has the right direction and another strength",
          "look for a beta applied twice, a mean where a sum belongs, a reward that was scaled where the penalty was not"),
    Fault("k1 as a loss", "the sampled log-ratio, differentiated as a loss, has an expected gradient of zero", _IN_REWARD, "open-instruct#535"),
    Fault("k3 as a loss", "k3 is a good value, but differentiated it has the gradient of the forward KL(ref, pi)", _IN_REWARD,
          "Tang and Munos 2025, arXiv 2506.09477"),
    Fault("k3 of each token as a loss", "differentiated, k3 has the gradient of the forward KL(ref, pi), and of each token's alone, the states taken as given",
          _IN_REWARD, "GRPO, arXiv 2402.03300, on purpose; NeMo-RL#2506"),
    Fault("k3 of the inverse ratio as a loss", "k3 with pi / ref where ref / pi belongs", "k3 = exp(ref - logp) - 1 - (ref - logp)"),
    Fault("KL of each token alone", "a token pays for its own log-ratio only, and nothing for a prefix behind which the policy is far from the reference",
          "let a token's return hold the penalties of all later tokens, or use k2 of the whole response", "Tang and Munos 2025, arXiv 2506.09477"),
    Fault("k2 in the reward", "as a value k2 is biased, and so is the reward with it", "put k1 into the reward"),
    Fault("k3 in the reward", "k3 in the reward has the gradient of KL(pi, ref) - KL(ref, pi)", "put k1 into the reward"),
    Fault("KL cut off at zero", "negative log-ratios are set to 0, so the expected penalty is not the KL", "keep the sign: only the mean is never negative"),
    Fault("|log-ratio| in the reward", "the absolute log-ratio is no estimate of the KL", "keep the sign: only the mean is never negative"),
    Fault("KL divided by the length", "a response pays the mean over its tokens instead of their sum", "sum over the tokens of a response"),
    Fault("reverse instead of forward KL", "the gradient is that of KL(pi, ref)", "k3 of the whole response, as a loss, has that of KL(ref, pi)"),
    Fault("entropy bonus", "the policy is paid for its entropy too, so the optimum is another", "0 for the objective as it stands; a bonus is a choice"),
    Fault("advantage carries a gradient", "the penalty inside the advantage is differentiated as well", "detach the advantage"),
    # -- reward and return
    Fault("reward missing", "rewards have no effect on the expected gradient", "look for a reward that is added where the mask is false"),
    Fault("reward lost on padded rows", "only rows without padding keep their reward: it stands behind the last token, where the mask is false",
          "put it at each row's last token: column lengths - 1", "trl#3750"),
    Fault("reward placed without the prompt", "the reward stands at the response's length counted from the start of the row",
          "put it at column lengths - 1, the prompt included"),
    Fault("reward lost at EOS", "only cut responses keep their reward", "the reward stands at EOS, so the mask must include it"),
    Fault("reward lost where cut", "responses without EOS lose their reward", "put it at the last token, EOS or not"),
    Fault("first EOS of the row", "the end is taken to be the first EOS of the row, which may stand inside the prompt", "look for EOS behind the prompt only",
          "trl#6805, transformers#35352"),
    Fault("reward at every token", "the reward is added at each token: a long response is paid many times", "add it once, at the last token"),
    Fault("return without the token's own reward", "the reward-to-go begins a token late", "the return of token t holds the reward of token t"),
    Fault("each token paid alone", "no reward reaches earlier tokens: it is not summed, or summed forwards", "sum rewards from each token to the end"),
    Fault("discount", "gamma below 1, or lambda below 1 without a critic: early tokens are credited with a part of the reward",
          "gamma = 1 for text; with lambda below 1 use a critic"),
    Fault("lambda with an inexact critic", "the return is cut short by a critic that is wrong: bias in exchange for less variance",
          "nothing, if that is meant; lambda = 1 has no bias"),
    Fault("bootstraps past the end", "a value is read behind the last token, where there is no state", "the value behind the end is 0"),
    Fault("value read one token late", "a token meets the value of the state behind it, which depends on the token", "column t is the state before token t"),
    # -- groups
    Fault("group mean includes itself", "the mean of the group holds the response's own reward: advantages are (G - 1) / G of what they should be",
          "take the mean of the others, or multiply by G / (G - 1)", "GRPO with the penalty as a loss"),
    Fault("divided by the group's deviation", "groups whose rewards hardly differ count as much as all others",
          "leave the division out (Dr. GRPO, arXiv 2503.20783), or know that it is a bias", "GRPO, arXiv 2402.03300, on purpose"),
    # -- off policy
    Fault("not clipped", "the gradient goes on where the clip should cut it", "min(ratio * A, clip(ratio) * A)"),
    Fault("clipped without the minimum", "the clip cuts on both sides whichever way the advantage points: a policy that went astray is not brought back",
          "min(ratio * A, clip(ratio) * A)"),
    Fault("maximum instead of minimum", "the larger branch is taken: what should be pessimistic is optimistic",
          "the minimum of what should grow, or the maximum of the negatives"),
    Fault("ratio always one", "the policy that sampled has no effect", "old_logprobs are those of the policy that sampled, not of this one detached"),
    Fault("ratio inverted", "the ratio is old over new", "ratio = exp(logprobs - old_logprobs)"),
    # -- preferences
    Fault("chosen and rejected exchanged", "what was rejected is preferred", "-logsigmoid(chosen - rejected)"),
    Fault("reference missing", "the reference has no effect", "the margin is of log(pi / pi_ref)"),
    Fault("reference turned round", "the reference's log-ratio has the wrong sign", "h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)"),
    Fault("reference is the policy", "the margin is always 0: the reference is the policy that is trained", "freeze a copy before training"),
    Fault("beta missing", "the margin is not multiplied by beta inside the sigmoid", "-logsigmoid(beta * h)"),
    Fault("beta twice", "the margin is multiplied by beta twice", "-logsigmoid(beta * h)"),
    Fault("divided by the length", "log-ratios are means over a response's tokens", "sum over tokens; a mean is another method (length-normalised DPO, SimPO)"),
    Fault("no logarithm", "the loss is -sigmoid of the margin", "-logsigmoid"),
    Fault("hinge", "the loss is max(0, 1 - margin), as in SLiC", "-logsigmoid(beta * h)"),
    Fault("squared margin", "the loss is (h - 1 / (2 beta))^2, which is IPO", "-logsigmoid(beta * h)"),
    Fault("label smoothing", "labels are taken to be wrong now and then, so the minimum is elsewhere", "0 for the plain loss; conservative DPO is a choice"),
    # -- reward models
    Fault("score read one token early", "the score is read at the token before the last: EOS is never seen", _LAST),
    Fault("EOS taken for padding", "the last token that is not padding is looked for, but EOS is the pad token: what has ended is read one token early", _LAST,
          "transformers#35352"),
    Fault("score read at the first padding", "the score is read behind the last token", _LAST),
    Fault("score read in the last column", "the score is read in the last column, which is padding for all but the longest rows", _LAST),
    Fault("score read without the prompt", "the score is read at the response's length counted from the start of the row", _LAST),
    Fault("score is a mean over tokens", "the score is the mean over the response", _LAST),
    Fault("score is a sum over tokens", "the score is the sum over the response", _LAST),
    Fault("centred scores", "scores are pulled to mean 0", "nothing, if that is meant: the differences of scores are a little too small"),
    # -- critics
    Fault("penalty missing from the target", "returns hold the reward but not the KL penalty", "the critic expects what the policy is paid, penalty included"),
    Fault("advantage as the target", "the critic is fitted to the advantage", "its target is the advantage plus the old value"),
    # -- found by trying it out
    Fault("no gradient", "the loss does not depend on what is learned", "look for a detach, a no_grad, an argmax"),
    Fault("zero in expectation", "single rows have a gradient, but their mean has none", "look for a term whose gradient is a score: E[grad log pi] = 0"),
    Fault("not finite", "the loss or its gradient is not finite", "look for 0 / 0 (a group of equal rewards), log 0, a mask that multiplies"),
    Fault("random", "the same batch gives another gradient the second time", "switch dropout off; draw no random numbers inside a loss"),
    Fault("padding counts", "more padding changes the gradient", "sums, counts and whitening's statistics are over true positions of the mask", "SkyRL#1305"),
    Fault("depends on the order of rows", "the same rows in another order give another gradient",
          "look for micro-batches that weigh the same whatever they hold, and for statistics of a part of the batch"),
    Fault("groups mixed", "groups in another order give another gradient: responses are compared with those of other groups",
          "form groups by their ids, or view as [groups, G] where a group's rows stand together (repeat_interleave, not repeat)"),
    Fault("copies count", "a batch with every row twice has a gradient of another direction", "look for statistics that depend on the size of the batch"),
    Fault("reads the prompt's tokens", "other tokens in the prompt change the gradient",
          "look for a search for EOS over the whole row, and for groups formed by the prompt's tokens", "trl#6805, NeMo-RL#3882"),
    Fault("rounding", "the gradient is right to a few digits only", "look for float16 or bfloat16: log-softmax wants float32"),
    Fault("unknown", "biased, and no known mistake has this gradient", ""),
)}  # fmt: skip
"""Every name that a verdict can carry, but for "correct"."""


# ---- finding them ----


@dataclass(frozen=True)
class Candidate:
    """A direction of descent with these mistakes: a positive multiple of `fixed` + x * `strength` + y * `some` + any of `free`.

    strength: the KL penalty's part, at any x, which is then named unless it is 1. some: at any y > 0. free: baselines, at any factors.
    """

    names: tuple[str, ...]
    fixed: Array
    strength: Array | None = None
    some: Array | None = None
    free: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The mistakes found, and the strength of the KL penalty as a multiple of the right one."""

    names: tuple[str, ...]
    strength: float = 1.0


def fit(direction: Array, candidate: Candidate, group: int = 1) -> Explanation | None:
    """The explanation, where the direction is what the candidate gives."""
    optional = [x for x in (candidate.strength, candidate.some) if x is not None]
    columns = np.stack([x.ravel() for x in (candidate.fixed, *optional, *candidate.free)], 1)
    g, lengths = direction.ravel(), np.linalg.norm(columns, axis=0)
    size, live = np.linalg.norm(g), lengths > 1e-12
    found = np.zeros(len(live))
    found[live] = np.linalg.lstsq(columns[:, live], g, rcond=1e-12)[0]
    if np.linalg.norm(g - columns @ found) > LEFT * size:
        return None
    a = float(found[0])
    if abs(a) * lengths[0] < 1e-6 * size:  # only the penalty is left
        return Explanation((*candidate.names, "reward missing")) if candidate.strength is not None and found[1] > 0 else None
    if candidate.some is not None and found[len(optional)] / a < 1e-9:
        return None
    names = (*candidate.names, "sign turned") if a < 0 else candidate.names
    if candidate.strength is None or not live[1]:
        return Explanation(names)
    strength = float(found[1]) / a
    return Explanation((*names, *_of_strength(strength, group)), strength)


def _of_strength(strength: float, group: int) -> tuple[str, ...]:
    known = {1.0: (), 0.0: ("KL missing",), -1.0: ("KL sign turned",)}
    if group > 1:
        known[group / (group - 1)] = ("group mean includes itself",)
    return next((names for value, names in known.items() if abs(strength - value) < 1e-5), ("wrong beta",))


def explain(direction: Array, candidates: Iterable[Candidate], group: int = 1) -> Explanation | None:
    """The fewest mistakes that give this direction of descent, or None."""
    best: Explanation | None = None
    for candidate in candidates:
        if best is not None and (len(best.names) == 1 or len(candidate.names) >= len(best.names)):
            continue
        found = fit(direction, candidate, group)
        if found is not None and found.names and (best is None or len(found.names) < len(best.names)):
            best = found
    return best


# ---- what losses are made of ----


@dataclass(frozen=True, eq=False)
class Terms:
    """Of every response of a population, [P, Y, T] where nothing else is said, 0 behind the end."""

    population: Population

    @functools.cached_property
    def known(self) -> Array:
        """1 at tokens."""
        path = self.population.tree.path
        return np.broadcast_to(path >= 0, (len(self.population.world.prompts), *path.shape)).astype(float)

    @functools.cached_property
    def likely(self) -> Array:
        """[P, Y] probability in the data; sums to 1 over all."""
        return likelihoods(self.population) / len(self.population.world.prompts)

    def of(self, table: Array) -> Array:
        """Entries of a table [P, S, V] at the tokens, or of [P, S] in their states."""
        tree = self.population.tree
        found = table[:, tree.path, tree.token] if table.ndim == 3 else table[:, tree.path]
        return np.where(self.known > 0, found, 0.0)

    @functools.cached_property
    def logp(self) -> Array:
        """log pi of each token."""
        return self.of(self.population.policy)

    @functools.cached_property
    def log_ratio(self) -> Array:
        """log pi / pi_ref of each token."""
        return self.of(self.population.policy - exact.log_softmax(self.population.world.reference))

    @functools.cached_property
    def lengths(self) -> Array:
        """[P, Y, 1]"""
        return self.known.sum(-1, keepdims=True)

    @functools.cached_property
    def prompt_lengths(self) -> Array:
        """[P, 1, 1]"""
        return np.array([len(p) for p in self.population.world.prompts], dtype=float)[:, None, None]

    @functools.cached_property
    def widest(self) -> Array:
        """[P, Y, 1] 1 for rows without padding."""
        total = self.prompt_lengths + self.lengths
        return (total == total.max()).astype(float)

    @functools.cached_property
    def finished(self) -> Array:
        """[1, Y, 1]"""
        return self.population.tree.finished.astype(float)[None, :, None]

    @functools.cached_property
    def position(self) -> Array:
        """[T]"""
        return np.arange(self.population.tree.horizon, dtype=float)

    @functools.cached_property
    def last(self) -> Array:
        """1 at last tokens."""
        return self.known * (self.position == self.lengths - 1)

    @functools.cached_property
    def reward(self) -> Array:
        """[P, Y, 1]"""
        return self.population.world.reward[..., None]

    @functools.cached_property
    def value(self) -> Array:
        """The old value of each token's state."""
        return self.of(self.population.old_values)

    @functools.cached_property
    def behind(self) -> Array:
        """What stands in the column of old values behind the last token, at the last token; 0 where there is no such column."""
        ends, _ = outside(self.population, "old values")
        return ends[..., None] * (1 - self.widest) * self.last

    @functools.cached_property
    def scores(self) -> Array:
        """[P, Y, T, S, V] grad log pi of each token by the raw logits of its prompt's states."""
        tree, policy = self.population.tree, np.exp(self.population.policy)
        out = np.zeros((*self.known.shape, *policy.shape[1:]))
        for y, t in np.argwhere(tree.path >= 0):
            s, v = tree.path[y, t], tree.token[y, t]
            out[:, y, t, s] = -policy[:, s]
            out[:, y, t, s, v] += 1.0
        return out / self.population.temperature

    def gradient(self, c: Array) -> Array:
        """[P, S, V] E sum_t c_t grad log pi."""
        return np.einsum("py,pyt,pytsv->psv", self.likely, np.broadcast_to(c, self.known.shape) * self.known, self.scores, optimize=True)

    def pull(self, c: Array, *, late: bool = False) -> Array:
        """[P, S] E sum_t c_t at each token's state, or at the state behind it."""
        tree = self.population.tree
        c = np.broadcast_to(c, self.known.shape)
        out = np.zeros(self.population.values.shape)
        for y, t in np.argwhere(tree.path >= 0):
            s = tree.path[y, t] if not late else (tree.path[y, t + 1] if t + 1 < tree.lengths[y] else -1)
            if s >= 0:
                out[:, s] += self.likely[:, y] * c[:, y, t]
        return out


def to_go(x: Array, discount: float = 1.0) -> Array:
    """sum_{u >= t} discount^(u - t) x_u along the last axis."""
    out, running = np.zeros_like(x), np.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        running = x[..., t] + discount * running
        out[..., t] = running
    return out


def behind(x: Array) -> Array:
    """Column t + 1 in column t, 0 in the last."""
    return np.concatenate([x[..., 1:], np.zeros_like(x[..., :1])], -1)


DISCOUNTS = (1.0, 0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5, 0.0)


def weights(t: Terms) -> dict[str, list[Array]]:
    """How much each token counts, by mistake."""
    mean = (t.likely[..., None] * t.lengths).sum(1, keepdims=True) / t.likely.sum(1)[:, None, None]
    return {
        "": [t.known],
        "mean of means": [t.known / t.lengths, t.known / (t.lengths + t.prompt_lengths)],
        "EOS not a label": [t.known - t.last * t.finished],
        "last token left out": [t.known - t.last],
        "first token left out": [t.known * (t.position > 0)],
        "cut responses left out": [t.known * t.finished],
        "mean of groups' means": [t.known / mean],
    }


def places(t: Terms) -> dict[str, Array]:
    """Each token's reward, by mistake."""
    reward = t.reward * t.last
    inside = np.array([EOS in p for p in t.population.world.prompts])[:, None, None]
    return {
        "": reward,
        "reward lost on padded rows": reward * t.widest,
        "reward placed without the prompt": t.reward * t.known * (t.position == t.lengths - 1 - t.prompt_lengths),
        "reward lost at EOS": reward * (1 - t.finished),
        "reward lost where cut": reward * t.finished,
        "first EOS of the row": reward * t.finished * ~inside,
        "reward at every token": t.reward * t.known,
    }


@dataclass(frozen=True)
class Price:
    """What a token pays for its log-ratio; `carried`: it is credited to earlier tokens too, or else it is the token's coefficient as it stands."""

    cost: Array
    carried: bool = True


def penalties(t: Terms) -> dict[str, list[Price]]:
    """The KL penalty, by mistake. A loss f of a log-ratio has the coefficient f', of a token's own ratio or of the whole response's."""
    lr, whole = t.log_ratio, t.log_ratio.sum(-1, keepdims=True) * t.known
    so_far, all_of_it = np.cumsum(t.logp, -1) * t.known, t.logp.sum(-1, keepdims=True)
    return {
        "": [Price(lr)],
        "k2 in the reward": [Price(lr**2 / 2), Price(whole**2 / 2, False)],
        "k3 in the reward": [Price(np.expm1(-lr) + lr), Price(np.expm1(-whole) + whole, False)],
        "KL cut off at zero": [Price(np.maximum(lr, 0.0)), Price(np.maximum(whole, 0.0), False)],
        "|log-ratio| in the reward": [Price(np.abs(lr)), Price(np.abs(whole), False)],
        "KL divided by the length": [Price(lr / t.lengths)],
        "KL of each token alone": [Price(lr, False)],
        "k3 as a loss": [Price(-np.expm1(-whole), False)],
        "k3 of each token as a loss": [Price(-np.expm1(-lr), False)],
        "k3 of the inverse ratio as a loss": [Price(np.expm1(lr), False), Price(np.expm1(whole), False)],
        # -A(theta) sum log pi: the derivative of the second factor is right, that of the first adds log pi to the cost
        "advantage carries a gradient": [Price(to_go(lr) + so_far, False), Price(whole + all_of_it, False)],
    }


def credits(t: Terms) -> dict[str, Callable[[Array], Array]]:
    """From rewards of tokens to what a token is credited with, by mistake."""
    return {
        "": to_go,
        "return without the token's own reward": lambda x: (to_go(x) - x) * t.known,
        "each token paid alone": lambda x: x,  # and the sum from the start: the difference was paid before, a baseline
    }


def baselines(t: Terms) -> list[Array]:
    """What a right loss may subtract, and a wrong one then subtracts in its own way: a constant for each prompt, the critic, what was paid before."""
    prompts = [t.known * (np.arange(len(t.known)) == p)[:, None, None] for p in range(len(t.known))]
    return [*prompts, t.value, (np.cumsum(t.log_ratio, -1) - t.log_ratio) * t.known]


# ---- policies ----


def policy_candidates(population: Population, objective: str) -> Iterator[Candidate]:
    """Directions in which mistaken losses push a policy, those with one mistake before those with two. `objective`: "J", "reward" or "kl"."""
    t, beta = Terms(population), population.world.beta if objective == "J" else 1.0
    weight, place, penalty, credit = weights(t), places(t), penalties(t), credits(t)
    free = {name: [tuple(t.gradient(w * b) for b in baselines(t)) for w in ws] for name, ws in weight.items()}

    def candidate(names: tuple[str, ...], w: Array, reward: Array, price: Price, back: Callable[[Array], Array], unknown: tuple[Array, ...]) -> Candidate:
        cost = t.gradient(-beta * w * (back(price.cost) if price.carried else price.cost))
        if objective == "kl":
            return Candidate(names, cost, free=unknown)
        return Candidate(names, t.gradient(w * back(reward)), strength=cost if objective == "J" else None, free=unknown)

    some_places = place if objective != "kl" else {"": place[""]}
    some_penalties = penalty if objective != "reward" else {"": penalty[""]}
    some_credits = credit if objective != "kl" else {"": to_go}
    choices = [
        (tuple(n for n in (a, b, c, d) if n), a, b, c, d) for a in weight for b in some_places for c in some_credits for d in some_penalties
    ]
    for most in (0, 1, 2):
        for names, a, b, c, d in sorted(choices, key=lambda x: not x[1]):  # where a mask and a reward explain the same, it is the mask
            if len(names) == most:
                for i, w in enumerate(weight[a]):
                    for price in some_penalties[d]:
                        yield candidate(names, w, place[b], price, credit[c], free[a][i])
        if most == 1 and objective != "kl":
            surprise = t.gradient(-t.logp)  # the gradient of the entropies, the states taken as given
            right = candidate((), t.known, place[""], penalty[""][0], to_go, ())
            yield Candidate(("entropy bonus",), right.fixed, right.strength, surprise)
            yield from _with_a_critic(t, candidate, free)


def _with_a_critic(t: Terms, candidate: Callable[..., Candidate], free: dict[str, list[tuple[Array, ...]]]) -> Iterator[Candidate]:
    """A_t = sum_k (gamma lambda)^k delta_{t + k}, delta_t = r_t + gamma V_{t + 1} - V_t: rewards and critic apart."""
    reward, price = places(t)[""], penalties(t)[""][0]

    def gae(name: tuple[str, ...], x: float, critic: Array) -> Candidate:
        made = candidate(name, t.known, reward, price, functools.partial(to_go, discount=x), ())
        return Candidate(name, made.fixed + t.gradient(critic), made.strength)

    late = behind(t.value) + t.behind
    for x in DISCOUNTS:
        back = functools.partial(to_go, discount=x)
        for weight in ("", "mean of means", "EOS not a label", "last token left out", "first token left out"):
            for i, w in enumerate(weights(t)[weight]):
                name = (weight,) if weight else ()
                made = candidate(name, w, reward, price, back, ())
                critic = t.gradient(w * back(behind(t.value) - t.value))
                if x < 1 and t.value.any():
                    yield Candidate(name or ("lambda with an inexact critic",), made.fixed + critic, made.strength)
                    yield candidate((*name, "discount"), w, reward, price, back, free[weight][i])
        yield gae(("bootstraps past the end",), x, back(behind(t.value) - t.value + t.behind))
        yield gae(("value read one token late",), x, back(behind(late) * t.known - late))
    for gamma in DISCOUNTS[1:]:
        for lam in DISCOUNTS:
            yield gae(("discount",), gamma * lam, to_go(gamma * behind(t.value) - t.value, gamma * lam))


def group_candidates(population: Population, objective: str) -> Iterator[Candidate]:
    """Customs of GRPO, in groups of two: dividing by the deviation, means within responses or groups; where the penalty is in the reward, and apart."""
    t, beta = Terms(population), population.world.beta
    p, lengths = likelihoods(population), t.lengths[..., 0]
    together = 1 / (lengths[:, :, None] + lengths[:, None, :])  # [P, Y, Y] of the two responses' tokens

    def over_partners(x: Array) -> Array:
        return np.einsum("pij,pj->pi", x, p)[..., None]

    alone = np.ones_like(together)
    shares: dict[tuple[str, ...], tuple[Array, Array]] = {
        (): (t.known, alone), ("mean of means",): (t.known / t.lengths, alone), ("mean of groups' means",): (t.known, together)
    }  # fmt: skip
    for inside in (True, False) if objective == "J" else (True,):
        reward = population.world.reward - (beta * t.log_ratio.sum(-1) if inside and objective == "J" else 0.0)
        difference = reward[:, :, None] - reward[:, None, :]
        for deviation, half in _halves(difference):
            for means, (w, share) in shares.items():
                names = (*deviation, *means)
                if not names:
                    continue
                gain = t.gradient(w * over_partners(half * share))
                if inside:
                    yield Candidate(names, gain)
                    continue
                for penalty, prices in penalties(t).items():
                    for price in prices:
                        cost = to_go(price.cost) if price.carried else price.cost
                        yield Candidate((*names, penalty) if penalty else names, gain, t.gradient(-beta * w * over_partners(share) * cost))


def _halves(difference: Array) -> Iterator[tuple[tuple[str, ...], Array]]:
    """The advantage of the first of two, by what it is divided by."""
    yield (), difference
    for correction in (1, 0):
        for eps in (0.0, 1e-8, 1e-6, 1e-5, 1e-4):
            sigma = np.abs(difference) / np.sqrt(2.0 if correction else 4.0) + eps
            yield ("divided by the group's deviation",), np.divide(difference / 2, sigma, out=np.zeros_like(difference), where=sigma > 0)


def clip_candidates(population: Population, clip: float) -> Iterator[Candidate]:
    """The clipped surrogate off policy, of the advantages in the batch."""
    t = Terms(population)
    ratio, a = np.exp(t.logp - t.of(population.data)), t.of(population.advantages)

    def kept(r: Array, sign: float) -> Array:
        cut = ((sign * a > 0) & (r > 1 + clip)) | ((sign * a < 0) & (r < 1 - clip))
        return np.where(cut, 0.0, 1.0)

    kinds = {
        "": ratio * a * kept(ratio, 1),
        "not clipped": ratio * a,
        "clipped without the minimum": ratio * a * kept(ratio, 1) * kept(ratio, -1),
        "maximum instead of minimum": ratio * a * kept(ratio, -1),
        "ratio always one": a,
        "ratio inverted": -a / ratio * kept(1 / ratio, 1),
    }
    for kind, c in kinds.items():
        for weight, ws in weights(t).items():
            for w in ws:
                yield Candidate(tuple(n for n in (kind, weight) if n), t.gradient(w * c))


def likelihood_candidates(population: Population) -> Iterator[Candidate]:
    """The negative log-likelihood of the responses as demonstrations."""
    t = Terms(population)
    for weight, ws in weights(t).items():
        for w in ws:
            yield Candidate((weight,) if weight else (), t.gradient(w))
    uniform = exact.visits(population.tree, population.data)[..., None] * (1 / 3 - np.exp(population.policy)) / population.temperature
    yield Candidate(("label smoothing",), t.gradient(t.known), some=uniform)


def forward_candidates(population: Population) -> Iterator[Candidate]:
    """Where KL(ref, pi) is meant."""
    t, price = Terms(population), penalties(Terms(population))
    yield Candidate(("reverse instead of forward KL",), t.gradient(-to_go(t.log_ratio)))
    kinds = {"": "k3 as a loss", "KL of each token alone": "k3 of each token as a loss", "reverse instead of forward KL": "KL of each token alone"}
    for name, kind in kinds.items():
        for weight, ws in weights(t).items():
            for w in ws:
                yield Candidate(tuple(n for n in (name, weight) if n), t.gradient(-w * price[kind][0].cost))


def critic_candidates(population: Population) -> Iterator[Candidate]:
    """Where the squared error to mistaken returns pulls values."""
    t, beta = Terms(population), population.world.beta
    now = t.of(population.values)
    penalty, right = -beta * t.log_ratio, places(t)[""]

    def target(x: float, reward: Array, boot: Array) -> Array:
        return to_go(reward, x) + to_go(boot, x)

    steps = behind(t.value) - t.value
    for x in DISCOUNTS:
        whole = target(x, right + penalty, steps) + t.value
        for weight, ws in weights(t).items():
            for place, reward in places(t).items():
                names = tuple(n for n in (weight, place) if n)
                if len(names) < 2:
                    for w in ws:
                        yield Candidate(names, t.pull(w * (target(x, reward + penalty, steps) + t.value - now)))
        yield Candidate(("bootstraps past the end",), t.pull(target(x, right + penalty, steps + t.behind) + t.value - now))
        yield Candidate(("penalty missing from the target",), t.pull(target(x, right, steps) + t.value - now))
        yield Candidate(("KL sign turned",), t.pull(target(x, right - penalty, steps) + t.value - now))
        yield Candidate(("advantage as the target",), t.pull(whole - t.value - now))
        yield Candidate(("value read one token late",), t.pull(whole - behind(now), late=True))
    for gamma in DISCOUNTS[1:]:
        for lam in DISCOUNTS:
            yield Candidate(("discount",), t.pull(target(gamma * lam, right + penalty, gamma * behind(t.value) - t.value) + t.value - now))


# ---- pairs ----


def pair_weights(population: Population) -> Array:
    """[P, Y, Y] how often the second axis's response was preferred to the third's; sums to 1."""
    prompt, chosen, rejected = pairs(population)
    out = np.zeros((len(population.world.prompts), *[len(population.world.responses)] * 2))
    np.add.at(out, (prompt, chosen, rejected), 1.0 / len(prompt))
    return out


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


SLOPES: dict[str, Callable[[Array], Array]] = {
    "": lambda u: _sigmoid(-u),
    "no logarithm": lambda u: _sigmoid(u) * _sigmoid(-u),
    "hinge": lambda u: (u < 1).astype(float),
    "squared margin": lambda u: 2 * (0.5 - u),
}
"""-dL/du of a loss of the margin u, which holds beta, up to a factor; by what the loss is."""


def preference_gradient(
    population: Population, *, weight: Array | None = None, ref: float | None = 1.0, beta: float | None = None, kind: str = "", given: Array | float = 0.0
) -> Array:
    """[P, S, V] minus the gradient of the expected DPO loss.

    Args:
        weight: [P, Y, T] how much a token counts in a log-ratio.
        ref: the factor of the reference's log-probabilities; None: the reference is the policy.
        beta: inside the loss; negative: chosen and rejected are exchanged.
        given: [P, Y] what padding adds to a log-ratio.
    """
    t = Terms(population)
    beta = population.world.beta if beta is None else beta
    weight = t.known if weight is None else weight
    other = t.logp if ref is None else ref * (t.logp - t.log_ratio)
    ratio = (weight * (t.logp - other)).sum(-1) + given
    slope = pair_weights(population) * SLOPES[kind](beta * (ratio[:, :, None] - ratio[:, None, :]))
    return np.einsum("py,pyt,pytsv->psv", beta * (slope.sum(2) - slope.sum(1)), weight, t.scores, optimize=True)


def _padding(population: Population) -> tuple[Array, Array]:
    """[P, Y] the log-ratio of the first token of padding, and of all of it. Padding is EOS."""
    t = Terms(population)
    first, more = (a - b for a, b in zip(_pad_logprobs(population, "logits"), _pad_logprobs(population, "reference"), strict=True))
    width = int((t.prompt_lengths + t.lengths).max())
    start = (t.prompt_lengths + t.lengths)[..., 0].astype(int)
    # the first column behind the end is predicted at the last token, a later one at the padding before it
    later = np.array([[more[s:-1].sum() if s < width else 0.0 for s in row] for row in start])
    first = first * (start < width)
    return first, first + later


def _pad_logprobs(population: Population, kind: Literal["logits", "reference"]) -> tuple[Array, Array]:
    ends, columns = outside(population, kind, 3)
    return tuple(exact.log_softmax(x / population.temperature)[..., EOS] for x in (ends, columns))  # type: ignore[return-value]


def preference_candidates(population: Population) -> Iterator[Candidate]:
    """Mistaken preference losses."""
    beta, t = population.world.beta, Terms(population)
    counted: dict[str, list[tuple[Array, Array | float]]] = {
        name: [(w, 0.0) for w in weights(t)[name]] for name in ("", "EOS not a label", "last token left out", "first token left out")
    }
    first, padding = _padding(population)
    counted["divided by the length"] = [(w, 0.0) for w in weights(t)["mean of means"]]
    counted["first token left out"] += [(t.known * (t.position > 0), first)]
    counted["trains on padding"] = [(t.known, padding)]
    right, swapped = preference_gradient(population), preference_gradient(population, beta=-beta)
    yield Candidate(("chosen and rejected exchanged",), swapped)
    yield Candidate(("label smoothing",), right, some=swapped)
    refs = {"": 1.0, "reference missing": 0.0, "reference turned round": -1.0, "reference is the policy": None}
    betas = {"": beta, "beta missing": 1.0, "beta twice": beta**2}
    choices = [(tuple(n for n in (a, b, c, d) if n), a, b, c, d) for a in counted for b in refs for c in betas for d in SLOPES]
    for names, a, b, c, d in sorted(choices, key=lambda x: len(x[0])):
        if len(names) <= 2:
            for w, given in counted[a]:
                yield Candidate(names, preference_gradient(population, weight=w, ref=refs[b], beta=betas[c], kind=d, given=given))


def score_table(population: Population) -> Array:
    """[P, S + Y] scores behind each token that does not end a response, and of each response."""
    return np.concatenate([population.inner_scores, population.scores], 1)


def reward_gradient(population: Population, *, pooling: Array | None = None, given: Array | float = 0.0, sign: float = 1.0, kind: str = "") -> Array:
    """[P, S + Y] minus the gradient of the expected Bradley-Terry loss.

    Args:
        pooling: [P, Y, S + Y] how a response's score is read from the table; default: its own.
        given: [P, Y] what is read outside it, from padding or the prompt.
        sign: -1: chosen and rejected are exchanged.
    """
    states, responses = len(population.tree.states), len(population.tree.responses)
    if pooling is None:
        pooling = np.broadcast_to(np.eye(states + responses)[states:], (len(population.world.prompts), responses, states + responses))
    score = np.einsum("pyk,pk->py", pooling, score_table(population)) + given
    slope = pair_weights(population) * SLOPES[kind](sign * (score[:, :, None] - score[:, None, :]))
    return sign * np.einsum("py,pyk->pk", slope.sum(2) - slope.sum(1), pooling)


def reward_candidates(population: Population) -> Iterator[Candidate]:
    """Mistaken losses of reward models: read elsewhere, or another function of the margin."""
    world, tree = population.world, population.tree
    node, ids, rest = population.positions
    states, responses, width = len(tree.states), len(tree.responses), node.shape[2]
    first_row, ends = len(world.prompts) * states, len(world.prompts) * (states + responses)

    def read(columns: Callable[[int, int, Rows], list[int]], mean: bool = False) -> tuple[Array, Array]:
        pooling, given = np.zeros((len(world.prompts), responses, states + responses)), np.zeros((len(world.prompts), responses))
        for p, y in np.ndindex(*given.shape):
            chosen = columns(len(world.prompts[p]), int(tree.lengths[y]), ids[p, y])
            for n in (int(node[p, y, c]) for c in chosen):
                share = 1 / len(chosen) if mean else 1.0
                if n >= ends:
                    given[p, y] += share * rest[n - ends]
                else:
                    pooling[p, y, n - p * states if n < first_row else states + y] += share
        return pooling, given

    readings = {
        "": read(lambda p, n, row: [p + n - 1]),
        "score read one token early": read(lambda p, n, row: [p + n - 2]),
        "EOS taken for padding": read(lambda p, n, row: [int(np.flatnonzero(row != EOS).max())]),
        "first EOS of the row": read(lambda p, n, row: [int((row == EOS).argmax())]),
        "the token before the first EOS": read(lambda p, n, row: [int((row == EOS).argmax()) - 1]),
        "score read at the first padding": read(lambda p, n, row: [min(p + n, width - 1)]),
        "score read in the last column": read(lambda p, n, row: [width - 1]),
        "score read without the prompt": read(lambda p, n, row: [n - 1]),
        "score is a mean over tokens": read(lambda p, n, row: list(range(p, p + n)), mean=True),
        "score is a sum over tokens": read(lambda p, n, row: list(range(p, p + n))),
    }
    kinds = [k for k in SLOPES if k != "squared margin"]
    for most in (0, 1, 2):
        for reading, (pooling, given) in readings.items():
            for exchanged, sign in (("", 1.0), ("chosen and rejected exchanged", -1.0)):
                for kind in kinds:
                    name = "first EOS of the row" if reading == "the token before the first EOS" else reading
                    names = tuple(n for n in (name, exchanged, kind) if n)
                    if len(names) == most:
                        yield Candidate(names, reward_gradient(population, pooling=pooling, given=given, sign=sign, kind=kind))
    both = pair_weights(population) + pair_weights(population).swapaxes(1, 2)
    pull = -(both * (population.scores[:, :, None] + population.scores[:, None, :])).sum(2)
    centred = np.concatenate([np.zeros((len(world.prompts), states)), pull], 1)
    yield Candidate(("centred scores",), reward_gradient(population), some=centred)
