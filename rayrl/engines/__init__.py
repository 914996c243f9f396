"""Engines: one replica of a served model, as the plain class of a Ray actor.

    serving.py        requests name their weights; a replica swaps when a request names others
    start.py          specification, environment and arguments of a vLLM engine
    vllm_engine.py    a vLLM engine with a checked swap of its weights
    weight_folder.py  model folders as vLLM reloads them, and the trainer's record of them
    weight_sums.py    checksums that prove which weights an engine serves
    worker.py         extension of vLLM's workers: the sums of the weights that they serve
    generator.py      generation: responses, judgements, log-probabilities
    embedder.py       pooled vectors, and the values of scalar heads
    entailment.py     a sequence classifier, without vLLM
    simulated.py      replicas without a model, for rehearsals, tests and benches
    vllm_metrics.py   vLLM's own metrics through Ray

Many replicas behind a router are a fleet: `rayrl.fleets`.
"""
