"""Rubric settings: the scale of scores, and the judge prompts of oracle and evaluator."""

from pydantic import model_validator

from rayrl.config.table import Table


class RubricConfig(Table):
    """Questions to the oracle and the evaluator: a score on an additive scale, or a comparison of two responses."""

    template: str | None = None
    """File with the judge prompt; `{prompt}` and `{response}` are filled in. `{prompt}`, which may be written as
    `{conversation}`, is all that the policy read: system prompt, earlier turns, tool calls and results, last message.
    None is the built-in additive rubric."""
    pairwise_template: str | None = None
    """File with the prompt of a comparison; `{prompt}` (or `{conversation}`), `{first}` and `{second}` are filled in.
    None is the built-in comparison."""
    min_score: int = 0
    max_score: int = 5

    @model_validator(mode="after")
    def _scale(self) -> "RubricConfig":
        if self.min_score >= self.max_score:
            raise ValueError(
                f"rubric.min_score must be below rubric.max_score, got {self.min_score} and {self.max_score}; "
                "lower the first or raise the second"
            )
        return self
