"""Rewards: reward models, evaluators and Python functions, all as one `Reward` to those that need scores."""
