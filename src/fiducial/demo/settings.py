"""The settings of `fiducial demo`, which can be read without torch."""

from __future__ import annotations

from pydantic import Field

from ..building import Settings
from ..settings import Seed


class Demo(Settings):
    """Demo: pretrain, fine-tune, collect preferences, train a reward model, then compare PPO, RLOO,
    GRPO, DPO and PPO without KL on an embedded world.
    """

    out: str | None = None
    """Folder for all results. Default: demo-run, demo-run-2, ..."""
    seed: Seed = 0
    """Random seed of the world, of training and of sampling."""
    documents: int = Field(7_200, gt=0)
    """Number of texts to pretrain on, 32 per step."""
    sft_steps: int = Field(150, gt=0)
    """Optimizer steps of SFT, with 32 demonstrations each."""
    samples: int = Field(5, gt=1)
    """Responses per training prompt for the comparisons; all pairs of them are compared."""
    ppo_steps: int = Field(22, gt=0)
    """Iterations of PPO, RLOO and GRPO, with 64 responses each."""
    prompts: int = Field(288, gt=1, le=288)
    """Number of training prompts to use."""
    eval_samples: int = Field(3, gt=0)
    """Responses per held-out prompt in the final comparison; there are 96 held-out prompts."""
    resume: bool = False
    """Keep the finished stages in --out and continue after them."""
