"""Metrics that rayrl exports, each defined once. cluster/README.md lists them too, with the process that emits each.

vLLM's own metrics come beside them (rayrl/engines/vllm_metrics.py), and so do Ray's. How a metric reaches Prometheus is
in `rayrl.metrics.prometheus`.
"""

from collections.abc import Mapping

from rayrl.metrics.prometheus import Counter, Gauge

# The run: its driver.
RUN = Gauge("run", "1", "1 while the run's driver lives")
PROGRESS = Gauge("progress", "ratio", "Share of a table's blocks that the step has done", ("step",))

# Tables: Ray Data's tasks.
BLOCKS = Counter(
    "blocks", "blocks", "Blocks requested; source: computed, kept (read from the table)", ("table", "source")
)
ROWS = Counter("rows", "rows", "Rows computed", ("table",))
SCORED = Counter("scored_responses", "responses", "Responses scored; source: oracle, evaluator, none", ("source",))
PAIRS = Counter("pairs", "pairs", "Preference pairs made; source: labelled, synthetic", ("source",))

# Fleets: the router.
FLEET_REPLICAS = Gauge("fleet_replicas", "replicas", "Replicas by state: ready, starting, draining", ("fleet", "state"))
QUEUE_DEPTH = Gauge("queue_depth", "calls", "Calls waiting because no replica has room", ("fleet",))
CALLS = Counter("calls", "calls", "Calls given to replicas", ("fleet",))
HUNG = Counter("hung_replicas", "replicas", "Replicas killed after a missing answer or a failed check", ("fleet",))

# Fleets: the replicas.
OF_REPLICA = ("fleet", "replica")
REPLICA_STATE = Gauge(
    "replica_state", "1", "1 for the replica's state: starting, serving, swapping", (*OF_REPLICA, "state")
)
RESTARTS = Counter("replica_restarts", "restarts", "Restarts of the replica by Ray", OF_REPLICA)
START_SECONDS = Gauge("engine_start_seconds", "seconds", "Time that the engine's start took", OF_REPLICA)
RUNNING = Gauge("requests_running", "calls", "Calls that the replica works on", OF_REPLICA)
TOKENS = Counter(
    "tokens", "tokens", "Tokens processed; kind: prompt (read), generated (written)", (*OF_REPLICA, "kind")
)
SWAPS = Counter("weight_swaps", "swaps", "Swaps to another checkpoint, each checked", OF_REPLICA)
SWAP_SECONDS = Counter("weight_swap_seconds", "seconds", "Time spent on weight swaps", OF_REPLICA)
WEIGHT_VERSION = Gauge(
    "weight_version", "updates", "PPO update whose weights the replica serves; 0 outside PPO", (*OF_REPLICA, "weights")
)
TEXT_DIFFERENCE = Gauge(
    "text_difference",
    "nats",
    "Mean distance of the replica's reading of a text from the trainer's, after its last swap to a training's result",
    OF_REPLICA,
)
ENTAILED = Counter("entailed_pairs", "pairs", "Pairs of texts read by the entailment model", OF_REPLICA)

# The coreset service: the driver, which asks all shards together.
CORESET_ROUNDS = Counter("coreset_rounds", "rounds", "Rounds of the selection, each a question to all coreset shards")

# The oracle: its pool.
JUDGEMENTS = Counter(
    "judgements",
    "judgements",
    "Answers of the oracle; kind: judgement, comparison; outcome: scored, abstained",
    ("purpose", "kind", "outcome"),
)
REUSED = Counter("judgements_reused", "judgements", "Answers taken from the ledger, which cost nothing", ("purpose",))
ORACLE_SECONDS = Counter("oracle_seconds", "seconds", "Time spent in calls to the oracle", ("purpose",))
ORACLE_IN_FLIGHT = Gauge("oracle_in_flight", "calls", "Calls to the oracle under way")
ORACLE_WAITING = Gauge("oracle_waiting", "questions", "Questions waiting for their turn or for the budget")
BUDGET = Gauge("budget_queries", "queries", "Queries that the purpose may pay for", ("purpose",))
SPENT = Gauge("spent_queries", "queries", "Queries paid for, or reserved for calls under way", ("purpose",))
BUDGET_USD = Gauge("budget_usd", "USD", "Limit over all purposes, if there is one")
SPENT_USD = Gauge("spent_usd", "USD", "USD paid, or reserved for calls under way")

# Training: rank 0. Of the tokens every rank counts its own.
TRAINING_STEP = Gauge("training_step", "steps", "Optimizer steps done (PPO: rollouts)", ("stage",))
TRAINING_TOKENS = Counter("training_tokens", "tokens", "Tokens read by optimizer steps, without padding", ("stage",))
LOSS = Gauge("training_loss", "1", "Mean loss of the step", ("stage",))
KL = Gauge("training_kl", "nats", "Mean KL divergence of a response from M1", ("stage",))
REWARD = Gauge("training_reward", "1", "Mean reward of the rollout", ("stage",))
HELD_OUT_REWARD = Gauge("training_held_out_reward", "1", "Mean reward on the held-out prompts", ("stage",))
ACCURACY = Gauge("training_accuracy", "ratio", "Share of the step's pairs that the model ranks correctly", ("stage",))
MARGIN = Gauge("training_margin", "1", "Mean reward of the chosen responses minus that of the rejected", ("stage",))
LEARNING_RATE = Gauge("training_learning_rate", "1", "Learning rate of the step", ("stage",))
STEP_SECONDS = Gauge("training_step_seconds", "seconds", "Time that the step took", ("stage",))
WAIT_SECONDS = Gauge("training_wait_seconds", "seconds", "Time that the trainer waited for the step's rows", ("stage",))

_CURVES = {
    "loss": LOSS,
    "kl": KL,
    "reward": REWARD,
    "held_out_reward": HELD_OUT_REWARD,
    "accuracy": ACCURACY,
    "reward_accuracy": ACCURACY,
    "margin": MARGIN,
    "reward_margin": MARGIN,
    "learning_rate": LEARNING_RATE,
    "seconds": STEP_SECONDS,
    "waited_s": WAIT_SECONDS,
}
"""Values of a training log that are exported. All others are in the log and in TensorBoard only."""


def show_step(stage: str, step: int, numbers: Mapping[str, float]) -> None:
    """Export the values that a training logs for a step."""
    TRAINING_STEP.set(step, stage=stage)
    for name, value in numbers.items():
        if name in _CURVES:
            _CURVES[name].set(value, stage=stage)


def show_state(state: str, replica: Mapping[str, str]) -> None:
    """Export that a replica is now in this state and in no other."""
    for known in ("starting", "serving", "swapping"):
        REPLICA_STATE.set(known == state, **replica, state=known)


def show_weights(version: str, replica: Mapping[str, str]) -> None:
    """Export which weights a replica serves.

    The version of a PPO update ends in -<update>. All other versions count as update 0.
    """
    weights, dash, update = version.rpartition("-")
    is_update = bool(dash) and update.isdigit()
    WEIGHT_VERSION.forget()  # else the version before would stay exported beside the new one
    if is_update:
        WEIGHT_VERSION.set(int(update), **replica, weights=weights)
    else:
        WEIGHT_VERSION.set(0, **replica, weights=version)


def show_budget(budgets: Mapping[str, float], budget_usd: float | None) -> None:
    """Export what the oracle may cost: queries by purpose, and USD if they are limited."""
    for purpose, budget in budgets.items():
        BUDGET.set(budget, purpose=purpose)
    if budget_usd is not None:
        BUDGET_USD.set(budget_usd)


def show_spending(spent: Mapping[str, float], spent_usd: float) -> None:
    """Export what the oracle has cost, with what is reserved for calls under way."""
    for purpose, queries in spent.items():
        SPENT.set(queries, purpose=purpose)
    SPENT_USD.set(spent_usd)
