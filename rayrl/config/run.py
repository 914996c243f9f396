"""One run, all tables together, and the rules between tables."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from rayrl.config.data import PoolConfig, SeedDataConfig
from rayrl.config.dpo import DpoConfig
from rayrl.config.engines import EngineConfig
from rayrl.config.evaluate import EvaluateConfig
from rayrl.config.evaluator import EvaluatorConfig
from rayrl.config.generate import GenerateConfig
from rayrl.config.oracle import HttpOracleConfig, OracleConfig, ReplayOracleConfig, ScriptedOracleConfig
from rayrl.config.policy import PolicyConfig
from rayrl.config.ppo import PpoConfig
from rayrl.config.preferences import PreferencesConfig
from rayrl.config.pseudo_label import PseudoLabelConfig
from rayrl.config.refresh import RefreshConfig
from rayrl.config.reward_model import RewardModelConfig
from rayrl.config.rubric import RubricConfig
from rayrl.config.select import SelectConfig
from rayrl.config.sft import SftConfig
from rayrl.config.table import Table
from rayrl.config.tracking import TrackingConfig


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
    tracking: TrackingConfig = TrackingConfig()

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


def refusals(config: RunConfig) -> Iterator[tuple[bool, str]]:
    """Whether each rule is broken, and what is said then."""
    if config.rounds > 1:
        yield from _of_rounds(config)
    if config.pseudo_label.synthetic:
        yield from _of_synthetic_pairs(config)


def _of_rounds(config: RunConfig) -> Iterator[tuple[bool, str]]:
    got = f"got {config.rounds}"
    is_rlp, preferences = config.pipeline == "rlp", config.preferences
    learns = is_rlp and config.ppo.reward == "reward_model"
    compares = learns and preferences is not None and preferences.source == "oracle"
    is_paid = compares or not is_rlp or config.ppo.reward == "evaluator"
    least = config.rounds * _least_queries(config, compares=compares)
    yield (
        not is_rlp and config.labels in ("direct", "expert"),
        f'rounds must be 1 when labels is "{config.labels}", {got}: its controls are of one round; set rounds = 1',
    )
    yield (
        is_paid and config.select.budget < least,
        f"select.budget must be at least {least}, so that each of {config.rounds} rounds can ask, got "
        f"{config.select.budget}; raise it, or lower rounds",
    )
    yield (
        is_rlp and config.ppo.reward == "function",
        f'rounds must be 1 when ppo.reward is "function", {got}: a function learns nothing from a round',
    )
    yield (
        learns and not compares and config.refresh.method == "none",
        f'rounds must be 1 when refresh.method is "none" and preferences.source is "data", {got}: nothing would change '
        'from round to round; choose another refresh, or preferences.source = "oracle"',
    )
    yield (
        compares and config.refresh.method == "ocrm",
        f'rounds must be 1 when refresh.method is "ocrm" and preferences.source is "oracle", {got}: its weights are '
        "for pairs that M1 wrote, and a later round's are another policy's; choose another refresh",
    )
    yield (
        compares and config.reward_model.path is not None,
        f'rounds must be 1 with a ready-made reward_model.path and preferences.source = "oracle", {got}: every round '
        "fits r on the pairs so far; leave the path out",
    )


def _least_queries(config: RunConfig, *, compares: bool) -> int:
    """What a round asks at least."""
    if compares:
        assert config.preferences is not None
        return 2 if config.preferences.order == "both" else 1
    return config.generate.k if config.select.unit == "prompt" else 1


def _of_synthetic_pairs(config: RunConfig) -> Iterator[tuple[bool, str]]:
    yield (
        config.pipeline != "proxy_dpo",
        f'pseudo_label.synthetic must be false when pipeline is "{config.pipeline}", got true: there refresh.method = '
        '"spg" makes the synthetic pairs',
    )
    yield (
        config.labels in ("direct", "expert"),
        f'pseudo_label.synthetic must be false when labels is "{config.labels}", got true: no evaluator is fitted that '
        "could rank the responses of a cluster",
    )
    yield (
        config.refresh.method != "spg",
        f'refresh.method must be "spg" when pseudo_label.synthetic is true, got "{config.refresh.method}"',
    )
