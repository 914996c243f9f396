"""One run, all tables together."""

from typing import Literal

from pydantic import Field, model_validator

from rayrl.config.data import PolicyConfig, PoolConfig, ReferenceAnswersConfig, SeedDataConfig
from rayrl.config.engines import EngineConfig, GenerateConfig
from rayrl.config.expert import (
    HttpOracleConfig,
    OracleConfig,
    ReplayOracleConfig,
    RubricConfig,
    ScriptedOracleConfig,
    SelectConfig,
)
from rayrl.config.rlp import PpoConfig, PreferencesConfig, RefreshConfig, RewardModelConfig
from rayrl.config.rounds import refusals
from rayrl.config.table import Table
from rayrl.config.training import DpoConfig, EvaluatorConfig, PseudoLabelConfig, SftConfig

MIN_DIAGNOSIS = 36
"""9 points x 2 answers, twice."""


class LmEvalConfig(Table):
    """Optional benchmark tasks through lm-evaluation-harness and its vLLM backend."""

    tasks: list[str] = Field(default=[])
    include_path: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, gt=0)


class EvaluateConfig(Table):
    """M2 against M1 on held-out prompts, under a budget of its own."""

    budget: int = Field(default=128, ge=0)
    """Paid evaluation queries: a score of every policy's answer to a prompt, and with reference answers a comparison of
    each with the reference (two with order = "both"), or a score of the reference. As many prompts are judged as it
    pays for whole; 0 skips the expert."""
    diagnosis_budget: int = Field(default=0, ge=0)
    """rlp: paid queries beyond `budget` for what the paper leaves open: half for the reward models' accuracy on the
    policies' own samples along PPO, half for the quality of the synthetic pairs at each gamma."""
    best_of_n: int = Field(default=0, ge=0)
    """rlp: another policy in the table, the control that trains nothing: M1's best of n answers by the reward model.
    0 leaves it out."""
    temperature: float = Field(default=0.7, ge=0)
    reference_answers: ReferenceAnswersConfig | None = None
    """What all policies compete with, where it answers a held-out prompt. An expert that cannot compare (no
    `oracle.compare_function` or `comparisons_path`; `rubric.template` without `pairwise_template`) scores both."""
    lm_eval: LmEvalConfig = LmEvalConfig()

    @model_validator(mode="after")
    def _enough(self) -> "EvaluateConfig":
        if 0 < self.diagnosis_budget < MIN_DIAGNOSIS:
            raise ValueError(
                f"evaluate.diagnosis_budget must be 0 or at least {MIN_DIAGNOSIS} (M1 and four points of each PPO, two "
                f"answers each, and as much for the synthetic pairs), got {self.diagnosis_budget}"
            )
        if self.best_of_n == 1:
            raise ValueError("evaluate.best_of_n must be 0 or at least 2, got 1: the best of one answer is M1's answer")
        return self


class RunConfig(Table):
    """One run of the proxy-reward pipeline."""

    name: str = Field(pattern=r"^[\w.-]+$")
    run_dir: str
    """Folder of this run: a local path, NFS, or any fsspec URL."""
    pipeline: Literal["proxy_dpo", "rlp"] = "proxy_dpo"
    """Which algorithm the tables below are for: jobs/proxy_dpo.py or jobs/rlp.py runs it."""
    seed: int = Field(default=0, ge=0)
    reuse: str | None = None
    """Another run's folder: its finished stages with identical inputs are taken over instead of done again."""
    rounds: int = Field(default=1, gt=0)
    """How often the algorithm is repeated, each time on the policy that the last round made. All rounds share
    select.budget: each spends an even share of what is left of it."""
    labels: Literal["proxy", "direct", "expert", "shuffled"] = "proxy"
    """proxy is the method. Controls: "direct" (DPO on the paid judgements alone), "expert" (the expert labels
    everything: the ceiling), "shuffled" (the paid scores are permuted: the floor)."""

    policy: PolicyConfig
    seed_data: SeedDataConfig | None = None
    pool: PoolConfig
    sft: SftConfig = SftConfig()
    generators: EngineConfig = EngineConfig()
    embedders: EngineConfig = EngineConfig()
    generate: GenerateConfig = GenerateConfig()
    select: SelectConfig = SelectConfig()
    rubric: RubricConfig = RubricConfig()
    oracle: OracleConfig
    evaluator: EvaluatorConfig = EvaluatorConfig()
    pseudo_label: PseudoLabelConfig = PseudoLabelConfig()
    dpo: DpoConfig = DpoConfig()
    preferences: PreferencesConfig | None = None
    reward_model: RewardModelConfig = RewardModelConfig()
    ppo: PpoConfig = PpoConfig()
    refresh: RefreshConfig = RefreshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> "RunConfig":
        needs_budget = self.pipeline == "proxy_dpo" or self.ppo.reward == "evaluator"
        for broken, message in (
            (
                needs_budget and self.select.budget < 1,
                f"select.budget must be at least 1: the expert's answers are what the evaluator learns from, got "
                f"{self.select.budget}; set it to the number of queries you pay for",
            ),
            (
                self.preferences is not None and self.preferences.source == "oracle" and self.select.budget < 2,
                f'select.budget must be at least 2 when preferences.source is "oracle", got {self.select.budget}',
            ),
            (
                self.pipeline == "proxy_dpo" and self.pseudo_label.pairing == "best_worst" and self.generate.k < 2,
                f'generate.k must be at least 2 when pseudo_label.pairing is "best_worst", got {self.generate.k}',
            ),
            (
                self.seed_data is None and (self.sft.enabled or self.generate.source == "seed"),
                "seed_data is missing: sft and the off-policy control need it; add a [seed_data] table "
                "or set sft.enabled = false",
            ),
            (
                self.pipeline == "proxy_dpo" and self.labels == "direct" and self.select.unit != "prompt",
                'labels = "direct" pairs only paid responses, so select.unit must be "prompt", got "response"',
            ),
            (
                self.evaluator.type == "scalar"
                and self.evaluator.loss == "bradley_terry"
                and self.select.unit != "prompt",
                'evaluator.loss = "bradley_terry" needs pairs of paid responses: set select.unit = "prompt"',
            ),
            (
                self.select.unit == "prompt" and self.select.budget < self.generate.k,
                f'select.budget must be at least generate.k ({self.generate.k}) when select.unit is "prompt", '
                f"got {self.select.budget}",
            ),
            *refusals(self),
        ):
            if broken:
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _rlp_checks(self) -> "RunConfig":
        if self.pipeline != "rlp":
            return self
        for broken, message in (
            (
                self.ppo.reward == "reward_model" and self.preferences is None,
                "preferences is missing: the reward model learns from pairs; add a [preferences] table",
            ),
            (
                self.labels in ("direct", "expert"),
                f'labels must be "proxy" when pipeline is "rlp", got "{self.labels}"; leave it out',
            ),
            (
                self.labels == "shuffled" and self.ppo.reward != "evaluator",
                f'labels = "shuffled" permutes the scores an evaluator learns from, and ppo.reward is '
                f'"{self.ppo.reward}"; leave labels out, or set ppo.reward = "evaluator"',
            ),
            (
                self.asks_for_comparisons and self.generate.source == "seed",
                'generate.source must be "policy" when preferences.source is "oracle", got "seed": the expert compares '
                "M1's own responses; leave it out",
            ),
            (
                bool(self.evaluate.lm_eval.tasks),
                f'evaluate.lm_eval.tasks must be empty when pipeline is "rlp", got {self.evaluate.lm_eval.tasks}: '
                "this pipeline runs no benchmarks; leave it out",
            ),
        ):
            if broken:
                raise ValueError(message)
        return self

    @property
    def asks_for_comparisons(self) -> bool:
        """Whether the expert compares two of M1's responses to a prompt, instead of judging each."""
        learns = self.pipeline == "rlp" and self.ppo.reward == "reward_model"
        return learns and self.preferences is not None and self.preferences.source == "oracle"

    @property
    def rewards_by_embedders(self) -> bool:
        """rlp: whether embedding replicas serve the reward, not generators or a function."""
        scalar = self.ppo.reward == "evaluator" and self.evaluator.type == "scalar"
        return self.ppo.reward == "reward_model" or scalar

    @property
    def selects_by_rewarders(self) -> bool:
        """rlp: whether what embeds for the selection is the fleet that serves the reward, which stays."""
        pooling = "last" if self.ppo.reward == "reward_model" else self.select.pooling
        return self.rewards_by_embedders and self.select.embedder == "policy" and self.select.pooling == pooling

    @property
    def clusters_by_rewarders(self) -> bool:
        """rlp: whether what embeds for the clustering is the fleet that serves the reward model, which stays."""
        return self.refresh.spg.embedder is None and self.select.pooling == "last"

    @property
    def competes_by(self) -> Literal["both", "random", "scores"] | None:
        """What ranks an answer and the reference: the expert's comparison, in both orders or a drawn one, or its scores
        of the two if it cannot compare; None if there are no references.
        """
        references, rubric = self.evaluate.reference_answers, self.rubric
        match self.oracle:
            case HttpOracleConfig():  # the built-in comparison asks for something else than one's own rubric
                compares = rubric.template is None or rubric.pairwise_template is not None
            case ScriptedOracleConfig():
                compares = self.oracle.compare_function is not None
            case ReplayOracleConfig():
                compares = self.oracle.comparisons_path is not None
        return None if references is None else references.order if compares else "scores"

    @property
    def asks_for_judgements(self) -> bool:
        """Whether the expert judges single responses: to label them, or to evaluate."""
        labels = self.pipeline == "proxy_dpo" or self.ppo.reward == "evaluator"
        return labels or self.evaluate.budget + self.evaluate.diagnosis_budget > 0
