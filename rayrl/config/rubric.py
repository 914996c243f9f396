"""The rubric: scale and judge prompts of oracle and evaluator."""

from pydantic import model_validator

from rayrl.config.table import Table


class RubricConfig(Table):
    """What the expert and the evaluator are asked: a pointwise, additive scale, and comparisons of two responses."""

    template: str | None = None
    """File with the judge prompt; `{prompt}` and `{response}` are filled in. None is the built-in additive rubric."""
    pairwise_template: str | None = None
    """File with what is asked of two responses; `{prompt}`, `{first}` and `{second}` are filled in. None is the
    built-in comparison."""
    min_score: int = 0
    max_score: int = 5

    @model_validator(mode="after")
    def _scale(self) -> "RubricConfig":
        if self.min_score >= self.max_score:
            raise ValueError("min_score must be below max_score")
        return self
