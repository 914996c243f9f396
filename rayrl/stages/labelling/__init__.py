"""Questions to the oracle, and what its answers make: judgements of responses, preference pairs.

`ask` and `ask_pairs` are the only modules of the stages that talk to the oracle pool.
"""
