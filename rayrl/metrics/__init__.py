"""Numbers that a run emits while it goes on: curves, metrics for Prometheus, trackers, progress bars.

    curves.py         a training's values, one JSON object per step, and as TensorBoard scalars
    meters.py         every exported metric, defined once
    prometheus.py     counters and gauges that reach Prometheus through Ray
    tracking.py       Weights & Biases and MLflow, which follow the curves
    fleet_state.py    state of a fleet or the oracle pool, for operators
    progress.py       progress bars

Reading them for a report is the work of `rayrl.report`.
"""
