"""Oracles: who answers the paid questions, and their limits and prices."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayrl.config.table import Table


class OracleLimits(Table):
    """How hard the expert may be pressed."""

    max_concurrency: int = Field(default=16, gt=0)
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    timeout_s: float = Field(default=120.0, gt=0)
    max_retries: int = Field(default=4, ge=0)
    """Tries after the first, with exponential backoff; then the query abstains."""


class HttpOracleConfig(OracleLimits):
    """Any OpenAI-compatible chat endpoint."""

    type: Literal["http"] = "http"
    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable (or, with a leading "file:", the file) that holds the key; None sends no key."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, gt=0)
    usd_per_1m_input: float | None = Field(default=None, ge=0)
    usd_per_1m_output: float | None = Field(default=None, ge=0)
    budget_usd: float | None = Field(default=None, gt=0)
    """Hard limit over labels and evaluation; needs both prices."""

    @model_validator(mode="after")
    def _prices(self) -> "HttpOracleConfig":
        if (self.usd_per_1m_input is None) != (self.usd_per_1m_output is None):
            raise ValueError("usd_per_1m_input and usd_per_1m_output go together: set both or neither")
        if self.budget_usd is not None and self.usd_per_1m_input is None:
            raise ValueError("budget_usd needs usd_per_1m_input and usd_per_1m_output")
        return self


class ScriptedOracleConfig(OracleLimits):
    """Python functions: one judges a response, the other (if there is one) compares two. None abstains."""

    type: Literal["scripted"] = "scripted"
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """"module:function", importable from the working directory: `judge(prompt, response) -> score` or
    `(score, rationale)`."""
    compare_function: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """"module:function": `compare(prompt, first, second) -> "first"`, `"second"` or `"tie"`, or with a rationale
    as `function`. None compares nothing: two scores are two calls, and a comparison pays for one."""


class ReplayOracleConfig(OracleLimits):
    """Tables of judgements and of comparisons made earlier; what they do not hold abstains."""

    type: Literal["replay"] = "replay"
    path: str | None = None
    """Judgements: a prompt, a response and its score per row."""
    comparisons_path: str | None = None
    """Comparisons: a prompt, two responses and "first", "second" or "tie" per row."""
    prompt_column: str = "prompt"
    response_column: str = "response"
    score_column: str = "score"
    first_column: str = "first"
    second_column: str = "second"
    preference_column: str = "preference"
    rationale_column: str | None = None
    """In either table."""

    @model_validator(mode="after")
    def _some_table(self) -> "ReplayOracleConfig":
        if self.path is None and self.comparisons_path is None:
            raise ValueError("path or comparisons_path is missing: name a table of judgements, of comparisons, or both")
        return self

    @property
    def judgement_columns(self) -> list[str]:
        """What the table of judgements must have; the rationale's column, if there is one, is the last."""
        return [self.prompt_column, self.response_column, self.score_column, *self._rationale]

    @property
    def comparison_columns(self) -> list[str]:
        """The same of the table of comparisons."""
        return [self.prompt_column, self.first_column, self.second_column, self.preference_column, *self._rationale]

    @property
    def _rationale(self) -> list[str]:
        return [] if self.rationale_column is None else [self.rationale_column]


OracleConfig = Annotated[HttpOracleConfig | ScriptedOracleConfig | ReplayOracleConfig, Field(discriminator="type")]
