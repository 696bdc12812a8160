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
    from .kit.catalogue import CATALOGUE as CATALOGUE
    from .kit.catalogue import Fault as Fault
    from .kit.checks import Draws as Draws
    from .kit.checks import check_likelihood as check_likelihood
    from .kit.checks import check_policy_loss as check_policy_loss
    from .kit.checks import check_preference_loss as check_preference_loss
    from .kit.checks import check_reward_loss as check_reward_loss
    from .kit.checks import check_value_loss as check_value_loss
    from .kit.checks import unbiased as unbiased
    from .kit.diagnosis import Verdict as Verdict
    from .kit.population import Batch as Batch
    from .kit.population import PairBatch as PairBatch
    from .kit.trainer import Arrival as Arrival
    from .kit.trainer import check_trainer as check_trainer
    from .study.estimators import estimator_table as estimator_table
    from .study.kl_estimators import kl_table as kl_table
    from .worlds.world import World as World

_WHERE = {
    "estimator_table": "study.estimators",
    "kl_table": "study.kl_estimators",
    "CATALOGUE": "kit.catalogue",
    "Fault": "kit.catalogue",
    "Draws": "kit.checks",
    "Verdict": "kit.diagnosis",
    "check_likelihood": "kit.checks",
    "check_policy_loss": "kit.checks",
    "check_preference_loss": "kit.checks",
    "check_reward_loss": "kit.checks",
    "check_value_loss": "kit.checks",
    "unbiased": "kit.checks",
    "Batch": "kit.population",
    "PairBatch": "kit.population",
    "World": "worlds.world",
    "Arrival": "kit.trainer",
    "check_trainer": "kit.trainer",
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
