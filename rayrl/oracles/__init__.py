"""Paid oracles behind one Protocol, and the ledger that guards the money.

Start with `protocol`. `build` makes the oracle that a config names, and `pool` runs it as an actor.
"""
