"""Measurements: every policy of a run on held-out prompts, judged by the oracle and described without it."""
