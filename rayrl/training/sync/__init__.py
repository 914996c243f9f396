"""Weights from the optimizer to the engines.

    gather.py    full weights from the shards of all ranks, one bucket at a time, adapters merged
    export.py    gathered weights to a model folder, with a record of the weights
    transfer.py  gathered weights straight into the replicas' memory, by vLLM's weight transfer
    publish.py   one version to every replica of a fleet: by export and reload, or by transfer

Every training exports its result once. PPO publishes after each update.
"""
