"""Rubric settings: the scale of scores, and the judge prompts of oracle and evaluator."""

import re

from pydantic import field_validator, model_validator

from rayrl.config.table import Place, Table


class RubricConfig(Table):
    """Questions to the oracle and the evaluator: a score on an additive scale, or a comparison of two responses."""

    template: Place | None = None
    """File with the judge prompt; `{prompt}` and `{response}` are filled in. `{prompt}`, which may be written as
    `{conversation}`, is all that the policy read: system prompt, earlier turns, tool calls and results, last message.
    None is the built-in additive rubric."""
    pairwise_template: Place | None = None
    """File with the prompt of a comparison; `{prompt}` (or `{conversation}`), `{first}` and `{second}` are filled in.
    None is the built-in comparison."""
    pattern: str | None = None
    """Regular expression with one group, the score, for a template that asks for an answer in a form of its own. Unset,
    a last line `Score: n` is asked for."""
    min_score: int = 0
    """Lowest score of the scale."""
    max_score: int = 5
    """Highest score of the scale."""

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            num_groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"rubric.pattern must be a regular expression, got {pattern!r}: {error}") from None
        if num_groups != 1:
            raise ValueError(
                f"rubric.pattern must have one group in parentheses, which is the score, got {num_groups} in "
                f"{pattern!r}; write other parentheses as (?: )"
            )
        return pattern

    @model_validator(mode="after")
    def _scale(self) -> "RubricConfig":
        if self.min_score >= self.max_score:
            raise ValueError(
                f"rubric.min_score must be below rubric.max_score, got {self.min_score} and {self.max_score}; "
                "lower the first or raise the second"
            )
        return self
