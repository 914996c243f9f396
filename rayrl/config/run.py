"""Settings of one run: all tables together, and the rules between tables.

Rules within one table are checked by that table. Rules that need the data, the models or the cluster are checked by
`rayrl.preflight`.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayrl.algorithms.comparisons import queries_per_pair
from rayrl.algorithms.pairing import PAIRINGS
from rayrl.config.data import PoolConfig, SeedDataConfig
from rayrl.config.dpo import DpoConfig
from rayrl.config.engines import EngineConfig
from rayrl.config.evaluate import EvaluateConfig
from rayrl.config.evaluator import EvaluatorConfig
from rayrl.config.generate import GenerateConfig
from rayrl.config.oracle import OracleConfig
from rayrl.config.policy import PolicyConfig
from rayrl.config.ppo import PpoConfig
from rayrl.config.preferences import PreferencesConfig
from rayrl.config.pseudo_label import PseudoLabelConfig
from rayrl.config.refresh import RefreshConfig
from rayrl.config.reward_model import RewardModelConfig
from rayrl.config.rubric import RubricConfig
from rayrl.config.select import SelectConfig
from rayrl.config.sft import SftConfig
from rayrl.config.table import Operation, Place, Table, plain_name
from rayrl.config.tracking import TrackingConfig


class RunConfig(Table):
    """One run of either pipeline."""

    name: Operation[str]
    """Name of the run in reports and trackers."""
    run_dir: Operation[Place]
    """Folder of this run: a local path, NFS, or any fsspec URL."""
    pipeline: Literal["proxy_dpo", "rlp"] = "proxy_dpo"
    """The algorithm that the tables below are for: jobs/proxy_dpo.py or jobs/rlp.py runs it."""
    seed: int = Field(default=0, ge=0)
    """All random draws follow from it."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where engines and trainings run: "auto" is on GPUs if the cluster has, or may get, one. It is science, since
    `policy.dtype = "auto"` follows it."""
    reuse: Operation[Place | None] = None
    """Another run's folder: its finished stages with identical inputs are taken over instead of done again."""
    rounds: int = Field(default=1, gt=0)
    """Repetitions of the algorithm, each on the policy that the last round made. All rounds share select.budget: each
    spends an even share of what is left of it."""
    labels: Literal["proxy", "routed", "direct", "expert", "shuffled"] = "proxy"
    """proxy is the method. "routed": after the first batch the oracle is asked only where heads are not sure of a
    prompt's best and worst response; what the budget then has left stays unspent. Controls: "direct" (DPO on the paid
    judgements alone), "expert" (the oracle labels all responses: the ceiling), "shuffled" (the paid scores are
    permuted: the floor)."""

    policy: PolicyConfig
    seed_data: SeedDataConfig | None = None
    pool: PoolConfig
    sft: SftConfig = SftConfig()
    generators: EngineConfig = EngineConfig()
    """Replicas that sample responses and serve a generative evaluator."""
    embedders: EngineConfig = EngineConfig()
    """Replicas that embed texts and serve reward models and a scalar evaluator."""
    generate: GenerateConfig = GenerateConfig()
    select: SelectConfig = SelectConfig()
    rubric: RubricConfig = RubricConfig()
    oracle: OracleConfig
    evaluator: EvaluatorConfig = EvaluatorConfig()
    pseudo_label: PseudoLabelConfig = PseudoLabelConfig()
    dpo: DpoConfig = DpoConfig()
    preferences: PreferencesConfig | None = None
    """rlp: needed where PPO's reward is a reward model."""
    reward_model: RewardModelConfig = RewardModelConfig()
    ppo: PpoConfig = PpoConfig()
    refresh: RefreshConfig = RefreshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: Operation[TrackingConfig] = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        return plain_name(name, "my-run")

    @field_validator("run_dir", "reuse")
    @classmethod
    def _plain_folder(cls, folder: str | None) -> str | None:
        if folder is not None and (not folder.strip() or not folder.isprintable()):
            raise ValueError(
                f'must be the path or URL of a folder, without line breaks, got {folder!r}; write "runs/mine"'
            )
        return folder

    @model_validator(mode="after")
    def _rules_between_tables(self) -> "RunConfig":
        _check_budget(self)
        _check_selection(self)
        _check_answers(self)
        _check_order_of_people(self)
        _check_seed_data(self)
        _check_pairs(self)
        if self.rounds > 1:
            _check_rounds(self)
        if self.pseudo_label.synthetic:
            _check_synthetic_pairs(self)
        if self.pipeline == "rlp":
            _check_rlp(self)
        return self

    @property
    def learns_from_judgements(self) -> bool:
        """Return whether single responses are judged to learn from: proxy DPO, and PPO on an evaluator."""
        return self.pipeline == "proxy_dpo" or self.ppo.reward == "evaluator"

    @property
    def embeds_pool(self) -> bool:
        """Return whether the selection reads vectors of all that may be asked about."""
        return self.labels != "expert" and (self.select.reads_vectors or self.labels == "routed")

    @property
    def learns_from_comparisons(self) -> bool:
        """Return whether reward models learn from preference pairs, asked of the oracle or read from a file."""
        return self.pipeline == "rlp" and self.ppo.reward == "reward_model"

    @property
    def asks_for_comparisons(self) -> bool:
        """Return whether the oracle compares two of M1's responses to a prompt, instead of judging each."""
        return self.learns_from_comparisons and self.preferences is not None and self.preferences.source == "oracle"

    @property
    def asks_for_judgements(self) -> bool:
        """Return whether the oracle judges single responses: to label them, or to evaluate."""
        num_evaluation_queries = self.evaluate.budget + self.evaluate.diagnosis_budget
        return self.learns_from_judgements or num_evaluation_queries > 0

    @property
    def asks_to_compare(self) -> bool:
        """Return whether the oracle is asked which of two responses is better: to label them, or to evaluate."""
        return self.asks_for_comparisons or self.competes_by in ("both", "random")

    @property
    def best_of_n(self) -> int:
        """Return how many of M1's answers the control best of n picks from; 0 without it, and always in proxy DPO."""
        return self.evaluate.best_of_n if self.pipeline == "rlp" else 0

    @property
    def rewards_by_embedders(self) -> bool:
        """rlp: whether embedding replicas serve the reward, not generators or a function."""
        match self.ppo.reward:
            case "reward_model":
                return True
            case "evaluator":
                return self.evaluator.served_by == "embedders"
            case "function":
                return False

    @property
    def selects_by_rewarders(self) -> bool:
        """rlp: whether the fleet that serves the reward also embeds for the selection, and therefore stays."""
        if self.ppo.reward == "evaluator" and self.evaluator.type == "head":
            return True
        pooling = "last" if self.ppo.reward == "reward_model" else self.select.pooling
        return self.rewards_by_embedders and self.select.embedder == "policy" and self.select.pooling == pooling

    @property
    def clusters_by_rewarders(self) -> bool:
        """rlp: whether the fleet that serves the reward model also embeds for the clustering, and therefore stays."""
        return self.refresh.spg.embedder is None and self.select.pooling == "last"

    @property
    def competes_by(self) -> Literal["both", "random", "scores"] | None:
        """The oracle's way to rank an answer and its reference.

        It compares the two, in both orders or in a drawn one, or scores both if it cannot compare, or flips some
        comparisons. None without reference answers.
        """
        references = self.evaluate.reference_answers
        if references is None:
            return None
        compares = self.oracle.can_compare(self.rubric) and not self.oracle.flips_comparisons()
        return references.order if compares else "scores"


def _check_budget(config: RunConfig) -> None:
    """Refuse a label budget that is too small to learn anything from."""
    budget = config.select.budget
    if config.learns_from_judgements and budget < 1:
        raise ValueError(
            "select.budget must be at least 1: the oracle's answers are what the evaluator learns from, got "
            f"{budget}; set it to the number of queries you pay for"
        )
    # A pair asked about in both orders takes two queries.
    if config.preferences is not None and config.preferences.source == "oracle" and budget < 2:
        raise ValueError(
            f'select.budget must be at least 2 when preferences.source is "oracle", got {budget}; raise it, or set '
            'preferences.source = "data"'
        )
    if config.select.unit == "prompt" and budget < config.generate.k:
        raise ValueError(
            f'select.budget must be at least generate.k ({config.generate.k}) when select.unit is "prompt", got '
            f"{budget}: all responses of a prompt are asked about together; raise it, or lower generate.k"
        )


def _check_selection(config: RunConfig) -> None:
    """Refuse a strategy that chooses something else than what the oracle is asked."""
    select, preferences = config.select, config.preferences
    name = select.strategy
    if config.asks_for_comparisons:
        assert preferences is not None
        reads_answers = select.batches > 1 or select.reads_heads
        if select.asks != "pairs" and reads_answers:
            raise ValueError(
                "select.strategy must choose pairs where the answers to comparisons choose the next ones, got "
                f'"{name}"; set it to "delta_ucb", or select.batches = 1 and a strategy that reads no answers'
            )
        if select.asks == "pairs" and preferences.pairs_per_prompt > 1:
            raise ValueError(
                f'preferences.pairs_per_prompt must be 1 with select.strategy = "{name}", which chooses one pair of a '
                f"prompt, got {preferences.pairs_per_prompt}; leave it out"
            )
        if select.asks == "pairs" and select.text == "prompt" and select.reads_vectors:
            raise ValueError(
                'select.text must be "prompt_response" or "judge_prompt" where pairs are chosen by vectors, got '
                '"prompt": both responses to a prompt would have the same vector; leave it out'
            )
    elif select.asks == "pairs":
        raise ValueError(
            f'select.strategy must choose responses where the oracle judges each one, got "{name}", which chooses '
            'pairs; set it to "k_center", or have pairs compared: pipeline = "rlp" and preferences.source = "oracle"'
        )
    if select.reads_evaluator:
        _check_evaluator_is_read(config)
    if config.labels == "routed":
        if config.pipeline != "proxy_dpo":
            raise ValueError(f'labels must be "proxy" when pipeline is "{config.pipeline}", got "routed"; leave it out')
        if select.batches == 1:
            raise ValueError(
                'select.batches must be 2 or more with labels = "routed", got 1: the answers of the first batch tell '
                "where the others are needed; set select.batches = 8"
            )
        if select.reads_heads:
            raise ValueError(
                'select.strategy chooses the first batch with labels = "routed", and must read no answers, got '
                f'"{name}"; set it to "k_center" or "random"'
            )
        if select.first_batch is not None:
            raise ValueError(
                'select.first_batch must be left out with labels = "routed", got '
                f'"{select.first_batch}": select.strategy chooses the first batch; leave it out'
            )
        if select.text == "prompt":
            raise ValueError(
                'select.text must be "prompt_response" or "judge_prompt" with labels = "routed", got "prompt": both '
                "responses to a prompt would have the same vector; leave it out"
            )
    if select.stop_at is not None and (select.batches == 1 or not config.embeds_pool):
        raise ValueError(
            "select.stop_at must be left out where there is one batch, or where the pool is not embedded, got "
            f'{select.stop_at} with batches = {select.batches}, strategy = "{name}" and labels = "{config.labels}": '
            "the label meter is read on vectors between batches; set batches = 8 and a strategy that reads vectors, "
            "or leave it out"
        )
    if select.batches > 1 and config.labels == "expert":
        raise ValueError(
            f'select.batches must be 1 with labels = "expert", which asks about everything, got {select.batches}; '
            "leave it out"
        )
    if select.batches > max(1, select.budget):
        raise ValueError(
            f"select.batches must be at most select.budget ({select.budget}), got {select.batches}: each batch asks at "
            "least one question; lower it"
        )


def _check_order_of_people(config: RunConfig) -> None:
    """Refuse to put each pair before people twice, once in either order."""
    orders = {
        "preferences.order": config.preferences.order if config.asks_for_comparisons and config.preferences else "",
        "evaluate.reference_answers.order": config.competes_by or "",
    }
    for setting, order in orders.items():
        if config.oracle.people_asked() is config.oracle and order == "both":
            raise ValueError(
                f'{setting} must be "random" where people compare, got "both", which puts each pair before them twice; '
                "set it"
            )


def _check_evaluator_is_read(config: RunConfig) -> None:
    """Refuse a strategy that reads the last round's evaluator where there is none, or none with a distribution."""
    name = config.select.strategy
    remedy = 'or choose another strategy, such as "uncertainty" with select.batches = 8'
    if not config.learns_from_judgements or config.labels not in ("proxy", "shuffled"):
        raise ValueError(
            f'select.strategy must read no evaluator where none is fitted before the labels are chosen, got "{name}" '
            f'with pipeline = "{config.pipeline}", ppo.reward = "{config.ppo.reward}" and labels = "{config.labels}"; '
            'set it to "k_center" or "random"'
        )
    if config.evaluator.type != "generative":
        raise ValueError(
            f'evaluator.type must be "generative" with select.strategy = "{name}", got "{config.evaluator.type}": '
            f"it has a score and no distribution over the scores; leave it out, {remedy}"
        )
    if config.rounds == 1:
        raise ValueError(
            f'rounds must be 2 or more with select.strategy = "{name}", got 1: it reads the evaluator that the round '
            f"before has fitted; set rounds = 2, {remedy}"
        )


def _check_answers(config: RunConfig) -> None:
    """Refuse an oracle that answers otherwise than the rubric is read."""
    if conflict := config.oracle.conflict_with(config.rubric):
        raise ValueError(conflict)


def _check_seed_data(config: RunConfig) -> None:
    """Refuse a run that uses seed data and names none, or learns from turns that its seed data does not have."""
    if config.seed_data is None and (config.sft.enabled or config.generate.source == "seed"):
        raise ValueError(
            "seed_data is missing: sft and the off-policy control need it; add a [seed_data] table "
            "or set sft.enabled = false"
        )
    is_chat = config.seed_data is not None and config.seed_data.messages_column is not None
    if config.sft.enabled and config.sft.turns == "all" and not is_chat:
        raise ValueError(
            'sft.turns must be "last" for seed data without chats, got "all": such a row has one turn; leave it out, '
            "or set seed_data.messages_column"
        )


def _check_pairs(config: RunConfig) -> None:
    """Refuse settings that leave no pair of responses to one prompt."""
    is_proxy_dpo = config.pipeline == "proxy_dpo"
    pairing = config.pseudo_label.pairing
    is_sampled = config.generate.source == "policy" and (is_proxy_dpo or config.asks_for_comparisons)
    if is_sampled and config.generate.is_greedy:
        raise ValueError(
            f"generate.temperature must be above 0, and generate.top_k not 1, where a prompt has {config.generate.k} "
            f"responses (generate.k), got {config.generate.temperature:g} and {config.generate.top_k}: all of them "
            "would be the same, and no pair comes of them; raise the temperature, to 0.7 for one"
        )
    if config.best_of_n and config.evaluate.temperature == 0:
        raise ValueError(
            f"evaluate.temperature must be above 0 with evaluate.best_of_n = {config.best_of_n}, got 0: the best of "
            "equal answers is each of them; raise it, or leave evaluate.best_of_n out"
        )
    if is_proxy_dpo and PAIRINGS[pairing].num_pairs(config.generate.k) < 1:
        raise ValueError(
            f'generate.k is too small for pseudo_label.pairing = "{pairing}", which makes no pair of '
            f"{config.generate.k} responses to a prompt; raise it"
        )
    if is_proxy_dpo and config.labels == "direct" and config.select.unit != "prompt":
        raise ValueError(
            'labels = "direct" pairs only paid responses, so select.unit must be "prompt", got "response"; set '
            'select.unit = "prompt"'
        )
    evaluator = config.evaluator
    if evaluator.type == "head" and config.select.text == "prompt":
        raise ValueError(
            'select.text must be "prompt_response" or "judge_prompt" with evaluator.type = "head", got "prompt": all '
            "responses to a prompt would have the same score; leave it out"
        )
    if evaluator.type == "scalar" and evaluator.loss == "bradley_terry" and config.select.unit != "prompt":
        raise ValueError(
            'evaluator.loss = "bradley_terry" needs pairs of paid responses, so select.unit must be "prompt", got '
            '"response"; set select.unit = "prompt"'
        )


def _check_rounds(config: RunConfig) -> None:
    """Refuse several rounds where a later one could not ask, or would change nothing."""
    got = f"got {config.rounds}"
    if config.pipeline == "proxy_dpo" and config.labels in ("direct", "expert"):
        raise ValueError(
            f'rounds must be 1 when labels is "{config.labels}", {got}: its controls are of one round; set rounds = 1'
        )
    is_paid = config.learns_from_judgements or config.asks_for_comparisons
    least_budget = config.rounds * _least_queries(config)
    if is_paid and config.select.budget < least_budget:
        raise ValueError(
            f"select.budget must be at least {least_budget}, so that each of {config.rounds} rounds can ask, got "
            f"{config.select.budget}; raise it, or lower rounds"
        )
    if config.pipeline == "rlp" and config.ppo.reward == "function":
        raise ValueError(
            f'rounds must be 1 when ppo.reward is "function", {got}: a function learns nothing from a round; set '
            "rounds = 1"
        )
    reads_pairs = config.learns_from_comparisons and not config.asks_for_comparisons
    if reads_pairs and config.refresh.method == "none":
        raise ValueError(
            f'rounds must be 1 when refresh.method is "none" and preferences.source is "data", {got}: nothing would '
            'change from round to round; choose another refresh, or preferences.source = "oracle"'
        )
    if config.asks_for_comparisons and config.refresh.method == "ocrm":
        raise ValueError(
            f'rounds must be 1 when refresh.method is "ocrm" and preferences.source is "oracle", {got}: its weights '
            "are for pairs that M1 wrote, and a later round's are another policy's; choose another refresh"
        )
    if config.asks_for_comparisons and config.reward_model.path is not None:
        raise ValueError(
            f'rounds must be 1 with a ready-made reward_model.path and preferences.source = "oracle", {got}: every '
            "round fits r on the pairs so far; leave the path out"
        )


def _least_queries(config: RunConfig) -> int:
    """Count the queries that are asked together or not at all: the fewest that a round can ask."""
    if config.asks_for_comparisons:
        assert config.preferences is not None
        return queries_per_pair(config.preferences.order)
    return config.generate.k if config.select.unit == "prompt" else 1


def _check_synthetic_pairs(config: RunConfig) -> None:
    """Refuse synthetic pairs beside the pseudo-labels where they cannot be made."""
    if config.pipeline != "proxy_dpo":
        raise ValueError(
            f'pseudo_label.synthetic must be false when pipeline is "{config.pipeline}", got true: there '
            'refresh.method = "spg" makes the synthetic pairs'
        )
    if config.labels in ("direct", "expert"):
        raise ValueError(
            f'pseudo_label.synthetic must be false when labels is "{config.labels}", got true: no evaluator is fitted '
            "that could rank the responses of a cluster"
        )
    if config.refresh.method != "spg":
        raise ValueError(
            f'refresh.method must be "spg" when pseudo_label.synthetic is true, got "{config.refresh.method}"; set '
            'refresh.method = "spg"'
        )


def _check_rlp(config: RunConfig) -> None:
    """Refuse settings that the rlp pipeline lacks, or has no use for."""
    if config.ppo.reward == "reward_model" and config.preferences is None:
        raise ValueError("preferences is missing: the reward model learns from pairs; add a [preferences] table")
    if config.labels in ("direct", "expert"):
        raise ValueError(f'labels must be "proxy" when pipeline is "rlp", got "{config.labels}"; leave it out')
    if config.labels == "shuffled" and config.ppo.reward != "evaluator":
        raise ValueError(
            'labels = "shuffled" permutes the scores an evaluator learns from, and ppo.reward is '
            f'"{config.ppo.reward}"; leave labels out, or set ppo.reward = "evaluator"'
        )
    if config.asks_for_comparisons and config.generate.source == "seed":
        raise ValueError(
            'generate.source must be "policy" when preferences.source is "oracle", got "seed": the oracle compares '
            "M1's own responses; leave it out"
        )
    num_workers, uml_batch_size = config.reward_model.num_workers, config.refresh.uml.batch_size
    if config.refresh.method == "uml" and uml_batch_size < 2 * num_workers:
        raise ValueError(
            f"refresh.uml.batch_size must be at least {2 * num_workers}, two prompts for each of "
            f"reward_model.num_workers ({num_workers}), got {uml_batch_size}: a prompt alone has no negatives; raise "
            "it, or lower reward_model.num_workers"
        )
    if config.evaluate.lm_eval.tasks:
        raise ValueError(
            f'evaluate.lm_eval.tasks must be empty when pipeline is "rlp", got {config.evaluate.lm_eval.tasks}: '
            "this pipeline runs no benchmarks; leave it out"
        )
