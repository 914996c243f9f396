"""Selection of the responses that the oracle is asked about."""

from typing import Literal

from pydantic import Field

from rayrl.config.table import Table

Unit = Literal["response", "prompt"]


class SelectConfig(Table):
    """Which responses the expert is asked about."""

    budget: int = Field(default=0, ge=0)
    """Paid queries. The paper's headline is 1,700."""
    strategy: Literal["k_center", "random"] = "k_center"
    unit: Unit = "response"
    """"prompt" asks about all k responses of a chosen prompt (budget // k prompts)."""
    text: Literal["prompt", "prompt_response", "judge_prompt"] = "prompt_response"
    """What is embedded: prompt_response is coresetIFT, judge_prompt is coresetEFT."""
    embedder: str = "policy"
    """"policy", or a sentence-embedding model's folder or hub id."""
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    """L2-normalise the vectors (ours)."""
    seed_centers: bool = False
    """Count the seed data as labelled already: initial centres."""
    num_shards: int = Field(default=1, gt=0)
    """Actors that own the vectors."""
    candidate_batch: int = Field(default=256, gt=0)
    """Farthest points offered per round; changes the speed, never the picks."""
