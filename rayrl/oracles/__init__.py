"""Paid experts behind one Protocol, and the ledger that guards the money.

Start with `protocol`; `build` chooses the expert a config names; `rayrl.oracles.pool` runs it.
"""
