"""People as the oracle: questions are put on a desk, where they answer in their own time, and the run waits for them.

`desk` is the protocol; `sheet` and `label_studio` are desks. `waiting` puts questions on a desk, takes the answers into
the ledger, and parks the run until enough of them are there.
"""
