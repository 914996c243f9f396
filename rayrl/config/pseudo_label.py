"""Pseudo-labels: from scored responses to preference pairs."""

from typing import Literal

from pydantic import Field

from rayrl.config.table import Table


class PseudoLabelConfig(Table):
    """From scored responses to preference pairs."""

    pairing: Literal["best_worst", "margin"] = "best_worst"
    min_margin: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by this or less are ties and are dropped."""
    mode: Literal["auto", "overlap", "alternate"] = "auto"
    """Score while DPO's first epoch trains, or before it. "auto" takes overlap when both fit the cluster at once."""
    synthetic: bool = Field(default=False, exclude_if=lambda synthetic: not synthetic)
    """Add the pairs of synthetic preference generation (`refresh.spg`) on the same responses and scores. It needs every
    score before the first step. Not dumped where it is off: stages of before it was there keep their keys."""
