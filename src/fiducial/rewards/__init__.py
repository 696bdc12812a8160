"""A score for each response: from a Python function, a reward model, or several of them with
weights.
"""

from .load import Responses, Reward, Scored, load_rewards

__all__ = ["Responses", "Reward", "Scored", "load_rewards"]
