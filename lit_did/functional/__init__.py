"""Stateless functions on statistics: rewards and preference losses."""

from lit_did.functional.preference import preference_loss, reward_accuracy, reward_margin

__all__ = ["preference_loss", "reward_accuracy", "reward_margin"]
