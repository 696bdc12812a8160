"""The gradients of mistaken critic losses: squared errors to a wrong target."""

from __future__ import annotations

from collections.abc import Iterator

from ...worlds.world import Array
from ..population import Population
from .explain import Candidate
from .terms import (
    DISCOUNTS,
    Terms,
    next_column,
    reward_placements,
    reward_to_go,
    token_weights,
)


def critic_candidates(population: Population) -> Iterator[Candidate]:
    """Descent directions of mistaken critic losses."""
    t, beta = Terms(population), population.world.beta
    now, old = t.at_tokens(population.values), t.old_values
    penalty, right = -beta * t.log_ratio, reward_placements(t)[""]
    steps = next_column(old) - old

    def error(x: float, reward: Array, critic: Array) -> Array:
        """The lambda-return less the current value."""
        return reward_to_go(reward, x) + reward_to_go(critic, x) + old - now

    for x in DISCOUNTS:
        for weight, ws in token_weights(t).items():
            for place, reward in reward_placements(t).items():
                names = tuple(n for n in (weight, place) if n)
                if len(names) < 2:
                    for w in ws:
                        wrong = w * error(x, reward + penalty, steps)
                        yield Candidate(names, t.value_gradient(wrong))
        returns = reward_to_go(right + penalty, x) + reward_to_go(steps, x) + old
        for name, wrong in {
            "bootstrap past the end": error(x, right + penalty, steps + t.after_end),
            "KL penalty missing from the target": error(x, right, steps),
            "KL penalty has the wrong sign": error(x, right - penalty, steps),
            "advantage as the target": returns - old - now,
        }.items():
            yield Candidate((name,), t.value_gradient(wrong))
        late = t.value_gradient(returns - next_column(now), late=True)
        yield Candidate(("value read one token late",), late)
    for gamma in DISCOUNTS[1:]:
        discounted = gamma * next_column(old) - old
        for lam in DISCOUNTS:
            wrong = error(gamma * lam, right + penalty, discounted)
            yield Candidate(("discount",), t.value_gradient(wrong))
