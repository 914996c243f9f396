"""Oracle settings: limits, prices, and where each type finds its answers.

An oracle type is one class here, which answers for itself what the rest of the package needs to know about it, and one
implementation in `rayrl.oracles`. A new type derives from `OracleBase`, names its implementation, and joins the union
`OracleConfig`; no other module distinguishes types.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, JsonValue, field_validator, model_validator

from rayrl.config.data import Encoding
from rayrl.config.function_name import FunctionName
from rayrl.config.http_endpoint import NOT_SHOWN, HttpEndpoint, looks_like_secret, require_plain_body
from rayrl.config.rubric import RubricConfig
from rayrl.config.table import Operation, Place, Table, plain_name


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of an oracle that is paid by the token."""

    usd_per_1m_input: float
    """Price of a million tokens of questions; None is unknown."""
    usd_per_1m_output: float
    """Price of a million tokens of answers, thoughts included; None is unknown."""
    max_tokens: int
    """Longest answer, in tokens."""
    budget_usd: float | None
    """Hard limit over labels, evaluation and test questions; None is no limit."""
    num_samples: int = 1
    """Calls that one query makes."""

    def cost_usd(self, num_input: float, num_output: float) -> float:
        """Price a call of so many tokens."""
        return (num_input * self.usd_per_1m_input + num_output * self.usd_per_1m_output) / 1e6

    def bound_usd(self, num_input: float) -> float:
        """Bound the price of a query from above: all its samples, each with the longest answer."""
        return self.num_samples * self.cost_usd(num_input, self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class OracleTable:
    """A table of the user's that an oracle answers from."""

    setting: str
    """The setting that names it, for messages."""
    path: str
    encoding: str
    holds: Literal["judgements", "comparisons"]
    columns: list[str]
    """Columns it must have: the prompt's, then that of the response and its score, or those of the two responses and
    the preference; the last one may be the rationale's."""


class OracleBase(Table):
    """Base of every oracle type: its limits, and what a type answers about itself, as a free, local oracle would."""

    implementation: ClassVar[str]
    """"module:class" of the `rayrl.oracles.protocol.Oracle` that is built from this config and a `Rubric`. It is named
    and not imported, since a config must load in a moment."""

    is_tried_out: ClassVar[bool] = True
    """Whether a test question is asked before the first stage; not of a table, which holds no such question."""

    max_concurrency: Operation[int] = Field(default=16, gt=0)
    """Questions asked at once."""
    requests_per_minute: Operation[int | None] = Field(default=None, gt=0)
    """Calls in a minute, evenly spaced; None is no limit."""
    tokens_per_minute: Operation[int | None] = Field(default=None, gt=0)
    """Tokens of questions and answers in a minute; None is no limit."""
    timeout_s: Operation[float] = Field(default=120.0, gt=0)
    """Longest time of one call."""
    max_retries: Operation[int] = Field(default=4, ge=0)
    """Tries after the first, with exponential backoff; then the query abstains."""
    max_unreadable: Operation[int] = Field(default=8, gt=0)
    """Answers in a row that nobody can read, or calls in a row that got none, after which the oracle counts as failed
    and nothing more is asked. Those are asked again."""
    ledger: Operation[Place | None] = None
    """File with the account of paid questions, for several runs one after another: what one of them paid is free to
    all. None is ledger.sqlite in the run's folder."""

    @field_validator("ledger")
    @classmethod
    def _lockable(cls, ledger: str | None) -> str | None:
        if ledger is not None and "://" in ledger and not ledger.startswith("file://"):
            raise ValueError(
                f"ledger must be a file on a filesystem with locks, got {ledger}: two runs could write an object at "
                "once; name a path that all runs see, or leave it out"
            )
        return ledger

    def label(self) -> str:
        """Name the oracle for humans."""
        return self.implementation

    def shown(self) -> dict[str, str | None]:
        """Settings that a report shows, by title; None where one is not set."""
        return {}

    def missing_to_judge(self) -> str:
        """Say which setting is missing to judge single responses, and the remedy; "" if none is."""
        return ""

    def missing_to_compare(self, rubric: RubricConfig) -> str:
        """Say which setting is missing to compare two responses, and the remedy; "" if none is."""
        return ""

    def conflict_with(self, rubric: RubricConfig) -> str:
        """Say which setting of its own contradicts one of the rubric's, and the remedy; "" if none does."""
        return ""

    def is_free(self) -> bool:
        """Return whether it may be asked without a ledger and a budget; not where somebody is paid by the question."""
        return True

    def flips_comparisons(self) -> bool:
        """Return whether it turns some comparisons around on purpose: labels for an experiment, and no measure."""
        return False

    def can_compare(self, rubric: RubricConfig) -> bool:
        """Return whether it compares two responses; if not, comparisons abstain."""
        return not self.missing_to_compare(rubric)

    def functions(self) -> dict[str, str]:
        """List the functions that must be importable: "module:function" by setting."""
        return {}

    def tables(self) -> list[OracleTable]:
        """List the tables that must be there."""
        return []

    def people_asked(self) -> "PeopleConfig | None":
        """Return the people who are asked, in their own time; None if nobody is."""
        return None

    def longest_call_s(self) -> float:
        """Return how long one call may take."""
        return self.timeout_s

    def secret_sources(self) -> dict[str, str]:
        """List where all secrets are, by setting, as `rayrl.oracles.keys.read_secret` takes them."""
        return {}

    def prices(self) -> Prices | None:
        """Prices of a call; None for an oracle that is free, or whose prices are not given."""
        return None


class FailoverEndpoint(HttpEndpoint):
    """Another address of the same judge, with a key and limits of its own."""

    requests_per_minute: Operation[int | None] = Field(default=None, gt=0)
    """Calls in a minute, evenly spaced; None is no limit."""
    tokens_per_minute: Operation[int | None] = Field(default=None, gt=0)
    """Tokens of questions and answers in a minute; None is no limit."""


class HttpOracleConfig(HttpEndpoint, OracleBase):
    """Any OpenAI-compatible chat endpoint."""

    implementation: ClassVar[str] = "rayrl.oracles.http:HttpOracle"

    type: Literal["http"] = "http"
    """Kind of oracle."""
    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    temperature: float | Literal["default"] = 0.0
    """At least 0; "default" leaves it out of the request, for servers that take no other than their own."""
    max_tokens: Operation[int] = Field(default=512, gt=0)
    """Longest answer in tokens, thoughts included."""
    answer: Literal["text", "json"] = "text"
    """Form of an answer: a last line that is read, or an object that the server keeps to a JSON schema."""
    num_samples: int = Field(default=1, gt=0)
    """Calls per question, whose readable scores are averaged (of comparisons, the majority counts). One query."""
    extra_body: dict[str, JsonValue] = Field(default_factory=dict)
    """More fields of a request, such as reasoning_effort. They may change answers, and so they are a part of what an
    answer is paid for."""
    failover: Operation[list[FailoverEndpoint]] = Field(default_factory=list)
    """Other addresses of the same judge, in order: where one fails, the next one is asked from then on."""
    usd_per_1m_input: Operation[float | None] = Field(default=None, ge=0)
    """Price of a million tokens of questions; None is unknown."""
    usd_per_1m_output: Operation[float | None] = Field(default=None, ge=0)
    """Price of a million tokens of answers, thoughts included; None is unknown."""
    budget_usd: Operation[float | None] = Field(default=None, gt=0)
    """Hard limit over labels, evaluation and test questions; needs both prices."""

    @field_validator("temperature", mode="before")
    @classmethod
    def _number_or_default(cls, value: object) -> object:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if not is_number and value != "default":
            shown = NOT_SHOWN if looks_like_secret(repr(value)) else repr(value)
            raise ValueError(
                f'temperature must be a number of at least 0, or "default" to leave it to the server, got {shown}'
            )
        return value

    @field_validator("extra_body")
    @classmethod
    def _plain_body(cls, body: dict[str, JsonValue]) -> dict[str, JsonValue]:
        require_plain_body(body)
        return body

    @model_validator(mode="after")
    def _complete_prices(self) -> "HttpOracleConfig":
        if (self.usd_per_1m_input is None) != (self.usd_per_1m_output is None):
            raise ValueError("usd_per_1m_input and usd_per_1m_output go together: set both or neither")
        if self.budget_usd is not None and self.usd_per_1m_input is None:
            raise ValueError("budget_usd needs usd_per_1m_input and usd_per_1m_output")
        if self.budget_usd is not None and self.usd_per_1m_input == self.usd_per_1m_output == 0:
            raise ValueError(
                "budget_usd limits nothing where usd_per_1m_input and usd_per_1m_output are 0: "
                "set the judge's prices, or leave out all three if it is free"
            )
        return self

    @model_validator(mode="after")
    def _samples_differ(self) -> "HttpOracleConfig":
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples = {self.num_samples} needs answers that differ: set temperature above 0, or "
                'to "default", or num_samples = 1'
            )
        if self.num_samples > 1 and "seed" in self.extra_body:
            raise ValueError(
                f"num_samples = {self.num_samples} asks the same question again, and extra_body.seed would have it "
                "answered the same way: leave the seed out, or set num_samples = 1"
            )
        return self

    def is_free(self) -> bool:
        return False

    def label(self) -> str:
        return f"{self.model} at {self.base_url}"

    def shown(self) -> dict[str, str | None]:
        return {"oracle model": self.model}

    def missing_to_compare(self, rubric: RubricConfig) -> str:
        if rubric.template is None or rubric.pairwise_template is not None:
            return ""
        return (
            'rubric.pairwise_template is missing: preferences.source = "oracle" compares two responses, and the '
            f"built-in comparison asks for something else than rubric.template {rubric.template}, by which the "
            "policies are evaluated; write the same criteria to a file with {prompt}, {first} and {second}"
        )

    def conflict_with(self, rubric: RubricConfig) -> str:
        if self.answer == "text" or rubric.pattern is None:
            return ""
        return (
            'rubric.pattern reads answers in a form of the template\'s own, and oracle.answer = "json" asks for '
            "another; leave one of them out"
        )

    def endpoints(self) -> "dict[str, HttpOracleConfig | FailoverEndpoint]":
        """List the addresses in the order of asking, by the prefix of their settings in messages."""
        endpoints: dict[str, HttpOracleConfig | FailoverEndpoint] = {"oracle.": self}
        for place, endpoint in enumerate(self.failover):
            endpoints[f"oracle.failover[{place}]."] = endpoint
        return endpoints

    def secret_sources(self) -> dict[str, str]:
        return dict(self._secret_sources())

    def _secret_sources(self) -> Iterator[tuple[str, str]]:
        for prefix, endpoint in self.endpoints().items():
            if (source := endpoint.key_source()) is not None:
                yield f"{prefix}api_key_env", source
            for name, value in endpoint.extra_headers.items():
                if value.startswith(("env:", "file:")):
                    yield f"{prefix}extra_headers.{name}", value

    def prices(self) -> Prices | None:
        if self.usd_per_1m_input is None or self.usd_per_1m_output is None:
            return None
        return Prices(
            usd_per_1m_input=self.usd_per_1m_input,
            usd_per_1m_output=self.usd_per_1m_output,
            max_tokens=self.max_tokens,
            budget_usd=self.budget_usd,
            num_samples=self.num_samples,
        )


class ScriptedOracleConfig(OracleBase):
    """Python functions: one judges a response, the other (if there is one) compares two. None abstains."""

    implementation: ClassVar[str] = "rayrl.oracles.scripted:ScriptedOracle"

    type: Literal["scripted"] = "scripted"
    """Kind of oracle."""
    function: FunctionName
    """"module:function", importable from the working directory: `judge(prompt, response) -> score` or
    `(score, rationale)`."""
    compare_function: FunctionName | None = None
    """"module:function": `compare(prompt, first, second) -> "first"`, `"second"` or `"tie"`, or with a rationale
    as `function`. None compares nothing: two scores are two calls, and a comparison pays for one."""
    flip_probability: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a comparison names the other response, as experts who disagree do (arXiv 2310.02743 has 0.25).
    Scores have no such noise: what measures is the function itself. A tie stays one, and a pair is flipped in both
    orders or in none."""
    flip_seed: int = 0
    """Draws, with the texts of a pair, whether its comparison is flipped."""

    @model_validator(mode="after")
    def _flips_something(self) -> "ScriptedOracleConfig":
        if self.flip_probability and self.compare_function is None:
            raise ValueError(
                f"flip_probability must be 0 without compare_function, whose answers it flips, got "
                f"{self.flip_probability:g}; name a compare_function, or leave it out"
            )
        return self

    def label(self) -> str:
        return self.function

    def shown(self) -> dict[str, str | None]:
        flipped = f"{self.flip_probability:.0%}" if self.flip_probability else None
        functions = {"oracle function": self.function, "comparing function": self.compare_function}
        return functions | {"comparisons flipped": flipped}

    def missing_to_compare(self, rubric: RubricConfig) -> str:
        if self.compare_function is not None:
            return ""
        return (
            'oracle.compare_function is missing: preferences.source = "oracle" asks which of two responses is '
            'better; name a "module:function" of (prompt, first, second) that returns "first", "second" or "tie"'
        )

    def flips_comparisons(self) -> bool:
        return self.flip_probability > 0

    def functions(self) -> dict[str, str]:
        functions = {"oracle.function": self.function}
        if self.compare_function is not None:
            functions["oracle.compare_function"] = self.compare_function
        return functions


class ReplayOracleConfig(OracleBase):
    """Tables of judgements and of comparisons made earlier; questions that they do not hold abstain."""

    implementation: ClassVar[str] = "rayrl.oracles.replay:ReplayOracle"
    is_tried_out: ClassVar[bool] = False

    type: Literal["replay"] = "replay"
    """Kind of oracle."""
    path: Place | None = None
    """Judgements: a prompt, a response and its score per row."""
    comparisons_path: Place | None = None
    """Comparisons: a prompt, two responses and "first", "second" or "tie" per row."""
    encoding: Encoding = "utf-8"
    """Encoding of either table, if it is text."""
    prompt_column: str = "prompt"
    """The text that a judge reads (see `rayrl.records.Prompt.text`), or, where a file has lists, a chat's messages."""
    response_column: str = "response"
    """Of the table of judgements."""
    score_column: str = "score"
    """Of the table of judgements."""
    first_column: str = "first"
    """Of the table of comparisons."""
    second_column: str = "second"
    """Of the table of comparisons."""
    preference_column: str = "preference"
    """Of the table of comparisons."""
    rationale_column: str | None = None
    """In either table."""

    @model_validator(mode="after")
    def _some_table(self) -> "ReplayOracleConfig":
        if self.path is None and self.comparisons_path is None:
            raise ValueError("path or comparisons_path is missing: name a table of judgements, of comparisons, or both")
        return self

    @property
    def judgement_columns(self) -> list[str]:
        """Columns that the table of judgements must have; the rationale's column, if there is one, is the last."""
        return [self.prompt_column, self.response_column, self.score_column, *self._rationale_columns]

    @property
    def comparison_columns(self) -> list[str]:
        """Columns that the table of comparisons must have, in the order of `judgement_columns`."""
        return [
            self.prompt_column,
            self.first_column,
            self.second_column,
            self.preference_column,
            *self._rationale_columns,
        ]

    @property
    def _rationale_columns(self) -> list[str]:
        return [] if self.rationale_column is None else [self.rationale_column]

    def label(self) -> str:
        return ", ".join(table.path for table in self.tables())

    def shown(self) -> dict[str, str | None]:
        return {"judgements": self.path, "comparisons": self.comparisons_path}

    def missing_to_judge(self) -> str:
        if self.path is not None:
            return ""
        return (
            "oracle.path is missing: single responses are judged here (to label them, or to evaluate), and a table "
            "of comparisons judges none; name a table of judgements, or set evaluate.budget = 0 if only that asks"
        )

    def missing_to_compare(self, rubric: RubricConfig) -> str:
        if self.comparisons_path is not None:
            return ""
        return (
            'oracle.comparisons_path is missing: preferences.source = "oracle" asks which of two responses is '
            "better; name a table with both responses and a preference"
        )

    def tables(self) -> list[OracleTable]:
        tables: list[OracleTable] = []
        if self.path is not None:
            tables.append(
                OracleTable(
                    setting="oracle.path",
                    path=self.path,
                    encoding=self.encoding,
                    holds="judgements",
                    columns=self.judgement_columns,
                )
            )
        if self.comparisons_path is not None:
            compared = self.comparisons_path
            tables.append(
                OracleTable(
                    setting="oracle.comparisons_path",
                    path=compared,
                    encoding=self.encoding,
                    holds="comparisons",
                    columns=self.comparison_columns,
                )
            )
        return tables


class PeopleConfig(OracleBase):
    """Base of the oracles that are people. They answer in hours or days: the run parks meanwhile, without an actor.

    A run parks once all questions of a stage are where people find them, and goes on by the same command.
    """

    is_tried_out: ClassVar[bool] = False

    num_people: int = Field(default=1, gt=0)
    """Answers that a question needs, each from another person."""
    combine: Literal["mean", "majority"] = "mean"
    """Score of a question with several answers: the mean, or the score that more than half give (without one, the
    median). Comparisons are decided by the majority in either case, and are a tie without one."""
    enough: Operation[float] = Field(default=1.0, gt=0, le=1)
    """Share of a stage's questions that must be answered, each by num_people, before the run goes on. What is answered
    by fewer then counts too; what nobody has answered abstains, and costs nothing."""
    deadline: Operation[datetime | None] = None
    """After it the run goes on with what has been answered, and stops where a stage has no answer at all. With a time
    zone, as in 2027-01-31T18:00:00+01:00."""
    poll_s: Operation[float] = Field(default=30.0, gt=0)
    """With --wait: time between two looks at what has been answered."""
    usd_per_answer: Operation[float | None] = Field(default=None, ge=0)
    """What one person gets for one answer; None if nobody is paid by the answer."""
    budget_usd: Operation[float | None] = Field(default=None, gt=0)
    """Hard limit over labels and evaluation; needs usd_per_answer."""

    @field_validator("deadline")
    @classmethod
    def _with_zone(cls, deadline: datetime | None) -> datetime | None:
        if deadline is not None and deadline.tzinfo is None:
            raise ValueError(
                f"deadline must name its time zone, got {deadline.isoformat()}; write {deadline.isoformat()}Z for UTC, "
                "or its offset, such as +01:00"
            )
        return deadline

    def people_asked(self) -> "PeopleConfig | None":
        return self

    @property
    def in_key(self) -> str:
        """Name of the people in the key of an answer: how many must answer, and how that is combined."""
        return "people" if self.num_people == 1 else f"{self.num_people} people by {self.combine}"

    @model_validator(mode="after")
    def _settings_of_people(self) -> "PeopleConfig":
        for name in ("max_concurrency", "requests_per_minute", "tokens_per_minute", "max_unreadable"):
            if (value := _changed(self, name)) is not None:
                raise ValueError(f"{name} = {value!r} has no effect on people; leave it out")
        if self.budget_usd is not None and not self.usd_per_answer:
            raise ValueError("budget_usd needs usd_per_answer; set what one answer costs, or leave out budget_usd")
        return self

    def prices(self) -> Prices | None:
        """Prices of a question: by the answer, of which it needs `num_people`."""
        if self.usd_per_answer is None:
            return None
        return Prices(
            usd_per_1m_input=0.0,
            usd_per_1m_output=1e6 * self.usd_per_answer,
            max_tokens=1,
            budget_usd=self.budget_usd,
            num_samples=self.num_people,
        )


class SheetOracleConfig(PeopleConfig):
    """People who answer in spreadsheets: the run writes one for each of them, and reads the same files again."""

    implementation: ClassVar[str] = "rayrl.oracles.people.sheet:SheetDesk"

    type: Literal["sheet"] = "sheet"
    """Kind of oracle."""
    path: Operation[Place]
    """Spreadsheet that ends in .xlsx or .csv. Comparisons lie beside it, under its name with "-comparisons"; with
    `people`, each has files of their own, under its name with theirs."""
    people: Operation[list[str]] = Field(default=[])
    """Names of those who answer, who share the questions; none is one nameless person. Answers of somebody who leaves
    stay as long as the name is here."""
    encoding: Operation[Encoding] = "utf-8"
    """Of .csv files, where the program in which people answer writes another one."""

    @field_validator("path")
    @classmethod
    def _spreadsheet(cls, path: str) -> str:
        if not path.lower().endswith((".xlsx", ".csv")):
            raise ValueError(f"path must end in .xlsx or .csv, got {path}; rename it")
        return path

    @field_validator("people")
    @classmethod
    def _named_once(cls, people: list[str]) -> list[str]:
        for name in people:
            plain_name(name, "anna")
        if len({name.lower() for name in people}) < len(people):
            raise ValueError(f"people must name each person once, in any case of letters, got {people}")
        return people

    @model_validator(mode="after")
    def _as_many_people(self) -> "SheetOracleConfig":
        if self.num_people > max(1, len(self.people)):
            raise ValueError(
                f"num_people = {self.num_people} needs as many names in people, got {len(self.people)}; add some, or "
                "lower num_people"
            )
        return self

    def label(self) -> str:
        who = ", ".join(self.people) or "one person"
        return f"{who} in {self.path}"

    def shown(self) -> dict[str, str | None]:
        return {"people": ", ".join(self.people) or None, "answers per question": str(self.num_people)}


class LabelStudioOracleConfig(PeopleConfig):
    """People who answer in Label Studio: each question is a task of a project there."""

    implementation: ClassVar[str] = "rayrl.oracles.people.label_studio:LabelStudioDesk"
    model_config = ConfigDict(hide_input_in_errors=True)

    type: Literal["label_studio"] = "label_studio"
    """Kind of oracle."""
    url: Operation[str]
    """Address of the server, such as http://localhost:8080."""
    api_key_env: Operation[str] = "LABEL_STUDIO_API_KEY"
    """Environment variable (or, with a leading "file:", the file) that holds the access token of a user there."""
    project: Operation[str] = Field(min_length=3, max_length=38)
    """Title of the project; it is made if there is none. Comparisons lie in another one, with " comparisons" behind."""

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        is_plain = "@" not in parts.netloc and not parts.query and not parts.fragment
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            raise ValueError("url must be an http or https address without user, key and query")
        return url.rstrip("/")

    def label(self) -> str:
        return f"people at {self.url}, project {self.project}"

    def shown(self) -> dict[str, str | None]:
        return {"project": self.project, "answers per question": str(self.num_people)}

    def secret_sources(self) -> dict[str, str]:
        return {"oracle.api_key_env": self.api_key_env}


People = Annotated[SheetOracleConfig | LabelStudioOracleConfig, Field(discriminator="type")]
"""An oracle that is people."""


Judge = Annotated[HttpOracleConfig | ScriptedOracleConfig | ReplayOracleConfig, Field(discriminator="type")]
"""An oracle that answers by itself."""


class PanelOracleConfig(OracleBase):
    """Several judges who are all asked about each item; what they say is combined, and how far they differ is kept.

    A question to the panel is one query, which pays every judge. The limits of each judge hold for itself;
    max_concurrency, max_unreadable and the ledger are the panel's; a judge's own max_concurrency sizes its threads or
    connections. With `people`, they are asked about what the judges are not sure of, and what they say counts.
    """

    implementation: ClassVar[str] = "rayrl.oracles.panel:PanelOracle"

    type: Literal["panel"] = "panel"
    """Kind of oracle."""
    judges: list[Judge] = Field(min_length=1)
    """Two or more; with `people`, one is enough."""
    combine: Literal["mean", "majority"] = "mean"
    """Score of an item: the mean, or the score that more than half of the judges give (without one, the median).
    Comparisons are decided by the majority in either case, and are a tie without one."""
    people: People | None = None
    """Asked about an item on which the judges (or the samples of the only one) differ by `people_above` or more, and
    about one on which they abstain. Where people give an answer, it takes the place of the judges'."""
    people_above: float = Field(default=0.5, gt=0)
    """Standard deviation of the judges' scores; of preferences, where the first response wins 1 and a tie is 0.5."""
    people_budget: Operation[int] = Field(default=0, ge=0)
    """Questions that people are asked at most, over the whole run. Where a stage has more, those of the largest
    deviation come first."""
    budget_usd: Operation[float | None] = Field(default=None, gt=0)
    """Hard limit over labels, evaluation and test questions; needs the prices of all judges, and of people."""

    @model_validator(mode="after")
    def _enough_judges(self) -> "PanelOracleConfig":
        if self.people is None:
            if len(self.judges) < 2:
                raise ValueError("judges must be two or more, got one; add another, or `people` beside it")
            if self.people_budget:
                raise ValueError(f"people_budget = {self.people_budget} has no effect without people; add them")
            return self
        if self.people_budget == 0:
            raise ValueError("people_budget must be at least 1 with people; set how many questions they are asked")
        only = self.judges[0]
        if len(self.judges) == 1 and not (isinstance(only, HttpOracleConfig) and only.num_samples > 1):
            raise ValueError(
                "judges must be two or more, or one with num_samples of 2 or more, where people are asked about what "
                "the judges differ on: a single answer differs from nothing; add a judge, or raise num_samples"
            )
        if self.people.budget_usd is not None:
            raise ValueError(
                "people.budget_usd must be left out; set people_budget, and budget_usd for judges and people together"
            )
        if self.people.ledger is not None:
            raise ValueError("people.ledger has no effect in a panel; set oracle.ledger, which is for all of them")
        if self.budget_usd is not None and self.people.prices() is None:
            raise ValueError("budget_usd needs the price of every answer; set people.usd_per_answer (0 if it is free)")
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> "PanelOracleConfig":
        for place, judge in enumerate(self.judges):
            prices = judge.prices()
            if prices is not None and prices.budget_usd is not None:
                raise ValueError(
                    f"judges[{place}].budget_usd must be left out, got {prices.budget_usd:g}: a question pays all "
                    "judges; set oracle.budget_usd, for all of them together"
                )
            if self.budget_usd is not None and prices is None:
                raise ValueError(
                    f"budget_usd needs the prices of every judge, and judges[{place}] ({judge.label()}) has none; set "
                    "its usd_per_1m_input and usd_per_1m_output, or leave out budget_usd"
                )
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> "PanelOracleConfig":
        for name in ("requests_per_minute", "tokens_per_minute", "timeout_s", "max_retries"):
            if (value := _changed(self, name)) is not None:
                raise ValueError(
                    f"{name} = {value!r} has no effect on a panel, whose judges have limits of their own: set "
                    f"judges[0].{name} and so on, or leave it out"
                )
        for place, judge in enumerate(self.judges):
            for name in ("ledger", "max_unreadable"):
                if (value := _changed(judge, name)) is not None:
                    raise ValueError(
                        f"judges[{place}].{name} = {value!r} has no effect on a judge of a panel: set oracle.{name}, "
                        "which is for all of them, and leave it out here"
                    )
        return self

    def label(self) -> str:
        judges = ", ".join(judge.label() for judge in self.judges)
        named = f"{self.combine} of {judges}" if len(self.judges) > 1 else judges
        return named if self.people is None else f"{named}; where they differ, {self.people.label()}"

    def shown(self) -> dict[str, str | None]:
        judges = {f"judge {place + 1}": judge.label() for place, judge in enumerate(self.judges)}
        people = {} if self.people is None else {"people where they differ": self.people.label()}
        return {**judges, "judges combined by": self.combine, **people}

    def people_asked(self) -> PeopleConfig | None:
        return self.people

    def missing_to_judge(self) -> str:
        return self._first_missing([judge.missing_to_judge() for judge in self.judges])

    def missing_to_compare(self, rubric: RubricConfig) -> str:
        return self._first_missing([judge.missing_to_compare(rubric) for judge in self.judges])

    def conflict_with(self, rubric: RubricConfig) -> str:
        return self._first_missing([judge.conflict_with(rubric) for judge in self.judges])

    def is_free(self) -> bool:
        return all(judge.is_free() for judge in self.judges)

    def flips_comparisons(self) -> bool:
        return any(judge.flips_comparisons() for judge in self.judges)

    def _first_missing(self, missing: list[str]) -> str:
        """Name the judge who lacks something. All of them are asked, so all must be able to answer."""
        named = [f"oracle.judges[{place}]: {what}" for place, what in enumerate(missing) if what]
        return named[0] if named else ""

    def longest_call_s(self) -> float:
        return max(judge.longest_call_s() for judge in self.judges)

    def functions(self) -> dict[str, str]:
        return self._of_judges([judge.functions() for judge in self.judges])

    def secret_sources(self) -> dict[str, str]:
        of_people = {} if self.people is None else self.people.secret_sources()
        named = {f"oracle.people.{name.removeprefix('oracle.')}": source for name, source in of_people.items()}
        return self._of_judges([judge.secret_sources() for judge in self.judges]) | named

    def _of_judges(self, settings: list[dict[str, str]]) -> dict[str, str]:
        """Name the settings of judges by their place: oracle.function is oracle.judges[0].function."""
        return {
            f"oracle.judges[{place}].{name.removeprefix('oracle.')}": value
            for place, named in enumerate(settings)
            for name, value in named.items()
        }

    def tables(self) -> list[OracleTable]:
        return [
            replace(table, setting=f"oracle.judges[{place}].{table.setting.removeprefix('oracle.')}")
            for place, judge in enumerate(self.judges)
            for table in judge.tables()
        ]

    def prices(self) -> Prices | None:
        """Prices of one judge that would cost as much as all of them; None if one has none."""
        each = [judge.prices() for judge in self.judges]
        known = [prices for prices in each if prices is not None]
        if len(known) < len(each):
            return None
        longest = max(prices.max_tokens for prices in known)
        answers = sum(p.num_samples * p.usd_per_1m_output * p.max_tokens for p in known)
        return Prices(
            usd_per_1m_input=sum(prices.num_samples * prices.usd_per_1m_input for prices in known),
            usd_per_1m_output=answers / longest,
            max_tokens=longest,
            budget_usd=self.budget_usd,
        )


def _changed(config: OracleBase, name: str) -> object:
    """Return a setting that differs from its default; None if it does not. No default is changed to None."""
    value: object = getattr(config, name)
    return None if value == type(config).model_fields[name].default else value


OracleConfig = Annotated[
    HttpOracleConfig
    | ScriptedOracleConfig
    | ReplayOracleConfig
    | SheetOracleConfig
    | LabelStudioOracleConfig
    | PanelOracleConfig,
    Field(discriminator="type"),
]
