"""Scripted oracles: `judge(prompt, response) -> (score, rationale)`."""
