"""The known mistakes: the name of each, what it is, what to do, and where it has occurred.

Their gradients in closed form are in `fiducial.lab.kit.faults`.
"""

from . import pairs, policies, tokens
from .fault import Fault

CATALOGUE: dict[str, Fault] = {
    fault.name: fault for fault in (*tokens.FAULTS, *policies.FAULTS, *pairs.FAULTS)
}
"""Every name that a verdict can carry, except "correct"."""

__all__ = ["CATALOGUE", "Fault"]
