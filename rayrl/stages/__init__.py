"""Stages: the verbs of both pipelines, in folders by subject.

A stage takes the run, the services or the oracle it needs, and the artifacts of earlier stages; it writes its tables or
its checkpoint, then its manifest, and returns an artifact. Called again, it finds its manifest and returns at once.
Which stages there are, and in which order, is in `rayrl.runs.stage_table`.
"""
