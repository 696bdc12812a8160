"""Worlds small enough to know everything about, and a kit that checks anyone's loss in them.

    from fiducial.lab import check_preference_loss

    def my_dpo(pairs):
        h = pairs.policy_chosen - pairs.policy_rejected - pairs.ref_chosen + pairs.ref_rejected
        return -(pairs.beta * h).sigmoid().log().mean()

    print(check_preference_loss(my_dpo))

Each check takes a function from a batch to a scalar and returns a `Verdict`: whether its expected
gradient is the exact one, and if not, which mistake it has. Names are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kit.batch import Batch as Batch
    from .kit.batch import PairBatch as PairBatch
    from .kit.catalogue import CATALOGUE as CATALOGUE
    from .kit.catalogue import Fault as Fault
    from .kit.checks import check_likelihood as check_likelihood
    from .kit.checks import check_policy_loss as check_policy_loss
    from .kit.checks import check_preference_loss as check_preference_loss
    from .kit.checks import check_reward_loss as check_reward_loss
    from .kit.checks import check_value_loss as check_value_loss
    from .kit.small_batches import Draws as Draws
    from .kit.small_batches import unbiased as unbiased
    from .kit.trainer import Arrival as Arrival
    from .kit.trainer import check_trainer as check_trainer
    from .kit.verdict import Verdict as Verdict
    from .study.estimators import estimator_table as estimator_table
    from .study.kl_estimators import kl_table as kl_table
    from .worlds.world import World as World

_WHERE = {
    "Arrival": "kit.trainer",
    "Batch": "kit.batch",
    "CATALOGUE": "kit.catalogue",
    "Draws": "kit.small_batches",
    "Fault": "kit.catalogue",
    "PairBatch": "kit.batch",
    "Verdict": "kit.verdict",
    "World": "worlds.world",
    "check_likelihood": "kit.checks",
    "check_policy_loss": "kit.checks",
    "check_preference_loss": "kit.checks",
    "check_reward_loss": "kit.checks",
    "check_trainer": "kit.trainer",
    "check_value_loss": "kit.checks",
    "estimator_table": "study.estimators",
    "kl_table": "study.kl_estimators",
    "unbiased": "kit.small_batches",
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
