"""Settings of the selection of responses that the oracle is asked about."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from rayrl.algorithms.selection import STRATEGIES
from rayrl.config.table import Growing, Operation, Place, Table, name_in

Unit = Literal["response", "prompt"]


class SelectConfig(Table):
    """Selection of the responses that the oracle is asked about."""

    budget: Growing[int] = 0
    """Paid queries of all rounds together. The paper's headline is 1,700."""
    strategy: Annotated[str, name_in(STRATEGIES)] = "k_center"
    """"k_center" covers the embedded pool, "random" draws from it."""
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
