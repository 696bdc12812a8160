"""Losses: tensors in, (loss, metrics) out, with no model, batch, device or setting.

Each public loss is a mean over real tokens, rows or pairs. Its sum form, `<name>_sum`, returns the
sum and the metrics' sums with the count left to the caller: a loop adds them over micro-batches and
processes and divides once.
"""

from .distill import (
    reverse_kl,
    reverse_kl_sampled,
    reverse_kl_sampled_sum,
    reverse_kl_states,
    reverse_kl_states_sum,
    reverse_kl_sum,
)
from .policy import (
    cispo,
    cispo_sum,
    gspo,
    gspo_sum,
    ppo_clip,
    ppo_clip_sum,
    reinforce,
    reinforce_sum,
)
from .preference import dpo, dpo_sum
from .process import process_reward, process_reward_sum
from .reward import bradley_terry, bradley_terry_sum, ranking, ranking_sum
from .sft import nll, nll_sum
from .value import clipped_value, clipped_value_sum

__all__ = [
    "bradley_terry",
    "bradley_terry_sum",
    "cispo",
    "cispo_sum",
    "clipped_value",
    "clipped_value_sum",
    "dpo",
    "dpo_sum",
    "gspo",
    "gspo_sum",
    "nll",
    "nll_sum",
    "ppo_clip",
    "ppo_clip_sum",
    "process_reward",
    "process_reward_sum",
    "ranking",
    "ranking_sum",
    "reinforce",
    "reinforce_sum",
    "reverse_kl",
    "reverse_kl_sampled",
    "reverse_kl_sampled_sum",
    "reverse_kl_states",
    "reverse_kl_states_sum",
    "reverse_kl_sum",
]
