"""A desk in Label Studio: each question is a task of a project, and its annotations are people's answers."""

import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from xml.etree.ElementTree import Element, SubElement, tostring

import httpx

from rayrl.config import LabelStudioOracleConfig
from rayrl.errors import ConfigError, DataError, JudgeFailed, RayRLError
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.keys import read_key
from rayrl.oracles.people.criteria import criteria
from rayrl.oracles.people.desk import CANNOT_SAY, Annotation, Kind, kind_of, share_of
from rayrl.records import Comparison, Judgement

try:
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.core.api_error import ApiError
except ImportError as error:
    raise ConfigError(
        f'oracle.type = "label_studio" needs a package that is not installed ({error}); pip install "rayrl[people]"'
    ) from None

TEXTS: dict[Kind, tuple[str, ...]] = {
    "judgements": ("prompt", "response"),
    "comparisons": ("prompt", "first", "second"),
}
"""Fields of a task that people read."""
ANSWER, REASONS = "answer", "reasons"
"""Names of the two controls."""
UNSAID = "cannot_say"
"""Name of the control for "cannot say" beside a number."""
TASKS_PER_CALL = 200
MAX_CHOICES = 12
"""Scores that are shown as buttons; of more, a number is typed."""
_TITLES = {"prompt": "Prompt", "response": "Response", "first": "First response", "second": "Second response"}


class LabelStudioDesk:
    """Projects in Label Studio, one for each kind of question."""

    def __init__(self, config: LabelStudioOracleConfig, rubric: Rubric, setting: str = "oracle") -> None:
        self._config = config
        self._rubric = rubric
        self._setting = setting
        self._key = read_key(config.api_key_env, f"{setting}.api_key_env")
        self._people: dict[int, str] = {}
        self.name = self.comparer = config.in_key

    def check(self) -> None:
        with self._connected(ConfigError) as client:
            if not client.users.whoami().email:
                raise TypeError("it names no user")
        for kind in TEXTS:
            self.collect(kind)

    def post(self, questions: Sequence[Judgement | Comparison]) -> None:
        if not questions:
            return
        kind = kind_of(questions[0])
        with self._connected() as client:
            project = self._project(client, kind) or self._new_project(client, kind)
            if (project.maximum_annotations or 1) < self._config.num_people:
                client.projects.update(project.id, maximum_annotations=self._config.num_people)
            known = {task.data.get("key") for task in self._tasks(client, project.id)}
            new = [question for question in questions if question.key not in known]
            tasks: list[Any] = [
                {"key": each.key, **{name: getattr(each, name) for name in TEXTS[kind]}} for each in new
            ]
            for start in range(0, len(tasks), TASKS_PER_CALL):
                client.projects.import_tasks(project.id, request=tasks[start : start + TASKS_PER_CALL])

    def collect(self, kind: Kind) -> dict[str, list[Annotation]]:
        with self._connected() as client:
            project = self._project(client, kind)
            if project is None:
                return {}
            found: dict[str, list[Annotation]] = {}
            for task in self._tasks(client, project.id):
                if not task.data.get("key"):
                    continue
                # The last word of each person counts; those who came first stay first.
                by_person: dict[int, Annotation] = {}
                annotations: list[dict[str, Any]] = task.annotations or []
                for annotation in sorted(annotations, key=lambda each: (str(each.get("updated_at")), each["id"])):
                    if annotation.get("was_cancelled") or not annotation.get("result"):
                        continue
                    person = _number_of(annotation.get("completed_by"))
                    by_person[person] = self._read(client, kind, annotation, person, f"{project.id}, task {task.id}")
                found.setdefault(str(task.data["key"]), []).extend(by_person.values())
            return found

    def place(self, kind: Kind) -> str:
        with self._connected() as client:
            project = self._project(client, kind)
        return f"{self._config.url}/projects/{'' if project is None else f'{project.id}/data'}"

    def _title(self, kind: Kind) -> str:
        return self._config.project + (" comparisons" if kind == "comparisons" else "")

    def _project(self, client: Any, kind: Kind) -> Any:
        """Find the project by its title; None if there is none.

        Raises:
            ConfigError: several have it, or it has no control that answers.
        """
        title = self._title(kind)
        found = [each for each in client.projects.list(title=title) if each.title == title]
        if not found:
            return None
        if len(found) > 1:
            raise ConfigError(
                f"{self._setting}.project must be the title of one project at {self._config.url}, and {len(found)} are "
                f"called {title!r}; rename all but one of them, or choose another title"
            )
        (project,) = found
        if not re.search(rf"""name\s*=\s*["']{ANSWER}["']""", project.label_config or ""):
            raise ConfigError(
                f"{self._setting}.project {title!r} at {self._config.url} must have a control with the name {ANSWER}, "
                "and its labelling interface has none; choose another title, and a project with it is made"
            )
        return project

    def _new_project(self, client: Any, kind: Kind) -> Any:
        return client.projects.create(
            title=self._title(kind),
            label_config=interface(self._rubric, kind),
            maximum_annotations=self._config.num_people,
            show_skip_button=False,  # who cannot say, says so
            show_instruction=False,
        )

    def _tasks(self, client: Any, project: int) -> Iterator[Any]:
        return iter(client.tasks.list(project=project, fields="all", page_size=TASKS_PER_CALL))

    def _read(self, client: Any, kind: Kind, annotation: Mapping[str, Any], person: int, where: str) -> Annotation:
        """Read one person's annotation.

        Raises:
            DataError: it holds no answer.
        """
        score = read_answer(annotation.get("result") or [], kind, self._rubric)
        if isinstance(score, str):
            raise DataError(f"{self._config.url}, project {where}: {score}; correct it there. Nothing was taken over")
        return Annotation(
            annotator=self._name_of(client, person),
            score=None if math.isnan(score) else score,
            rationale=read_reasons(annotation.get("result") or []),
            seconds=annotation.get("lead_time"),
        )

    def _name_of(self, client: Any, person: int) -> str:
        if person not in self._people:
            try:
                user = client.users.get(person)
                self._people[person] = user.email or user.username or f"user {person}"
            except ApiError:  # the token's user may not look others up
                self._people[person] = f"user {person}"
        return self._people[person]

    @contextmanager
    def _connected(self, kind: type[ConfigError] | type[JudgeFailed] = JudgeFailed) -> Generator[Any]:
        """Connect to the server, and tell what goes wrong there in one line: its headers hold cookies."""
        where = f"{self._setting}.url: Label Studio at {self._config.url}"
        try:
            with httpx.Client(timeout=self._config.timeout_s, follow_redirects=True) as connection:
                yield LabelStudio(base_url=self._config.url, api_key=self._key, httpx_client=connection)
        except ApiError as error:
            detail = cast("dict[str, Any]", error.body).get("detail") if isinstance(error.body, dict) else None
            remedy = "try again later"
            if error.status_code in (401, 403):
                remedy = f"put a valid access token into {self._config.api_key_env} (Account & Settings there)"
            raise kind(f"{where} answers {error.status_code} ({detail or 'no reason'}); {remedy}") from None
        except httpx.HTTPError as error:
            raise kind(
                f"{where} cannot be reached ({error}); start it, or correct the address, and run the same command "
                "again: what people answered stays there"
            ) from None
        except RayRLError:
            raise
        except Exception as error:  # an answer of another shape than the SDK knows
            raise kind(
                f"{self._setting}.url must be the address of a Label Studio server, got {self._config.url}, whose "
                f"answer cannot be read ({type(error).__name__}: {error}); correct it, or install Label Studio 1.23"
            ) from None


def interface(rubric: Rubric, kind: Kind) -> str:
    """Write the labelling interface of a project: the criteria, the texts, the answer and its reasons."""
    view = Element("View")
    _add(view, "Header", value="How to answer", size="4")
    for line in filter(None, criteria(rubric, kind).split("\n")):
        _add(view, "Header", value=line, size="6")
    prompt, *responses = TEXTS[kind]
    _add_text(view, prompt)
    beside = _add(view, "View", style="display: flex; gap: 1em")
    for name in responses:
        _add_text(_add(beside, "View", style="flex: 1"), name)
    about = responses[0]
    values = ["first", "second", "tie"]
    if kind == "judgements":
        values = [str(score) for score in range(rubric.min_score, rubric.max_score + 1)]
    _add(view, "Header", value="Which response is better?" if kind == "comparisons" else "Score", size="5")
    name, choices, required = ANSWER, [*values, CANNOT_SAY], "true"
    if len(values) > MAX_CHOICES:
        _add(view, "Number", name=ANSWER, toName=about, min=values[0], max=values[-1])
        name, choices, required = UNSAID, [CANNOT_SAY], "false"
    buttons = _add(view, "Choices", name=name, toName=about, choice="single", required=required, showInLine="true")
    for choice in choices:
        _add(buttons, "Choice", value=choice)
    _add(view, "TextArea", name=REASONS, toName=about, rows="3", editable="true", placeholder="Reasons, if you like")
    return tostring(view, encoding="unicode")


def _add(parent: Element, tag: str, **attributes: str) -> Element:
    return SubElement(parent, tag, attributes)


def _add_text(parent: Element, name: str) -> None:
    _add(parent, "Header", value=_TITLES[name], size="5")
    _add(parent, "Text", name=name, value=f"${name}")


def _number_of(person: Any) -> int:
    """Return the number of a user, whom the server gives as such or whole."""
    return int(cast("dict[str, int]", person)["id"] if isinstance(person, dict) else person or 0)


def read_answer(result: Sequence[Mapping[str, Any]], kind: Kind, rubric: Rubric) -> float | str:
    """Read the score of an annotation; NaN where a person cannot say, and a text where it holds no answer."""
    given: list[str] = []
    for part in result:
        value: dict[str, Any] = part.get("value") or {}
        if part.get("from_name") in (ANSWER, UNSAID):
            given += [str(each) for each in value.get("choices") or ()]
            if value.get("number") is not None:
                given.append(str(value["number"]))
    if CANNOT_SAY in given:
        return math.nan
    if len(given) != 1:
        return f"it must have one answer, and has {len(given)}"
    if kind == "comparisons":
        share = share_of(given[0])
        return f"its answer must be first, second or tie, got {given[0]!r}" if share is None else share
    try:
        score = float(given[0])
    except ValueError:
        return f"its answer must be a number, got {given[0]!r}"
    if not rubric.accepts(score):
        return f"its answer must be from {rubric.min_score} to {rubric.max_score}, got {given[0]}"
    return score


def read_reasons(result: Sequence[Mapping[str, Any]]) -> str:
    """Read the reasons of an annotation; "" without any."""
    texts: list[str] = []
    for part in result:
        if part.get("from_name") == REASONS:
            value: dict[str, list[object]] = part.get("value") or {}
            texts += map(str, value.get("text") or [])
    return "\n".join(texts).strip()
