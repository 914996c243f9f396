"""Settings of the preference pairs D that the reward model learns from."""

from typing import Literal

from pydantic import Field, model_validator

from rayrl.config.data import DataConfig
from rayrl.config.table import Table


class PreferenceDataConfig(DataConfig):
    """Pairs that are judged already: chosen and rejected answers, or several answers with their ranks."""

    chosen_column: str = "chosen"
    """A column of the better replies."""
    rejected_column: str = "rejected"
    """A column of the worse replies, or of lists of them."""
    replies_column: str | None = None
    """A list of replies with their ranks per row (rank 0 is best) or with scores, such as {"text", "rank"} or
    UltraFeedback's {"response", "overall_score"}; replaces the two columns by all ordered pairs."""


class PreferencesConfig(Table):
    """D: the source of the preference pairs."""

    source: Literal["data", "oracle"] = "data"
    """"oracle" asks about pairs of on-policy responses to a prompt, `select.budget` paid queries in all."""
    data: PreferenceDataConfig | None = None
    """data: the pairs."""
    order: Literal["both", "random"] = "both"
    """oracle: ask both orders (two queries a pair; a disagreement is a tie), or one drawn order, recorded."""
    pairs_per_prompt: int = Field(default=1, gt=0)
    """oracle: pairs of a prompt's responses, no response in two of them."""

    @model_validator(mode="after")
    def _data_is_named(self) -> "PreferencesConfig":
        if self.source == "data" and self.data is None:
            raise ValueError('preferences.data is missing: name a file of pairs, or set preferences.source = "oracle"')
        return self
