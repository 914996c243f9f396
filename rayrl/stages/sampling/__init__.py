"""The prompts of a run, and the responses that a policy gives to them."""
