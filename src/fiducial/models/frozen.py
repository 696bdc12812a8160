"""The policy as it is before the first step, to be asked while the policy moves on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from .roles import Policy


class Frozen:
    """The policy at the time of this call: its base without the adapters, or else a copy of it.

    copied: whether it is a copy, which takes the memory of the weights once more.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.copied = not any("lora_" in name for name, _ in policy.lm.named_parameters())
        if self.copied:
            self._policy = copy.deepcopy(policy).requires_grad_(False)

    @contextlib.contextmanager
    def policy(self) -> Iterator[Policy]:
        """It as a policy, for the time of a block."""
        with contextlib.nullcontext() if self.copied else self._policy.adapters_off():
            yield self._policy
