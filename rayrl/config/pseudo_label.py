"""Settings of pseudo-labelling: from scored responses to preference pairs."""

from typing import Annotated, Literal

from pydantic import Field

from rayrl.algorithms.pairing import PAIRINGS
from rayrl.config.table import Operation, Table, name_in


class PseudoLabelConfig(Table):
    """From scored responses to preference pairs."""

    pairing: Annotated[str, name_in(PAIRINGS)] = "best_worst"
    """"best_worst" makes one pair per prompt, "margin" all pairs of responses whose scores differ enough."""
    min_margin: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by this or less are ties and are dropped."""
    mode: Operation[Literal["auto", "overlap", "alternate"]] = "auto"
    """Score while DPO's first epoch trains, or before it. "auto" takes overlap when both fit the cluster at once."""
    synthetic: bool = False
    """Add the pairs of synthetic preference generation (`refresh.spg`) on the same responses and scores. It needs every
    score before the first step."""
