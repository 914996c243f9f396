"""Scripted experts: `judge(prompt, response) -> (score, rationale)`."""
