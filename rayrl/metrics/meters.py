"""Every metric that rayrl exports, defined once; cluster/README.md has the same list, with who emits what.

vLLM's own metrics come beside them (rayrl/engines/vllm_metrics.py), and so do Ray's.
"""

from collections.abc import Mapping

from rayrl.metrics.prometheus import Counter, Gauge

# the run: its driver
RUN = Gauge("run", "1", "1 for as long as the run's driver lives")
PROGRESS = Gauge("progress", "ratio", "Blocks that a step over a table has done, of all", ("step",))

# tables: Ray Data's tasks
BLOCKS = Counter("blocks", "blocks", "Blocks asked for; source: computed, or kept (it was there)", ("table", "source"))
ROWS = Counter("rows", "rows", "Rows computed", ("table",))
SCORED = Counter("scored_responses", "responses", "Responses scored; source: expert, evaluator, none", ("source",))
PAIRS = Counter("pairs", "pairs", "Preference pairs made; source: labelled, synthetic", ("source",))

# fleets: the router
FLEET_REPLICAS = Gauge("fleet_replicas", "replicas", "By state: ready, starting, draining", ("fleet", "state"))
QUEUE_DEPTH = Gauge("queue_depth", "calls", "Calls that wait for room in a replica", ("fleet",))
CALLS = Counter("calls", "calls", "Calls given to replicas", ("fleet",))
HUNG = Counter("hung_replicas", "replicas", "Replicas killed: no answer to a call or check, or a bad one", ("fleet",))

# fleets: the replicas
OF_REPLICA = ("fleet", "replica")
REPLICA_STATE = Gauge("replica_state", "1", "1 for its state: starting, serving, swapping", (*OF_REPLICA, "state"))
RESTARTS = Counter("replica_restarts", "restarts", "Times that Ray started the replica again", OF_REPLICA)
START_SECONDS = Gauge("engine_start_seconds", "seconds", "What starting the engine took", OF_REPLICA)
RUNNING = Gauge("requests_running", "calls", "Calls the replica is working on", OF_REPLICA)
TOKENS = Counter("tokens", "tokens", "Tokens answered; kind: prompt (read), generated (written)", (*OF_REPLICA, "kind"))
SWAPS = Counter("weight_swaps", "swaps", "Checkpoints loaded in place and proved", OF_REPLICA)
SWAP_SECONDS = Counter("weight_swap_seconds", "seconds", "Time spent on them", OF_REPLICA)
WEIGHT_VERSION = Gauge(
    "weight_version", "updates", "PPO update whose weights it serves, 0 outside PPO", (*OF_REPLICA, "weights")
)
ENTAILED = Counter("entailed_pairs", "pairs", "Pairs of texts the entailment model has read", OF_REPLICA)

# the coreset service: the driver, which asks all shards together
CORESET_ROUNDS = Counter("coreset_rounds", "rounds", "Questions to all shards of the coreset service")

# the expert: the oracle pool
JUDGEMENTS = Counter(
    "judgements",
    "judgements",
    "Paid or refused by the expert; kind: judgement, comparison; outcome: scored, abstained",
    ("purpose", "kind", "outcome"),
)
REUSED = Counter("judgements_reused", "judgements", "Answered from the ledger, for free", ("purpose",))
ORACLE_SECONDS = Counter("oracle_seconds", "seconds", "Time spent in calls to the expert", ("purpose",))
ORACLE_IN_FLIGHT = Gauge("oracle_in_flight", "calls", "Calls to the expert under way")
ORACLE_WAITING = Gauge("oracle_waiting", "questions", "Questions that wait for their turn or for the budget")
BUDGET = Gauge("budget_queries", "queries", "Queries that a purpose may pay for", ("purpose",))
SPENT = Gauge("spent_queries", "queries", "Queries paid for, or held for calls under way", ("purpose",))
BUDGET_USD = Gauge("budget_usd", "USD", "Hard limit over all purposes, where there is one")
SPENT_USD = Gauge("spent_usd", "USD", "Paid, or held for calls under way")

# training: rank 0, and of the tokens every rank its own
TRAINING_STEP = Gauge("training_step", "steps", "Optimizer steps done (PPO: rollouts)", ("stage",))
TRAINING_TOKENS = Counter("training_tokens", "tokens", "Tokens read by optimizer steps, without padding", ("stage",))
LOSS = Gauge("training_loss", "1", "Mean loss of the step", ("stage",))
KL = Gauge("training_kl", "nats", "Mean KL to M1 of a response", ("stage",))
REWARD = Gauge("training_reward", "1", "Mean reward of the rollout", ("stage",))
HELD_OUT_REWARD = Gauge("training_held_out_reward", "1", "Mean reward on the held-out prompts", ("stage",))
ACCURACY = Gauge("training_accuracy", "ratio", "Pairs of the step that the model has in the right order", ("stage",))
MARGIN = Gauge("training_margin", "1", "Mean reward of the chosen less that of the rejected", ("stage",))
LEARNING_RATE = Gauge("training_learning_rate", "1", "Of the step", ("stage",))
STEP_SECONDS = Gauge("training_step_seconds", "seconds", "What the step took", ("stage",))
WAIT_SECONDS = Gauge("training_wait_seconds", "seconds", "How long the trainer waited for the step's rows", ("stage",))

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
"""Which of the names in a training log are exported; all are in the log and in TensorBoard."""


def show_step(stage: str, step: int, numbers: Mapping[str, float]) -> None:
    """Export what a training logs of a step."""
    TRAINING_STEP.set(step, stage=stage)
    for name, value in numbers.items():
        if name in _CURVES:
            _CURVES[name].set(value, stage=stage)


def show_state(state: str, replica: Mapping[str, str]) -> None:
    """A replica is now in `state`, and in no other."""
    for other in ("starting", "serving", "swapping"):
        REPLICA_STATE.set(other == state, **replica, state=other)


def show_weights(version: str, replica: Mapping[str, str]) -> None:
    """A replica serves the weights `version`: those of a PPO update end in -<update>, all others are of update 0."""
    weights, dash, update = version.rpartition("-")
    numbered = bool(dash) and update.isdigit()
    WEIGHT_VERSION.forget()
    WEIGHT_VERSION.set(int(update) if numbered else 0, **replica, weights=weights if numbered else version)


def show_budget(budgets: Mapping[str, float], budget_usd: float | None) -> None:
    """What the expert may cost."""
    for purpose, budget in budgets.items():
        BUDGET.set(budget, purpose=purpose)
    if budget_usd is not None:
        BUDGET_USD.set(budget_usd)


def show_spending(spent: Mapping[str, float], spent_usd: float) -> None:
    """What the expert has cost, with what is held for calls under way."""
    for purpose, queries in spent.items():
        SPENT.set(queries, purpose=purpose)
    SPENT_USD.set(spent_usd)
