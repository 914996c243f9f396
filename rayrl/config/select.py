"""Settings of the selection of responses that the oracle is asked about."""

import json
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rayrl.algorithms.heads import NUM_HEADS
from rayrl.algorithms.selection import STRATEGIES, Strategy
from rayrl.config.table import Growing, Operation, Place, Table, name_in

Unit = Literal["response", "prompt"]


class SelectConfig(Table):
    """Selection of the responses that the oracle is asked about."""

    budget: Growing[int] = 0
    """Paid queries of all rounds together. The paper's headline is 1,700."""
    strategy: Annotated[str, name_in(STRATEGIES)] = "k_center"
    """The rule that chooses questions: "k_center" covers the embedded pool, "random" draws from it, "uncertainty" asks
    where heads on the vectors disagree, "entropy" where the evaluator of the round before is least sure of the score;
    jobs/README.md lists all."""
    batches: int = Field(default=1, gt=0)
    """Parts of a round's budget. Between them heads on the vectors are fitted to the answers so far, and strategies
    that read the heads choose by them."""
    first_batch: Annotated[str, name_in(STRATEGIES)] | None = None
    """Strategy of the first batch, where there are no answers yet; needed where `strategy` reads the heads, which it
    chooses for until there are 8 answers. With "entropy" it chooses the whole first round, which has no evaluator
    yet."""
    num_heads: int = Field(default=NUM_HEADS, ge=2)
    """Heads of the ensemble whose spread says what the answers leave open."""
    sure_at: float = Field(default=0.9, gt=0.5, lt=1)
    """labels = "routed": how often heads must be right on held-out prompts, from a margin on, for a pair with at least
    this margin not to be asked about."""
    stop_at: float | None = Field(default=None, gt=0, lt=1)
    """Share of what is reachable above chance, such as 0.95, after which no more labels are bought: between batches,
    once the label meter is 90% sure of it. None spends the whole budget."""
    unit: Unit = "response"
    """"prompt" asks about all k responses of a chosen prompt (budget // k prompts)."""
    text: Literal["prompt", "prompt_response", "judge_prompt"] = "prompt_response"
    """The embedded text: prompt_response is coresetIFT, judge_prompt is coresetEFT."""
    embedder: Place = "policy"
    """"policy", or a sentence-embedding model's folder or hub id."""
    pooling: Literal["mean", "last"] = "mean"
    """Vector of a text: the mean of its tokens' hidden states, or the last token's."""
    normalize: bool = True
    """L2-normalise the vectors (ours)."""
    seed_centers: bool = False
    """Count the seed data as labelled already: initial centres."""
    num_shards: Operation[int] = Field(default=1, gt=0)
    """Actors that hold the vectors."""
    candidate_batch: Operation[int] = Field(default=256, gt=0)
    """Farthest points that each shard offers per round; changes the speed, never the picks."""

    @field_validator("budget")
    @classmethod
    def _countable(cls, budget: int) -> int:
        if budget < 0:
            raise ValueError(
                f"must be the number of label queries that you pay for, at least 1 (0 only where no label is asked "
                f"for), got {budget}; set it to that number"
            )
        return budget

    @model_validator(mode="after")
    def _batches_fit_strategy(self) -> "SelectConfig":
        strategy = STRATEGIES[self.strategy]
        first = None if self.first_batch is None else STRATEGIES[self.first_batch]
        if strategy.reads_heads and (self.batches == 1 or first is None):
            like = '"random_pairs"' if strategy.asks == "pairs" else '"k_center" or "random"'
            raise ValueError(
                f'batches must be 2 or more, and first_batch set, for strategy = "{self.strategy}", which reads heads '
                f"that are fitted on answers, got {self.batches} and {self.first_batch}; set batches = 8 and "
                f"first_batch to {like}"
            )
        if strategy.reads_evaluator and first is None:
            raise ValueError(
                f'first_batch must be set for strategy = "{self.strategy}", which reads the evaluator of the round '
                'before: it chooses the first round; set it to "k_center" or "random"'
            )
        if strategy.reads_evaluator and self.unit == "prompt":
            raise ValueError(
                f'unit must be "response" for strategy = "{self.strategy}", which tells single responses apart, got '
                '"prompt"; leave it out'
            )
        if first is not None and self.batches == 1 and not strategy.reads_evaluator:
            raise ValueError(
                f'first_batch must be left out where there is one batch, got "{self.first_batch}"; set batches = 8, or '
                "leave it out"
            )
        if first is not None and (first.reads_heads or first.reads_evaluator):
            raise ValueError(
                f'first_batch must be a strategy that needs no answers, got "{self.first_batch}"; set it to "random" '
                'or "k_center"'
            )
        if first is not None and first.asks != strategy.asks:
            raise ValueError(
                f'first_batch must ask about {strategy.asks}, as strategy = "{self.strategy}" does, got '
                f'"{self.first_batch}", which asks about {first.asks}'
            )
        if self.batches > 1 and self.unit == "prompt" and strategy.asks == "responses":
            raise ValueError(
                f'unit must be "response" where batches is 2 or more, got "prompt" and {self.batches}: the heads are '
                "fitted on single responses; set batches = 1, or leave unit out"
            )
        return self

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies that choose, the first batch's included."""
        names = [self.strategy] if self.first_batch is None else [self.strategy, self.first_batch]
        return tuple(STRATEGIES[name] for name in names)

    @property
    def asks(self) -> Literal["responses", "pairs"]:
        """Kind of question that the strategy chooses."""
        return STRATEGIES[self.strategy].asks

    def vectors_json(self) -> str:
        """Return the settings that decide the vector of a response, as JSON."""
        return json.dumps([self.text, self.embedder, self.pooling, self.normalize])

    @property
    def reads_heads(self) -> bool:
        """Return whether the strategy reads heads that are fitted on answers."""
        return STRATEGIES[self.strategy].reads_heads

    @property
    def reads_evaluator(self) -> bool:
        """Return whether the strategy reads the evaluator of the round before."""
        return STRATEGIES[self.strategy].reads_evaluator

    @property
    def reads_vectors(self) -> bool:
        """Return whether the pool has to be embedded."""
        return any(strategy.reads_vectors for strategy in self.strategies)
