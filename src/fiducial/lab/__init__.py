"""Worlds small enough to know everything about, and a kit that checks a loss in them, whoever wrote
it.

    from fiducial.lab import check_policy_loss, check_likelihood, check_preference_loss,
    check_reward_loss, check_value_loss

    print(check_preference_loss(lambda pairs: my_dpo(pairs.policy_chosen, pairs.policy_rejected,
    pairs.ref_chosen, pairs.ref_rejected, beta=pairs.beta)))

Each takes a function from a batch to a scalar and returns a `Verdict`: whether its expected
gradient is the exact one, and if not, which mistake it is. Names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalogue import CATALOGUE as CATALOGUE
    from .catalogue import Fault as Fault
    from .diagnosis import Verdict as Verdict
    from .estimators import estimator_table as estimator_table
    from .estimators import kl_table as kl_table
    from .kit import Draws as Draws
    from .kit import check_likelihood as check_likelihood
    from .kit import check_policy_loss as check_policy_loss
    from .kit import check_preference_loss as check_preference_loss
    from .kit import check_reward_loss as check_reward_loss
    from .kit import check_value_loss as check_value_loss
    from .kit import unbiased as unbiased
    from .population import Batch as Batch
    from .population import PairBatch as PairBatch
    from .trainer import Arrival as Arrival
    from .trainer import check_trainer as check_trainer
    from .world import World as World

_WHERE = {
    "estimator_table": "estimators",
    "kl_table": "estimators",
    "CATALOGUE": "catalogue",
    "Fault": "catalogue",
    "Draws": "kit",
    "Verdict": "diagnosis",
    "check_likelihood": "kit",
    "check_policy_loss": "kit",
    "check_preference_loss": "kit",
    "check_reward_loss": "kit",
    "check_value_loss": "kit",
    "unbiased": "kit",
    "Batch": "population",
    "PairBatch": "population",
    "World": "world",
    "Arrival": "trainer",
    "check_trainer": "trainer",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
