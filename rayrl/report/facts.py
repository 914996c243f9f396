"""Facts of one run, as plain values: what report.json holds, and what the page, `rayrl status` and `rayrl runs` show.

One schema serves both pipelines. What a run has not reached yet is None. `rayrl.report.summary` fills these classes;
how the facts are drawn or worded is decided elsewhere.
"""

from dataclasses import dataclass, field
from typing import Literal

from rayrl.algorithms.estimate import Estimate
from rayrl.algorithms.meter import LabelMeter
from rayrl.report.people import PeopleFacts
from rayrl.report.recorded_run import RecordedRun
from rayrl.report.stage_progress import Progress
from rayrl.runs.stage_metrics import PairValidation, PolicyEvaluation, ReferenceEvaluation, RewardEvaluation


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One stage of one round."""

    stage: str
    """Its name; with the round, from the second on."""
    state: Literal["done", "started", "not run"]
    seconds: float | None = None
    num_rows: int | None = None
    summary: str | None = None
    finished_at: str | None = None
    progress: Progress | None = None
    """Of a stage that has begun; None for one that has left no sign yet."""


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """Everything of one kind that a run had to start, added up: a resumed run starts things several times."""

    what: str
    num: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PaidQueries:
    """Queries of one purpose. All but the budget are None before the ledger or a manifest counts any."""

    budget: int
    spent: int | None = None
    scored: int | None = None
    abstained: int | None = None
    refunded: int | None = None
    lost: int | None = None
    in_flight: int | None = None
    taken_over: int | None = None
    """Answered at no cost: another stage or run had paid."""
    abstentions: dict[str, int] = field(default_factory=dict)
    """Reasons of abstentions, the commonest first."""
    cost_usd: float | None = None
    """None: the oracle has no price, too."""
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Paid:
    """Queries that all rounds spent of the budgets, and the pairs that these bought."""

    label: PaidQueries
    evaluate: PaidQueries
    test: PaidQueries
    people: PaidQueries
    """Questions to people beside judges; the other budgets pay where people are the only oracle."""
    num_pairs: int | None
    """Preference pairs of all rounds."""
    num_scored: int | None
    """Proxy DPO: responses with a score, the evaluator's or the oracle's; None in the other pipeline."""
    num_ties: int | None
    """Proxy DPO: prompts without a pair; None in the other pipeline."""
    num_synthetic: int | None
    """Of the pairs: those of synthetic preference generation; None without it."""
    pairs_per_query: float | None


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """One policy of the run."""

    name: str
    title: str
    evaluation: PolicyEvaluation | None
    reference: ReferenceEvaluation | None
    """None before the evaluation, and without a table of reference answers."""


@dataclass(frozen=True, kw_only=True)
class RewardModelFacts:
    """A reward model, or the combined reward of an ensemble, on held-out preference pairs."""

    num_members: int
    num_pairs: int
    """Pairs it learned from."""
    validation: PairValidation
    calibration_error: float | None
    """Of an ensemble the mean of its members': the combined rewards are standardised and have no calibration."""


@dataclass(frozen=True, kw_only=True)
class RewardFacts:
    """One reward of the run."""

    name: str
    """Its name in the first round's evaluation ("r"); later rounds add "-2"."""
    title: str
    agreement: dict[str, RewardEvaluation]
    """By policy, of the last round that was evaluated."""
    model: RewardModelFacts | None
    """None for an evaluator or a function."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Seconds of finished stages; None until they are over."""

    first_policy_s: float | None
    """Everything up to the end of the first policy's training."""
    added_s: float | None
    """Everything after it that trains: the refresh and the second PPO, later rounds."""
    training_s: float | None
    """Both together."""
    ratio: float | None
    """training_s / first_policy_s."""
    evaluate_s: float | None
    """Stages that only measure, in none of the above."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One policy's answer to a held-out prompt."""

    response: str
    score: float | None
    """None where the oracle abstained, or was not asked."""
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out prompt with the answers of all policies."""

    prompt: str
    answers: dict[str, Answer]
    """By policy."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Everything that the report knows of a run."""

    run: RecordedRun
    name: str
    run_dir: str
    pipeline: str
    seed: int
    controls: list[str]
    """Controls that the config turns on; empty is the method itself."""
    seconds: float
    """Of all finished stages."""
    stages: list[StageFacts]
    startup: list[StartUp]
    paid: Paid
    policies: list[PolicyFacts]
    """M1 first."""
    aligned: str
    """Name of the policy that the run is for."""
    aligned_title: str
    """Without the round."""
    gain: Estimate | None
    """The aligned policy minus M1 in mean oracle score."""
    gain_over_ppo: Estimate | None
    """RLP minus plain PPO; None in runs without these two."""
    rewards: list[RewardFacts]
    compute: Compute
    samples: list[Sample]
    """Evenly spaced rows of the evaluation's table."""
    caveats: list[str]
    people: PeopleFacts | None = None
    """None where nobody has answered."""
    meter: LabelMeter | None = None
    """The label meter; only the report reads it, since it takes seconds. None without labels or their vectors."""

    def policy(self, name: str) -> PolicyFacts | None:
        """Find a policy by its name."""
        return next((policy for policy in self.policies if policy.name == name), None)

    def reward(self, name: str) -> RewardFacts | None:
        """Find a reward by its name."""
        return next((reward for reward in self.rewards if reward.name == name), None)
