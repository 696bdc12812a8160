"""Align language models on one machine, with every method held against a known optimum.

    import fiducial as fd
    loss, metrics = fd.losses.dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected,
    beta=0.1) run = fd.ppo(fd.PPO(model="...", data="prompts.jsonl", reward=("reward.py:score",)))

Names are loaded when they are used: `import fiducial` itself imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import lab as lab
    from . import losses as losses
    from .core import advantages as advantages
    from .core import kl as kl
    from .methods.distill import Distill as Distill
    from .methods.distill import distill as distill
    from .methods.dpo import DPO as DPO
    from .methods.dpo import dpo as dpo
    from .methods.grpo import GRPO as GRPO
    from .methods.grpo import grpo as grpo
    from .methods.ppo import PPO as PPO
    from .methods.ppo import ppo as ppo
    from .methods.prm import PRM as PRM
    from .methods.prm import prm as prm
    from .methods.reinforce import Reinforce as Reinforce
    from .methods.reinforce import reinforce as reinforce
    from .methods.reward_model import RewardModel as RewardModel
    from .methods.reward_model import reward as reward
    from .methods.sft import SFT as SFT
    from .methods.sft import sft as sft
    from .use.collect import Collect as Collect

__version__ = "0.1.0"

_WHERE = {
    "losses": "losses",
    "advantages": "core.advantages",
    "kl": "core.kl",
    "lab": "lab",
    "sft": "methods.sft:sft",
    "SFT": "methods.sft:SFT",
    "reward": "methods.reward_model:reward",
    "RewardModel": "methods.reward_model:RewardModel",
    "prm": "methods.prm:prm",
    "PRM": "methods.prm:PRM",
    "ppo": "methods.ppo:ppo",
    "PPO": "methods.ppo:PPO",
    "reinforce": "methods.reinforce:reinforce",
    "Reinforce": "methods.reinforce:Reinforce",
    "grpo": "methods.grpo:grpo",
    "GRPO": "methods.grpo:GRPO",
    "dpo": "methods.dpo:dpo",
    "DPO": "methods.dpo:DPO",
    "distill": "methods.distill:distill",
    "Distill": "methods.distill:Distill",
    "collect": "use.collect:collect",
    "Collect": "use.collect:Collect",
    "generate": "use.generate:generate",
    "Generate": "use.generate:Generate",
    "evaluate": "use.evaluate:evaluate",
    "Evaluate": "use.evaluate:Evaluate",
    "Policy": "models.roles:Policy",
    "Trajectory": "rollout.trajectory:Trajectory",
    "LocalSampler": "rollout.sampler:LocalSampler",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fiducial' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    found = importlib.import_module(f".{module}", __name__)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
