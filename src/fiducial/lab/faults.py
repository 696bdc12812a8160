r"""What is known to go wrong in losses, and the gradient that each mistake has in expectation, in closed form.

A policy loss, whatever its author wrote, has on a population the gradient :math:`-E\sum_t c_t(y)\,\nabla\log\pi(y_t|s_t)`. For the right one
:math:`c_t = r(y) - \beta\sum_{u\ge t}\log(\pi/\pi_{ref})(y_u|s_u) - b(s_t)` with any baseline b of the state. Each mistake changes c in a known way: so the
gradients of mistakes are matrix products of NumPy tables, and none is computed by a loss. `explain` finds the fewest mistakes that give the gradient found.

Shapes: P prompts, Y responses, T tokens, K = S x V parameters of a prompt; see `fiducial.lab.population`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from . import exact
from .population import Population, _outside, layout, likelihoods, pairs
from .world import Array

EXACT = 1e-7
"""A gradient is explained when this share of it, or less, is left over."""


@dataclass(frozen=True)
class Fault:
    """A known mistake.

    words: what it is. remedy: what to do. seen: where it was shipped, as project#issue, or which check finds it.
    """

    name: str
    words: str
    remedy: str
    seen: str = ""


def _catalogue(*faults: Fault) -> dict[str, Fault]:
    assert len({f.name for f in faults}) == len(faults)
    return {f.name: f for f in faults}


CATALOGUE = _catalogue(
    # -- which tokens count, and how much
    Fault(
        "mean of means",
        "every response weighs the same whatever its length: a token of a short one counts for more",
        "sum over tokens and divide once, by the tokens of the whole batch or by a constant, never by each response's own length",
        "transformers#34191; the 1/|o| of GRPO",
    ),
    Fault(
        "mean of micro-batch means",
        "every micro-batch weighs the same however many tokens it has: the gradient depends on which rows share one",
        "sum over tokens in each micro-batch and divide by the token count of all of them",
        "transformers#34191, #34242",
    ),
    Fault(
        "mean of groups' means",
        "every prompt or group weighs the same however many tokens its responses have",
        "sum over tokens and divide once, by the tokens of the whole batch or by a constant",
    ),
    Fault(
        "EOS not a label",
        "the EOS that ends a response is masked out, as it is where labels are found by comparing ids with a pad token that is EOS",
        "take the mask that was made with the tokens; never derive it from pad ids",
        "trl#1623, trl#3091",
    ),
    Fault("mask one early", "the mask is one token early: it leaves out every response's last token and takes one of the prompt", "shift the mask as you shift the labels: column t of both must speak of token t"),
    Fault("mask one late", "the mask is one token late: it leaves out every response's first token and takes one of the padding", "shift the mask as you shift the labels: column t of both must speak of token t"),
    Fault("last token left out", "the last token of every response has no gradient", "the mask must include the token that ends a response, EOS or not"),
    Fault("first token left out", "the first token of every response has no gradient", "the first token is predicted at the prompt's last position: start the slice of the logits there"),
    Fault("cut responses left out", "responses without EOS have no gradient", "keep them, or say that the objective is another one", "the overlong filter of DAPO, on purpose"),
    Fault("trains on the prompt", "tokens of the prompt have a gradient", "select with the mask of the policy's own tokens"),
    Fault("trains on padding", "padding has a gradient", "select with the mask of the policy's own tokens"),
    Fault("labels not shifted", "a token is looked up in the logits of its own position, which predict the one behind it", "logits[:, :-1] predict ids[:, 1:]"),
    Fault("labels shifted twice", "a token is looked up in logits two positions in front of it: shifted by hand, and once more inside", "shift once: logits[:, :-1] predict ids[:, 1:]", "transformers#47394, #37830"),
    Fault("temperature missing", "log-probabilities are those of softmax(logits), but the tokens were sampled from softmax(logits / temperature)", "divide the logits by the sampling temperature, in policy, old policy and reference", "trl#3029, trl#4159, OpenRLHF#853"),
    Fault("log-softmax missing", "logits are used as if they were log-probabilities", "take log_softmax before you gather"),
    Fault("sign turned", "the loss goes up where it should go down", "a loss is the negative of what is to be maximised"),
    # -- KL
    Fault("KL missing", "the KL penalty has no effect on the expected gradient: left out, detached where it should act, or k1 used as a loss", "put beta * (logprobs - ref_logprobs) into each token's reward, detached", "open-instruct#534"),
    Fault("KL sign turned", "the policy is paid for leaving the reference", "the reward loses beta * (logprobs - ref_logprobs)"),
    Fault("wrong beta", "the KL penalty has the right direction and another strength", "look for a beta applied twice, a mean where a sum belongs, or a reward that was scaled and a penalty that was not"),
    Fault("k1 as a loss", "the sampled log-ratio has an expected gradient of zero when it is differentiated as a loss", "put it into the reward, or use k2 of the whole response", "open-instruct#534"),
    Fault("k3 as a loss", "k3 is a good value, but differentiated it has the gradient of the forward KL(ref, pi)", "put k1 into the reward, or use k2 of the whole response as a loss", "trl#4967; Tang and Munos 2025, arXiv 2506.09477"),
    Fault("k3 of each token as a loss", "differentiated, k3 has the gradient of the forward KL(ref, pi), here of each token's, with the states taken as given", "put k1 into the reward, or use k2 of the whole response as a loss", "GRPO as published; trl#4967"),
    Fault("k3 of the inverse ratio as a loss", "k3 with pi / ref where it has ref / pi", "k3 is exp(ref - logp) - 1 - (ref - logp)"),
    Fault("KL of each token alone", "each token pays for its own log-ratio only: nothing is paid for choosing a prefix behind which the policy is far from the reference", "let a token's return hold the penalties of all later tokens, or use k2 of the whole response", "Tang and Munos 2025, arXiv 2506.09477"),
    Fault("k2 in the reward", "as a value k2 is biased, and so is a reward with it", "put k1 into the reward"),
    Fault("k3 in the reward", "k3 in the reward has the gradient of KL(pi, ref) - KL(ref, pi)", "put k1 into the reward"),
    Fault("KL cut off at zero", "negative log-ratios are set to 0: the expected penalty is no longer the KL", "keep the sign; only the mean over samples is never negative"),
    Fault("|log-ratio| in the reward", "the absolute value of the log-ratio is not an estimate of the KL", "keep the sign; only the mean over samples is never negative"),
    Fault("KL divided by the length", "a response pays the mean over its tokens instead of their sum: long ones leave the reference for little", "sum over the tokens of a response"),
    Fault("reverse instead of forward KL", "the gradient is that of KL(pi, ref)", "k3 of the whole response, as a loss, has that of KL(ref, pi)"),
    Fault("entropy bonus", "the policy is also paid for its entropy: the optimum is another one", "expected of an entropy bonus; 0 for the objective as it stands"),
    Fault("advantage carries a gradient", "the penalty inside the advantage is differentiated as well", "detach the advantage"),
    # -- reward and return
    Fault("reward missing", "rewards have no effect on the expected gradient", "look for a reward added where the mask is false"),
    Fault("reward lost on padded rows", "only rows without padding keep their reward: it stands in the last column, which the mask removes from all others", "put it at each row's last token: column lengths - 1", "trl#3750"),
    Fault("reward placed without the prompt", "the reward stands at the response's length counted from the row's start, the prompt forgotten", "put it at column lengths - 1, the prompt included", "trl#3750"),
    Fault("reward lost at EOS", "only cut responses keep their reward", "the mask must include EOS, for the reward stands there"),
    Fault("reward lost where cut", "responses without EOS lose their reward", "put it at the last token, not at the first EOS"),
    Fault("first EOS of the row", "the end is taken to be the first EOS of the row, and that may stand inside the prompt", "look for EOS behind the prompt only", "trl#6802"),
    Fault("reward at every token", "the reward is added at each token: a long response is paid many times over", "add it once, at the last token"),
    Fault("return without the token's own reward", "the reward-to-go begins one token late", "the return of token t holds the reward of token t"),
    Fault("each token paid alone", "no reward reaches earlier tokens: it is not summed, or summed forwards", "sum rewards from each token to the end"),
    Fault("discount", "gamma, or a lambda without a critic, below 1: early tokens are credited with a part of the reward", "gamma = 1 for text; with lambda below 1 use a critic"),
    Fault("lambda with an inexact critic", "the return is cut short by a critic that is wrong: bias in exchange for less variance", "expected of GAE with lambda < 1; lambda = 1 has no bias"),
    Fault("bootstraps past the end", "a value is read behind the last token, where there is no state any more", "the value behind the end is 0"),
    Fault("value read one token late", "the baseline of a token is the value behind it, which depends on the token", "column t holds the value of the state before token t"),
    # -- groups
    Fault("group mean includes itself", "the mean of the group holds the response's own reward: its advantage is (G - 1) / G of what it should be, while the penalty is whole", "take the mean of the others, or multiply by G / (G - 1)"),
    Fault("divided by the group's deviation", "advantages are divided by the deviation in their group: prompts and pairs on which rewards hardly differ count as much as the others", "leave the division out (Dr. GRPO, arXiv 2503.20783), or call the estimator biased", "GRPO, on purpose"),
    # -- off policy
    Fault("not clipped", "the gradient goes on where the clip is meant to cut it", "min(ratio * A, clip(ratio) * A)"),
    Fault("clipped without the minimum", "the clip cuts on both sides, whichever way the advantage points: a policy that went astray is not brought back", "min(ratio * A, clip(ratio) * A)"),
    Fault("maximum instead of minimum", "the larger of the two branches is taken: what was meant to be pessimistic is optimistic", "the minimum of what is maximised, or the maximum of its negatives"),
    Fault("ratio always one", "the ratio to the policy that sampled has no effect", "old log-probabilities are those of the policy that sampled, not of this one detached"),
    Fault("ratio inverted", "the ratio is old over new", "ratio = exp(logprobs - old_logprobs)"),
    # -- preferences
    Fault("chosen and rejected exchanged", "the loss prefers what was rejected", "-logsigmoid(chosen - rejected)"),
    Fault("reference missing", "the reference's log-probabilities have no effect", "margins are of log(pi / pi_ref)"),
    Fault("reference turned round", "the reference's log-ratio has the wrong sign", "h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)"),
    Fault("reference is the policy", "the margin is always 0: the reference is the policy that is trained", "freeze a copy before training", "trl#1340"),
    Fault("beta missing", "the margin inside the sigmoid is not multiplied by beta", "-logsigmoid(beta * h)"),
    Fault("beta twice", "the margin is multiplied by beta twice", "-logsigmoid(beta * h)"),
    Fault("divided by the length", "log-ratios are means over a response's tokens, not sums", "sum over tokens; a mean is another method (length-normalised DPO, SimPO)"),
    Fault("no logarithm", "the loss is -sigmoid of the margin instead of -logsigmoid", "use logsigmoid"),
    Fault("hinge", "the loss is max(0, 1 - margin), as in SLiC", "-logsigmoid(beta * h)"),
    Fault("squared margin", "the loss is (h - 1 / (2 beta))^2: IPO", "-logsigmoid(beta * h)"),
    Fault("label smoothing", "labels are taken to be wrong now and then, and the minimum is elsewhere", "expected of conservative DPO and of smoothed cross-entropy; 0 for the plain loss"),
    # -- reward models
    Fault("score read one token early", "the score is read at the token in front of the last: EOS is never seen", "read it at column lengths - 1", "transformers#35352"),
    Fault("score read in the last column", "the score is read in the last column, which is padding for all but the longest rows", "read it at column lengths - 1"),
    Fault("score read without the prompt", "the score is read at the response's length counted from the row's start, the prompt forgotten", "read it at column lengths - 1, the prompt included"),
    Fault("score is a mean over tokens", "the score is the mean over the response", "read it at column lengths - 1"),
    Fault("score is a sum over tokens", "the score is the sum over the response", "read it at column lengths - 1"),
    # -- critics
    Fault("penalty missing from the target", "returns hold the reward but not the KL penalty", "the critic must expect what the policy is paid, the penalty included"),
    Fault("advantage as the target", "the critic is fitted to the advantage", "its target is the advantage plus the old value"),
    # -- found by trying it out
    Fault("no gradient", "the loss does not depend on what is learned", "look for a detach, a no_grad, or a ratio to the policy itself"),
    Fault("zero in expectation", "single rows have a gradient, their mean has none", "look for a term whose gradient is a score: E[grad log pi] = 0"),
    Fault("not finite", "the loss or its gradient is not finite", "look for 0/0 (a group of equal rewards), log 0, or a mask that multiplies"),
    Fault("random", "the same batch gives another gradient the second time", "switch dropout off; take no random numbers inside a loss", "trl#744"),
    Fault("padding counts", "more padding changes the gradient", "sums, counts and statistics (whitening too) are over true positions of the mask only", "SkyRL#1305"),
    Fault("depends on the order of rows", "the same rows in another order give another gradient", "look for micro-batches that weigh the same whatever they hold, and for statistics of a part of the batch"),
    Fault("groups mixed", "groups in another order give another gradient: responses are compared with those of other groups", "form groups by their ids, or reshape to [groups, G] where rows of a group stand together (repeat_interleave, not repeat)", "R1-V#67, slime#1918"),
    Fault("copies count", "a batch with every row twice has a gradient of another direction", "look for statistics that depend on the size of the batch"),
    Fault("reads the prompt's tokens", "other tokens in the prompt change the gradient", "look for a search for EOS over the whole row, and for groups formed by the prompt's tokens", "trl#6802, NeMo-RL#3882"),
    Fault("rounding", "the gradient is right to a few digits", "look for float16 or bfloat16: log-softmax wants float32"),
    Fault("unknown", "biased, and no known mistake has this gradient", ""),
)  # fmt: skip
"""Every name that a verdict can carry, but for "correct"."""


# ---- what can be found ----


@dataclass(frozen=True)
class Candidate:
    """A gradient with these mistakes: a combination of columns [K'], the first with a positive factor a, the others as `expected` of it (None: any)."""

    names: tuple[str, ...]
    columns: tuple[Array, ...]
    expected: tuple[float | None, ...]
    strength: int | None = None
    """The column whose factor is the KL's strength."""


@dataclass(frozen=True)
class Explanation:
    """The mistakes found, and the strength of the KL penalty as a multiple of the right one."""

    names: tuple[str, ...]
    strength: float = 1.0
    left: float = 0.0
    """The share of the gradient that they do not explain."""


def fit(direction: Array, candidate: Candidate, group: int = 1) -> Explanation | None:
    """Whether the direction [...] is what the candidate gives, up to a positive factor."""
    g = direction.ravel()
    size = np.linalg.norm(g)
    columns = np.stack([c.ravel() for c in candidate.columns], 1)
    live = np.linalg.norm(columns, axis=0) > 1e-12
    if not live[0]:
        return None
    found = np.zeros(len(live))
    found[live] = np.linalg.lstsq(columns[:, live], g, rcond=1e-12)[0]
    left = float(np.linalg.norm(g - columns @ found) / size)
    a = found[0]
    if left > EXACT:
        return None
    names = list(candidate.names)
    k = candidate.strength
    if k is not None and abs(a) * np.linalg.norm(columns[:, 0]) < 1e-6 * size:
        return Explanation((*names, "reward missing"), left=left) if found[k] > 0 else None
    if a < 0:
        names.append("sign turned")
    for i, (factor, wanted) in enumerate(zip(found, candidate.expected, strict=True)):
        if wanted is not None and live[i] and abs(factor / a - wanted) > 1e-5:
            return None
    strength = 1.0
    if k is not None and live[k]:
        strength = float(found[k] / a)
        names += _of_strength(strength, group)
    return Explanation(tuple(names), strength, left)


def _of_strength(strength: float, group: int) -> list[str]:
    if abs(strength - 1) < 1e-5:
        return []
    if abs(strength) < 1e-6:
        return ["KL missing"]
    if abs(strength + 1) < 1e-5:
        return ["KL sign turned"]
    if group > 1 and abs(strength - group / (group - 1)) < 1e-5:
        return ["group mean includes itself"]
    return ["wrong beta"]


def explain(direction: Array, candidates: Iterator[Candidate], group: int = 1) -> Explanation | None:
    """The fewest mistakes that give this direction, or None."""
    best: Explanation | None = None
    for candidate in candidates:
        if best is not None and len(candidate.names) >= len(best.names):
            continue
        found = fit(direction, candidate, group)
        if found is not None and found.names and (best is None or len(found.names) < len(best.names)):
            best = found
            if len(best.names) == 1:
                break
    return best


# ---- policies ----


@dataclass(frozen=True, eq=False)
class Terms:
    """What a loss is made of, [P, Y, T] each and 0 behind the end, for every response of a population."""

    population: Population

    @functools.cached_property
    def known(self) -> Array:
        tree = self.population.tree
        return np.broadcast_to(tree.path >= 0, (len(self.population.world.prompts), *tree.path.shape)).astype(float)

    @functools.cached_property
    def likely(self) -> Array:
        """[P, Y] of the data; sums to 1 over all."""
        return likelihoods(self.population) / len(self.population.world.prompts)

    def of(self, table: Array) -> Array:
        """Entries of a table [P, S, V] at the tokens chosen, or of [P, S] in the states."""
        tree = self.population.tree
        found = table[:, tree.path, tree.token] if table.ndim == 3 else table[:, tree.path]
        return np.where(self.known > 0, found, 0.0)

    @functools.cached_property
    def logp(self) -> Array:
        return self.of(self.population.policy)

    @functools.cached_property
    def log_ratio(self) -> Array:
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
        """[P, Y, 1] rows without padding."""
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
        return self.known * (self.position == self.lengths - 1)

    @functools.cached_property
    def reward(self) -> Array:
        """[P, Y, 1]"""
        return self.population.world.reward[..., None]

    @functools.cached_property
    def value(self) -> Array:
        return self.of(self.population.old_values)

    @functools.cached_property
    def behind(self) -> Array:
        """[P, Y, 1] what stands in the critic's column behind the last token; 0 where there is no such column."""
        world = self.population.world
        where = layout(world.prompts, world.horizon)
        rest = _outside("nonsense", where.rows - where.states, 2)[: where.ends - where.states]
        return rest.reshape(len(world.prompts), -1, 1) * (1 - self.widest)

    @functools.cached_property
    def scores(self) -> Array:
        """[P, Y, T, S, V] grad log pi of each token with respect to its prompt's raw logits."""
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


def to_go(x: Array, discount: float = 1.0) -> Array:
    """sum_{u >= t} discount^(u - t) x_u along the last axis."""
    out = np.zeros_like(x)
    running = np.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        running = x[..., t] + discount * running
        out[..., t] = running
    return out


DISCOUNTS = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5)


def _weights(t: Terms) -> dict[str, list[Array]]:
    """How much a token counts, by mistake."""
    mean = (t.likely[..., None] * t.lengths).sum(1, keepdims=True) / t.likely.sum(1)[:, None, None]
    eos = t.last * t.finished
    return {
        "": [t.known],
        "mean of means": [t.known / t.lengths, t.known / (t.lengths + t.prompt_lengths)],
        "EOS not a label": [t.known - eos],
        "last token left out": [t.known - t.last],
        "first token left out": [t.known * (t.position > 0)],
        "cut responses left out": [t.known * t.finished],
        "mean of groups' means": [t.known / mean],
    }


def _places(t: Terms) -> dict[str, Array]:
    """Where the reward stands."""
    reward = t.reward * t.last
    from_start = t.lengths - 1 - t.prompt_lengths
    inside = np.array([[[float(0 not in p)]] for p in t.population.world.prompts])
    return {
        "": reward,
        "reward lost on padded rows": reward * t.widest,
        "reward placed without the prompt": t.reward * t.known * (t.position == from_start),
        "reward lost at EOS": reward * (1 - t.finished),
        "reward lost where cut": reward * t.finished,
        "first EOS of the row": reward * t.finished * inside,
        "reward at every token": t.reward * t.known,
    }


def _penalties(t: Terms) -> dict[str, list[tuple[bool, Array]]]:
    """The price of a token by mistake, and whether later tokens' prices belong to it (True) or it is a coefficient itself."""
    lr, whole = t.log_ratio, t.log_ratio.sum(-1, keepdims=True) * t.known
    carried = np.cumsum(t.logp, -1) * t.known
    return {
        "": [(True, lr)],
        "k2 in the reward": [(True, lr**2 / 2), (False, whole**2 / 2)],
        "k3 in the reward": [(True, np.expm1(-lr) + lr), (False, (np.expm1(-whole) + whole) * t.known)],
        "KL cut off at zero": [(True, np.maximum(lr, 0.0)), (False, np.maximum(whole, 0.0))],
        "|log-ratio| in the reward": [(True, np.abs(lr)), (False, np.abs(whole))],
        "KL divided by the length": [(True, lr / t.lengths)],
        "KL of each token alone": [(False, lr)],
        "k3 as a loss": [(False, -np.expm1(-whole))],
        "k3 of each token as a loss": [(False, -np.expm1(-lr))],
        "k3 of the inverse ratio as a loss": [(False, np.expm1(lr)), (False, np.expm1(whole))],
        "advantage carries a gradient": [(False, to_go(lr) + carried), (False, whole + t.logp.sum(-1, keepdims=True))],
    }


def _returns(t: Terms) -> dict[str, Callable[[Array], Array]]:
    """How rewards become what a token is credited with."""
    return {
        "": to_go,
        "return without the token's own reward": lambda x: (to_go(x) - x) * t.known,
        "each token paid alone": lambda x: x,  # and its sum from the start: the difference was paid before, a baseline
    }


def _baselines(t: Terms) -> list[Array]:
    """Coefficients that a right loss may add without a bias, and a wrong one then with: a constant for each prompt, the critic, what was paid before."""
    prompts = [t.known * (np.arange(len(t.known)) == p)[:, None, None] for p in range(len(t.known))]
    past = (np.cumsum(t.log_ratio, -1) - t.log_ratio) * t.known
    return [*prompts, t.value, past]


def policy_candidates(population: Population, *, objective: str, most: int = 2) -> Iterator[Candidate]:
    """Directions in which mistaken losses push the policy, those with one mistake first.

    Args:
        objective: "J", "reward" or "kl".
        most: mistakes at a time.
    """
    t, beta = Terms(population), population.world.beta if objective == "J" else 1.0
    weights, places, penalties, returns = _weights(t), _places(t), _penalties(t), _returns(t)
    nuisance = {name: [tuple(t.gradient(w * b) for b in _baselines(t)) for w in ws] for name, ws in weights.items()}

    def pack(names: tuple[str, ...], w: Array, free: tuple[Array, ...], credit: Callable[[Array], Array], place: str, price: tuple[bool, Array], extra: tuple[Array, ...] = (), expected: tuple[float | None, ...] = ()) -> Candidate:
        cost = credit(price[1]) if price[0] else price[1]
        kl = t.gradient(-beta * w * cost)
        if objective == "kl":
            return Candidate(names, (kl, *free), (1.0, *[None] * len(free)))
        gain = t.gradient(w * credit(places[place]))
        if objective == "reward":
            return Candidate(names, (gain, *extra, *free), (1.0, *expected, *[None] * len(free)))
        return Candidate(names, (gain, kl, *extra, *free), (1.0, None, *expected, *[None] * len(free)), strength=1)

    def some(size: int) -> Iterator[Candidate]:
        for weight, ws in weights.items():
            for place in places if objective != "kl" else [""]:
                for penalty, prices in penalties.items() if objective != "reward" else [("", penalties[""])]:
                    for back, credit in returns.items() if objective != "kl" else [("", to_go)]:
                        names = tuple(n for n in (weight, place, back, penalty) if n)
                        if len(names) == size:
                            for i, w in enumerate(ws):
                                for price in prices:
                                    yield pack(names, w, nuisance[weight][i], credit, place, price)

    yield from some(0)
    yield from some(1)
    if objective != "kl":
        surprise = t.gradient(-t.logp)  # of the entropy in each state, the states taken as given
        yield pack(("entropy bonus",), weights[""][0], (), to_go, "", penalties[""][0], (surprise,), (None,))
        yield from _with_values(t, pack, nuisance, weights)
    yield from some(2) if most > 1 else ()


def _with_values(t: Terms, pack: Callable[..., Candidate], nuisance: dict[str, list[tuple[Array, ...]]], weights: dict[str, list[Array]]) -> Iterator[Candidate]:
    """Mistakes of returns that bootstrap from a critic, and of discounts."""
    late = np.concatenate([t.value[..., 1:], np.zeros_like(t.value[..., :1])], -1) + t.behind * t.last
    for x in (1.0, *DISCOUNTS, 0.0):
        def credit(r: Array, x: float = x) -> Array:
            return to_go(r, x)

        for name in ("", "mean of means", "EOS not a label", "last token left out", "first token left out"):
            w = weights[name][0]
            names = (name,) if name else ()
            # A_t = sum_k x^k delta_{t + k}, delta_t = r_t + V_{t + 1} - V_t: rewards apart, its part in the critic is
            steps = np.concatenate([t.value[..., 1:], np.zeros_like(t.value[..., :1])], -1) - t.value
            critic = t.gradient(w * to_go(steps, x))
            if x < 1.0:
                yield pack((*names, "lambda with an inexact critic") if not name else names, w, (), credit, "", (True, t.log_ratio), (critic,), (1.0,))
                yield pack((*names, "discount"), w, nuisance[name][0], credit, "", (True, t.log_ratio))
            if not name:
                past = t.gradient(w * to_go(t.behind * t.last, x))
                yield pack(("bootstraps past the end",), w, (), credit, "", (True, t.log_ratio), (critic, past), (1.0, 1.0))
                shifted = np.concatenate([late[..., 1:], np.zeros_like(late[..., :1])], -1) * t.known - late
                yield pack(("value read one token late",), w, (), credit, "", (True, t.log_ratio), (t.gradient(w * to_go(shifted, x)),), (1.0,))


def group_candidates(population: Population, *, objective: str) -> Iterator[Candidate]:
    """What divides by the deviation of a group of two, with and without the other customs of GRPO."""
    t, beta = Terms(population), population.world.beta
    p = likelihoods(population)
    total = population.world.reward
    reduced = total - beta * t.log_ratio.sum(-1)
    lengths = t.lengths[..., 0]
    for deviation, means in ((True, False), (True, True), (False, True)):
        for inside in (False, True):
            difference = (total if not inside or objective != "J" else reduced)
            d = difference[:, :, None] - difference[:, None, :]
            for ddof, eps in ((k, e) for k in (1, 0) for e in (0.0, 1e-8, 1e-6, 1e-5, 1e-4)) if deviation else ((0, 0.0),):
                sigma = np.abs(d) / np.sqrt(2.0 if ddof else 4.0)
                half = np.divide(d / 2, sigma + eps, out=np.zeros_like(d), where=sigma + eps > 0) if deviation else d
                for shared in (False, True):
                    if shared and not means:
                        continue
                    weight = {False: t.known / t.lengths, True: t.known}[means and shared] if means else t.known
                    pair = half * (1 / (lengths[:, :, None] + lengths[:, None, :]) if shared else 1.0)
                    a = np.einsum("pij,pj->pi", pair, p)[..., None]
                    other = np.einsum("pij,pj->pi", np.broadcast_to(1 / (lengths[:, :, None] + lengths[:, None, :]), d.shape), p)[..., None] if shared else 1.0
                    names = tuple(n for n, on in (("divided by the group's deviation", deviation), ("mean of groups' means" if shared else "mean of means", means)) if on)
                    gain = t.gradient(weight * a)
                    if objective != "J" or inside:
                        yield Candidate(names, (gain,), (1.0,))
                        continue
                    if deviation:
                        yield Candidate((*names, "KL missing"), (gain,), (1.0,))
                    for penalty, prices in _penalties(t).items():
                        for price in prices:
                            cost = to_go(price[1]) if price[0] else price[1]
                            yield Candidate(tuple(n for n in (*names, penalty) if n), (gain, t.gradient(-beta * weight * other * cost)), (1.0, None), strength=1)


def clip_candidates(population: Population, *, clip: float) -> Iterator[Candidate]:
    """The clipped surrogate off policy, with the advantages that the batch holds."""
    t = Terms(population)
    rho = np.exp(t.logp - t.of(population.data))
    a = t.of(population.advantages)
    cut = ((a > 0) & (rho > 1 + clip)) | ((a < 0) & (rho < 1 - clip))
    wrong = ((a < 0) & (rho > 1 + clip)) | ((a > 0) & (rho < 1 - clip))
    inverse = 1 / rho
    cut_inverse = ((a > 0) & (inverse > 1 + clip)) | ((a < 0) & (inverse < 1 - clip))
    kinds = {
        "": rho * a * ~cut,
        "not clipped": rho * a,
        "clipped without the minimum": rho * a * ~cut * ~wrong,
        "maximum instead of minimum": rho * a * ~wrong,
        "ratio always one": a,
        "ratio inverted": -inverse * a * ~cut_inverse,
    }
    for size in (0, 1, 2):
        for kind, c in kinds.items():
            for weight, ws in _weights(t).items():
                names = tuple(n for n in (kind, weight) if n)
                if len(names) == size:
                    for w in ws:
                        yield Candidate(names, (t.gradient(w * c),), (1.0,))


def likelihood_candidates(population: Population) -> Iterator[Candidate]:
    """Mistakes of the negative log-likelihood of the responses as demonstrations."""
    t = Terms(population)
    for weight, ws in _weights(t).items():
        for w in ws:
            yield Candidate((weight,) if weight else (), (t.gradient(w),), (1.0,))
    uniform = exact.visits(population.tree, population.data)[..., None] * (1 / 3 - np.exp(population.policy)) / population.temperature
    yield Candidate(("label smoothing",), (t.gradient(t.known), uniform), (1.0, None))


def forward_candidates(population: Population) -> Iterator[Candidate]:
    """Mistakes where the KL(ref, pi) is meant."""
    t = Terms(population)
    yield Candidate(("reverse instead of forward KL",), (t.gradient(-to_go(t.log_ratio)),), (1.0,))
    for weight, ws in _weights(t).items():
        for penalty in ("k3 as a loss", "k3 of each token as a loss", "KL of each token alone"):
            name = {"k3 as a loss": "", "k3 of each token as a loss": "KL of each token alone", "KL of each token alone": "reverse instead of forward KL"}[penalty]
            for w in ws:
                yield Candidate(tuple(n for n in (name, weight) if n), (t.gradient(-w * _penalties(t)[penalty][0][1]),), (1.0,))


def critic_candidates(population: Population) -> Iterator[Candidate]:
    """Where the squared error to a mistaken return pulls the values [P, S] away from those of the policy."""
    t = Terms(population)
    beta, tree = population.world.beta, population.tree
    now = t.of(population.values)
    steps = np.concatenate([t.value[..., 1:], np.zeros_like(t.value[..., :1])], -1) - t.value
    late = np.concatenate([now[..., 1:], np.zeros_like(now[..., :1])], -1)

    def pull(c: Array) -> Array:
        out = np.zeros(population.values.shape)
        for y, u in np.argwhere(tree.path >= 0):
            out[:, tree.path[y, u]] += t.likely[:, y] * np.broadcast_to(c, t.known.shape)[:, y, u]
        return out

    for x in (1.0, *DISCOUNTS, 0.0):
        for weight, ws in _weights(t).items():
            for place, reward in _places(t).items():
                names = tuple(n for n in (weight, place) if n)
                if len(names) > 1:
                    continue
                for w in ws:
                    gain, cost = pull(w * to_go(reward, x)), pull(-beta * w * to_go(t.log_ratio, x))
                    boot, here = pull(w * (to_go(steps, x) + t.value)), pull(-w * now)
                    full = (*names,) if x == 1.0 or weight or place else ()
                    yield Candidate(full, (gain, cost, boot, here), (1.0, 1.0, 1.0, 1.0))
                    if not names:
                        past = pull(w * to_go(t.behind * t.last, x))
                        yield Candidate(("bootstraps past the end",), (gain, cost, boot, past, here), (1.0,) * 5)
                        yield Candidate(("penalty missing from the target",), (gain, boot, here), (1.0, 1.0, 1.0))
                        yield Candidate(("KL sign turned",), (gain, cost, boot, here), (1.0, -1.0, 1.0, 1.0))
                        yield Candidate(("advantage as the target",), (gain, cost, pull(w * to_go(steps, x)), here), (1.0,) * 4)
                        if x < 1.0:
                            yield Candidate(("discount",), (gain, cost, here), (1.0, 1.0, 1.0))


# ---- pairs ----


def _pair_weights(population: Population) -> Array:
    """[P, Y, Y] how often the second axis's response was preferred to the third's; sums to 1."""
    prompt, chosen, rejected = pairs(population)
    out = np.zeros((len(population.world.prompts), *[len(population.world.responses)] * 2))
    np.add.at(out, (prompt, chosen, rejected), 1.0 / len(prompt))
    return out


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def _slopes(margin: Array, beta: float) -> dict[str, Array]:
    """-dL/dmargin for a margin that includes beta, by what is done to it."""
    return {
        "": _sigmoid(-margin),
        "no logarithm": _sigmoid(margin) * _sigmoid(-margin),
        "hinge": (margin < 1).astype(float),
        "squared margin": 2 * (0.5 - margin),  # (h - 1/(2 beta))^2 by beta h, up to a factor
    }


def preference_gradient(population: Population, *, weight: Array | None = None, ref: float | None = 1.0, beta: float | None = None, kind: str = "") -> Array:
    """[P, S, V] minus the gradient of the expected DPO loss.

    Args:
        weight: [P, Y, T] how much a token counts in a log-ratio.
        ref: the factor of the reference's log-probability; None: the reference is the policy itself.
        kind: of `_slopes`.
    """
    t = Terms(population)
    beta = population.world.beta if beta is None else beta
    weight = t.known if weight is None else weight
    reference = t.logp - t.log_ratio
    ratio = (weight * (t.logp - (t.logp if ref is None else ref * reference))).sum(-1)
    slope = _pair_weights(population) * _slopes(beta * (ratio[:, :, None] - ratio[:, None, :]), beta)[kind]
    each = beta * (slope.sum(2) - slope.sum(1))
    return np.einsum("py,pyt,pytsv->psv", each, weight, t.scores, optimize=True)


def preference_candidates(population: Population) -> Iterator[Candidate]:
    """Mistaken preference losses."""
    beta = population.world.beta
    t = Terms(population)
    counted: dict[str, list[Array]] = {("divided by the length" if k == "mean of means" else k): v for k, v in _weights(t).items() if k not in ("mean of groups' means", "cut responses left out")}
    refs = {"": 1.0, "reference missing": 0.0, "reference turned round": -1.0, "reference is the policy": None}
    betas = {"": beta, "beta missing": 1.0, "beta twice": beta**2}
    right = preference_gradient(population)
    swapped = -preference_gradient(population.with_(world=population.world.with_(beta=-beta)))
    yield Candidate(("chosen and rejected exchanged",), (swapped,), (1.0,))
    yield Candidate(("label smoothing",), (right, swapped), (1.0, None))
    for size in (0, 1, 2):
        for weight, ws in counted.items():
            for ref, factor in refs.items():
                for strength, b in betas.items():
                    for kind in _slopes(np.zeros(1), beta):
                        names = tuple(n for n in (weight, ref, strength, kind) if n)
                        if len(names) == size:
                            for w in ws:
                                yield Candidate(names, (preference_gradient(population, weight=w, ref=factor, beta=b, kind=kind),), (1.0,))


def reward_gradient(population: Population, *, pooling: Array | None = None, given: Array | float = 0.0, sign: float = 1.0, kind: str = "") -> Array:
    """[P, S + Y] minus the gradient of the expected Bradley-Terry loss by the scores in every state and of every response.

    Args:
        pooling: [P, Y, S + Y] how a response's score is read from them; default: its own.
        given: [P, Y] what is read outside, from padding or the prompt.
    """
    states, responses = len(population.tree.states), len(population.tree.responses)
    own = np.concatenate([np.zeros((responses, states)), np.eye(responses)], 1)
    pooling = np.broadcast_to(own, (len(population.world.prompts), *own.shape)) if pooling is None else pooling
    table = np.concatenate([inner_scores(population), population.scores], 1)
    score = np.einsum("pyk,pk->py", pooling, table) + given
    slope = _pair_weights(population) * _slopes(sign * (score[:, :, None] - score[:, None, :]), 1.0)[kind]
    return sign * np.einsum("py,pyk->pk", slope.sum(2) - slope.sum(1), pooling)


def inner_scores(population: Population) -> Array:
    """[P, S] what the score table holds in states in which the response goes on."""
    return _outside("nonsense", layout(population.world.prompts, population.world.horizon).states, 3).reshape(len(population.world.prompts), -1)


def reward_candidates(population: Population) -> Iterator[Candidate]:
    """Mistaken losses of reward models."""
    tree, world = population.tree, population.world
    where = layout(world.prompts, world.horizon)
    states, responses, width = len(tree.states), len(tree.responses), where.ids.shape[2]
    behind = _outside("nonsense", where.rows - where.ends, 4)
    shape = (len(world.prompts), responses)

    def read(column: Callable[[int, int], list[int]], factor: Callable[[int], float] = lambda n: 1.0) -> tuple[Array, Array]:
        pooling, given = np.zeros((*shape, states + responses)), np.zeros(shape)
        for p, y in np.ndindex(*shape):
            for c in column(len(world.prompts[p]), int(tree.lengths[y])):
                node = int(where.node[p, y, c])
                if node < where.states:
                    pooling[p, y, node - p * states] += factor(int(tree.lengths[y]))
                elif node < where.ends:
                    pooling[p, y, states + y] += factor(int(tree.lengths[y]))
                else:
                    given[p, y] += factor(int(tree.lengths[y])) * behind[node - where.ends]
        return pooling, given

    readings = {
        "": read(lambda p, n: [p + n - 1]),
        "score read one token early": read(lambda p, n: [p + n - 2]),
        "score read in the last column": read(lambda p, n: [width - 1]),
        "score read without the prompt": read(lambda p, n: [n - 1]),
        "score is a mean over tokens": read(lambda p, n: list(range(p, p + n)), lambda n: 1 / n),
        "score is a sum over tokens": read(lambda p, n: list(range(p, p + n))),
    }
    for size in (0, 1, 2):
        for reading, (pooling, given) in readings.items():
            for exchanged, sign in (("", 1.0), ("chosen and rejected exchanged", -1.0)):
                for kind in _slopes(np.zeros(1), 1.0):
                    names = tuple(n for n in (reading, exchanged, kind) if n)
                    if len(names) == size and kind != "squared margin":
                        yield Candidate(names, (reward_gradient(population, pooling=pooling, given=given, sign=sign, kind=kind),), (1.0,))
