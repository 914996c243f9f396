"""Trainings of the policy: supervised fine-tuning, DPO, PPO."""
