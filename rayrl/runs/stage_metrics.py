"""Metrics that each stage leaves in its manifest, one frozen dataclass per stage.

Stages fill them; the report, `rayrl status` and the notebooks read them back with their types (`rayrl.runs.run`).
Seconds are wall-clock time. A field that is None was not measured; its description says when.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict

from rayrl.algorithms.estimate import CalibrationBin, Estimate


class StageMetrics:
    """Base of all of them: a manifest with a field that the class does not have is refused when it is read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class PoolMetrics(StageMetrics):
    """Prompts read, and how they were laid out in blocks."""

    num_rows: int
    """Rows of the file."""
    num_empty: int
    num_duplicates: int
    num_prompts: int
    """Prompts that train, without the held-out ones."""
    num_eval: int
    """Held-out prompts."""
    num_train_blocks: int
    num_held_out_blocks: int
    num_bad: int = 0
    """Rows dropped by `pool.on_bad_row`, of a broken line, a wrong cell, a refused chat or too long a prompt."""
    first_bad: str = ""
    """What was wrong with the first of them, with its file and row."""
    num_with_control_tokens: int = 0
    """Prompts whose texts hold control tokens of the policy's tokenizer, read as ordinary text; held-out ones too."""


@dataclass(frozen=True, kw_only=True)
class FitMetrics(StageMetrics):
    """Common metrics of every training: its length and where its loss went."""

    num_steps: int
    first_loss: float
    final_loss: float
    """Mean of the last ten steps."""
    fit_s: float
    eval_loss: float | None = None
    """Loss of the written weights on the held-out rows; None without evaluations. With `patience` it is the lowest of
    all evaluations, and so a little lower than on other rows."""
    best_step: int | None = None
    """With `patience`: the step whose weights were written."""


@dataclass(frozen=True, kw_only=True)
class SftMetrics(FitMetrics):
    """Supervised fine-tuning on the seed data."""

    num_empty: int
    num_below_score: int
    num_without_score: int = 0
    """Rows whose score is empty or NaN."""
    num_bad: int = 0
    """Rows dropped by `seed_data.on_bad_row`."""
    num_truncated: int
    """Examples whose response was cut to the context."""
    num_too_long: int = 0
    """Examples left out because their prompts fill the context."""
    num_used_rows: int = 0
    """Rows with a response to learn from. An example is a row, or with `sft.turns = "all"` a turn of the assistant."""
    num_skipped_turns: int = 0
    """Turns of the assistant in these rows that are no examples: empty, calling a tool, or before any text of the
    user."""


@dataclass(frozen=True, kw_only=True)
class GenerateMetrics(StageMetrics):
    """Responses sampled from a policy."""

    num_prompts: int
    num_responses: int
    """Without empty ones and repeats."""
    num_empty: int
    num_duplicates: int
    num_tokens: int
    num_truncated: int
    """Responses that end at the longest length allowed."""
    mean_tokens: float
    truncated_share: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class SeedResponsesMetrics(StageMetrics):
    """Responses of the seed data that stand in for the policy's (the off-policy control)."""

    num_responses: int


@dataclass(frozen=True, kw_only=True)
class CandidatesMetrics(StageMetrics):
    """Responses of a later round that the oracle has not judged yet."""

    num_responses: int


@dataclass(frozen=True, kw_only=True)
class BatchMetrics(StageMetrics):
    """One batch of a selection that asks as it picks."""

    num_asked: int
    num_scored: int


@dataclass(frozen=True, kw_only=True)
class SelectMetrics(StageMetrics):
    """The selection of what the oracle is asked about."""

    strategy: str
    """A name of `rayrl.algorithms.selection.STRATEGIES`; "all" where everything there is was taken."""
    num_selected: int
    """Responses, also where whole prompts were picked."""
    num_candidates: int
    radius: list[float] = field(default_factory=list)
    """Covering radius as the selection grew, at most about 200 points; empty for strategies without one."""
    batches: list[BatchMetrics] = field(default_factory=list)
    """In the order of asking; empty where all is picked at once."""
    num_unspent: int = 0
    """Questions that the round's budget had left when the last batch was answered."""
    is_enough: bool = False
    """Whether `select.stop_at` ended the asking."""
    num_embedded: int | None = None
    embed_s: float | None = None
    num_unread: int | None = None
    """Candidates from which the evaluator of the round before abstained; None where the strategy does not read it."""


SPENT_STATES = ("scored", "abstained", "lost")
"""States of a query in the ledger in which it counts as spent: answered, or perhaps paid and lost."""


@dataclass(frozen=True, kw_only=True)
class LedgerCounts(StageMetrics):
    """Queries of one purpose of a run in the ledger. What is in flight is held back from the budget, not spent yet."""

    budget: int
    spent: int
    """Queries in one of `SPENT_STATES`."""
    scored: int
    abstained: int
    refunded: int
    lost: int
    """Calls under way when a process died, and answers of a failed judge: the money may be gone."""
    in_flight: int
    taken_over: int = 0
    """Questions that another stage or run had paid for: answered at no cost."""
    abstentions: dict[str, int] = field(default_factory=dict)
    """How often each reason of an abstention was given, the commonest first."""
    cost_usd: float | None
    """None: the oracle has no price, or nothing was asked."""
    input_tokens: int = 0
    """As the oracle counted them; 0 where it counts none."""
    output_tokens: int = 0

    @classmethod
    def from_states(
        cls,
        num_by_state: Mapping[str, int],
        *,
        budget: int,
        cost_usd: float | None,
        taken_over: int = 0,
        abstentions: dict[str, int] | None = None,
        input_tokens: int = 0,
        output_tokens: int = 0,
    ) -> "LedgerCounts":
        """Add up the ledger's rows of one purpose, given as their number in each state."""
        num = dict.fromkeys((*SPENT_STATES, "refunded", "reserved"), 0) | dict(num_by_state)
        return cls(
            budget=budget,
            spent=sum(num[state] for state in SPENT_STATES),
            scored=num["scored"],
            abstained=num["abstained"],
            refunded=num["refunded"],
            lost=num["lost"],
            in_flight=num["reserved"],
            taken_over=taken_over,
            abstentions=abstentions or {},
            cost_usd=cost_usd,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )

    def price(self) -> str:
        """Write what was paid, for humans: in USD, or in tokens where there is no price."""
        if self.cost_usd is not None:
            return f"{self.cost_usd:.2f} USD"
        if self.input_tokens + self.output_tokens == 0:
            return "unpriced"
        return f"unpriced, {self.input_tokens:,} tokens read and {self.output_tokens:,} written"


@dataclass(frozen=True, kw_only=True)
class QueryMetrics(StageMetrics):
    """Judgements of single responses, paid out of the label budget."""

    num_spent: int
    """Label queries that this round paid for."""
    num_scored: int
    num_abstained: int
    score_histogram: dict[str, int]
    """Judgements by rounded score."""
    abstentions: dict[str, int]
    """The five commonest reasons, with their counts."""
    ledger: dict[str, LedgerCounts]
    """By purpose, when the stage ended."""


@dataclass(frozen=True, kw_only=True)
class EvaluatorValidation(StageMetrics):
    """An evaluator on judgements that it was not trained on."""

    num: int
    num_abstained: int
    num_too_long: int = 0
    """Of the abstentions: those whose texts exceed the evaluator's context."""
    loss: float | None
    """Mean squared error of the scores; None without a scored judgement."""
    spearman: Estimate | None
    within_one: float
    calibration: list[CalibrationBin]


@dataclass(frozen=True, kw_only=True)
class FitEvaluatorMetrics(FitMetrics):
    """The evaluator's training, and what it is worth."""

    num_too_long: int = 0
    """Judgements left out of the training because the evaluator's context is too short for them."""
    validation: EvaluatorValidation


@dataclass(frozen=True, kw_only=True)
class PseudoLabelMetrics(StageMetrics):
    """Scores of all responses, and the pairs they make."""

    num_prompts: int
    num_scored: int
    num_abstained: int
    num_too_long: int = 0
    """Of the abstentions: responses that exceed the evaluator's context, with their prompts (and the rubric)."""
    num_oracle_scored: int
    """Of the scored: those whose score was paid for."""
    num_pairs: int
    num_synthetic: int
    """Of the pairs: those of synthetic preference generation."""
    num_ties: int
    """Prompts without a pair."""
    pairs_per_query: float
    mode: str


@dataclass(frozen=True, kw_only=True)
class DpoMetrics(FitMetrics):
    """DPO's training."""

    tokens_per_s: float
    padding_share: float
    reward_accuracy: float


@dataclass(frozen=True, kw_only=True)
class PairFileCounts(StageMetrics):
    """Counts of the rows of a file of preference pairs, by what became of them."""

    num_prompts: int
    num_rows: int
    num_unusable: int
    num_tied: int
    num_other_prompt: int
    num_bad: int = 0
    """Rows dropped by `preferences.data.on_bad_row`."""
    num_truncated: int
    num_too_long: int
    num_same_when_cut: int


@dataclass(frozen=True, kw_only=True)
class ComparisonCounts(StageMetrics):
    """Counts of pairs of responses that the oracle was asked about, by what became of them."""

    num_ties: int
    num_abstained: int
    num_disagreements: int
    """Pairs asked in both orders whose two answers contradict each other."""
    first_position_share: float | None
    """Share of the decided questions won by the first position: 0.5 without position bias; None if none was decided."""
    abstentions: dict[str, int]
    """The five commonest reasons, with their counts."""


@dataclass(frozen=True, kw_only=True)
class AskedPairs(StageMetrics):
    """Comparisons paid out of the label budget in one round."""

    order: str
    num_asked: int
    """Pairs of responses asked about."""
    num_asked_before: int
    """Pairs drawn again in a later round, and not asked about again."""
    num_without_two_responses: int
    """Prompts without two different responses."""
    num_new_pairs: int
    """Preference pairs that this round's comparisons decide."""
    num_spent: int
    """Label queries that this round paid for."""
    counts: ComparisonCounts
    ledger: dict[str, LedgerCounts]


@dataclass(frozen=True, kw_only=True)
class PreferencesMetrics(StageMetrics):
    """D: the pairs a reward model learns from, read from a file or asked of the oracle."""

    num_pairs: int
    """With those of earlier rounds."""
    num_blocks: int
    file: PairFileCounts | None = None
    """None where the oracle was asked."""
    asked: AskedPairs | None = None
    """None where a file was read."""


@dataclass(frozen=True, kw_only=True)
class PairValidation(StageMetrics):
    """Rewards of held-out preference pairs."""

    num: int
    num_abstained: int
    accuracy: Estimate | None
    """Share of pairs in the right order, a tie half of one; every prompt counts once."""
    calibration_error: float | None
    mean_margin: float | None
    length_correlation: Estimate | None


@dataclass(frozen=True, kw_only=True)
class MemberMetrics(StageMetrics):
    """One reward model of an ensemble."""

    fit: FitMetrics | None
    """None for a ready-made model."""
    validation: PairValidation


@dataclass(frozen=True, kw_only=True)
class RewardModelMetrics(StageMetrics):
    """A reward model, or an ensemble of them."""

    num_pairs: int
    num_left_out: int
    """Pairs of held-out prompts, and pairs whose sides are the same up to the context."""
    means: list[float]
    """Each member's mean reward on its training pairs."""
    stds: list[float]
    members: list[MemberMetrics]
    validation: PairValidation
    """Of the combined reward."""


@dataclass(frozen=True, kw_only=True)
class PpoMetrics(FitMetrics):
    """A PPO training: where reward, KL and time went."""

    first_reward: float
    final_reward: float
    """Mean of the last tenth of the rollouts."""
    best_held_out_reward: float | None
    final_kl: float
    """Nats per response."""
    num_responses: int
    num_abstained: int = 0
    """Responses without a reward, beside those; empty ones too."""
    num_too_long: int = 0
    """Of the abstentions: responses that exceed the evaluator's or the reward model's context."""
    num_timed_out: int = 0
    """Of the abstentions: `ppo.function` gave no answer in time."""
    samples_per_s: float
    generate_s: float
    reward_s: float
    train_s: float
    sync_s: float
    sync_share: float
    overlap: bool
    sampler_difference: float | None = None
    """Mean absolute difference of a token's log-probability between trainer and replica in the last tenth of the
    rollouts, nats: rounding alone, unless updates lie between. None for a training that did not note it."""


@dataclass(frozen=True, kw_only=True)
class ImportanceMetrics(StageMetrics):
    """Importance weights of the preference pairs (off-policy corrected reward modelling)."""

    mean_weight: float


@dataclass(frozen=True, kw_only=True)
class EntailmentCosts(StageMetrics):
    """Cost of clustering by an entailment model."""

    num_nli_calls: int
    """Pairs of texts that the model has read."""
    num_truncated_pairs: int
    num_sample_pairs: int
    """Ordered pairs of samples, repeats included."""
    deduplicated_share: float
    """Of those: decided without the model, since a text was repeated."""


@dataclass(frozen=True, kw_only=True)
class PairLengths(StageMetrics):
    """Mean lengths of the two sides of the synthetic pairs."""

    chosen_chars: float
    rejected_chars: float
    chosen_tokens: float
    rejected_tokens: float

    @property
    def gap_chars(self) -> float:
        """Mean length of the chosen side minus that of the rejected side, characters."""
        return self.chosen_chars - self.rejected_chars

    @property
    def gap_tokens(self) -> float:
        """Mean length of the chosen side minus that of the rejected side, tokens."""
        return self.chosen_tokens - self.rejected_tokens


@dataclass(frozen=True, kw_only=True)
class SynthesizeMetrics(StageMetrics):
    """Synthetic preference generation, or one of its controls."""

    method: str
    num_blocks: int
    num_prompts: int
    num_pairs: int
    acceptance_rate: float
    outcomes: dict[str, int]
    """Prompts by what became of them: "accepted", or the reason why they gave no pair."""
    clustering: str | None = None
    """None for the controls, which cluster nothing."""
    gamma: float | None = None
    confidences: dict[str, int] = field(default_factory=dict)
    """Prompts by the upper edge of the bin, a tenth wide, that holds their confidence."""
    cluster_sizes: dict[str, int] = field(default_factory=dict)
    num_clusters: dict[str, int] = field(default_factory=dict)
    pairs_by_gamma: dict[str, int] = field(default_factory=dict)
    """Pairs that each gamma would accept."""
    entailment: EntailmentCosts | None = None
    lengths: PairLengths | None = None
    """None without a pair."""
    embedding_acceptance_rate: float | None = None
    """Measured where entailment accepts no prompt at all: the share that clusters of embeddings would accept."""


@dataclass(frozen=True, kw_only=True)
class TrackedReward(StageMetrics):
    """One reward on the answers of one policy along PPO."""

    mean: float | None
    accuracy: Estimate | None
    spearman: Estimate | None


@dataclass(frozen=True, kw_only=True)
class TrackedPoint(StageMetrics):
    """A policy along PPO: what the oracle makes of its answers, and what each reward does."""

    ppo: str
    """Name of the stage."""
    step: int
    kl: float
    """Nats per response, of the rollout before it."""
    oracle_score: Estimate | None
    rewards: dict[str, TrackedReward]


@dataclass(frozen=True, kw_only=True)
class TrackRewardsMetrics(StageMetrics):
    """Reward models along PPO, against the oracle."""

    points: list[TrackedPoint]
    num_answers: int
    num_scored: int


@dataclass(frozen=True, kw_only=True)
class AuditPairsMetrics(StageMetrics):
    """Agreement of the oracle with synthetic pairs."""

    num_audited: int
    accuracy: Estimate | None
    accuracy_by_gamma: dict[str, Estimate | None]
    """Of the pairs that each gamma keeps; empty for the controls."""
    ledger: dict[str, LedgerCounts]


M1, BEST_OF_N = "m1", "best_of_n"
"""Names of two policies in an evaluation: the one that the others are compared with, and its best of n answers."""


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluation(StageMetrics):
    """One policy's answers to the held-out prompts. Differences and win rates are against M1."""

    kl: Estimate | None
    """To M1, nats per response, at temperature 1 and without truncation, on samples of its own; None if all those are
    empty."""
    kl_is_bound: bool
    """best of n: the KL is an upper bound, not a measurement."""
    kl_length: float | None = None
    """Mean number of tokens of the samples that the KL is measured on; None for M1 and for a bound."""
    perplexity: float | None
    """Under M1."""
    length: float
    """Mean number of tokens."""
    distinct2: float
    self_bleu: float
    score: Estimate | None
    """The oracle's mean score; None, like the next four, with fewer than two prompts judged."""
    base_score: Estimate | None
    """M1's on the same prompts."""
    difference: Estimate | None
    win_rate: Estimate | None
    length_controlled_win_rate: Estimate | None
    """None with too few prompts for the regression, too."""


@dataclass(frozen=True, kw_only=True)
class ReferenceEvaluation(StageMetrics):
    """One policy's answers beside the reference answers."""

    win_rate: Estimate | None
    num_abstained: int
    """Answers that the oracle did not rank against the reference."""
    num_same: int = 0
    """Answers that equal the reference: ties that were not asked about."""
    counts: ComparisonCounts | None = None
    """None where scores were compared."""


@dataclass(frozen=True, kw_only=True)
class ReferencesEvaluation(StageMetrics):
    """Win rates against the fixed table of reference answers."""

    by: str
    """`RunConfig.competes_by`."""
    num_prompts: int
    """Judged prompts that have a reference answer."""
    policies: dict[str, ReferenceEvaluation]


@dataclass(frozen=True, kw_only=True)
class RewardEvaluation(StageMetrics):
    """Agreement of one reward (a reward model, an evaluator, a function) with the oracle on one policy's answers."""

    accuracy: Estimate | None
    """Share of prompts on which it orders the policy's answer and M1's as the oracle does; ties are left out."""
    spearman: Estimate | None
    """Rank correlation of reward and score over the policy's answers."""


@dataclass(frozen=True, kw_only=True)
class EvaluateMetrics(StageMetrics):
    """Every policy of a run on the held-out prompts. One schema for both pipelines."""

    num_judged: int
    """Prompts on which the oracle scored every policy's answer."""
    policies: dict[str, PolicyEvaluation]
    """By name, "m1" first."""
    rewards: dict[str, dict[str, RewardEvaluation]]
    """By reward, then by policy (M1 left out)."""
    references: ReferencesEvaluation | None
    """None without a table of reference answers."""
    lm_eval: dict[str, dict[str, dict[str, float]]]
    """Benchmark results by policy, task and metric; empty without tasks."""
    ledger: dict[str, LedgerCounts]
