"""People's answers in the report: each person's share, their agreement, and that of judges with them."""

import contextlib
import math
import sqlite3
import statistics
from collections import defaultdict
from dataclasses import dataclass

from rayrl.algorithms.raters import cohen_kappa, interval, krippendorff_alpha, nominal
from rayrl.config import RunConfig
from rayrl.report.ledger_counts import reading
from rayrl.runs.run import identity

_ANNOTATIONS = """
SELECT annotations.key, annotator, annotations.score, seconds, attempts.first IS NOT NULL AS is_comparison
FROM annotations JOIN attempts ON attempts.key = annotations.key AND attempts.state IN ('scored', 'abstained')
WHERE attempts.run = :run ORDER BY attempts.attempt, annotator
"""
# The same texts, answered by people and by somebody else.
_BESIDE_JUDGES = """
SELECT people.score AS people_score, judge.score AS judge_score, people.preference AS people_preference,
    judge.preference AS judge_preference
FROM attempts AS people JOIN attempts AS judge
    ON judge.prompt = people.prompt AND judge.response IS people.response AND judge.first IS people.first
    AND judge.second IS people.second AND judge.oracle != people.oracle
WHERE people.run = :run AND judge.run = :run AND people.state = 'scored' AND judge.state = 'scored'
    AND people.key IN (SELECT key FROM annotations) AND judge.key NOT IN (SELECT key FROM annotations)
"""


@dataclass(frozen=True, kw_only=True)
class PersonFacts:
    """One person's share."""

    name: str
    num_answers: int
    num_cannot_say: int
    median_s: float | None
    """Of the time for a question; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class PeopleFacts:
    """What people answered in a run."""

    people: list[PersonFacts]
    num_questions: int
    """Questions that at least one person answered."""
    num_shared: int
    """Of those: questions that two or more gave an answer to."""
    alpha_scores: float | None
    """Krippendorff's alpha of scores, by their squared difference; None where nothing is to compare."""
    alpha_preferences: float | None
    """Krippendorff's alpha of preferences, as words."""
    num_beside_judges: int
    """Questions that judges have answered too."""
    mean_difference: float | None
    """Judges' score less people's, where both gave one."""
    mean_distance: float | None
    """Of the same scores, without their sign."""
    kappa: float | None
    """Cohen's kappa of the preferences of judges and people."""


def people_facts(url: str, config: RunConfig) -> PeopleFacts | None:
    """Read what people answered in the run of a folder; None if nobody did, or the ledger cannot be read."""
    with reading(url, config) as ledger:
        if ledger is None:
            return None
        with contextlib.suppress(sqlite3.OperationalError):  # a ledger from before people could be asked
            annotations = ledger.execute(_ANNOTATIONS, {"run": identity(url)}).fetchall()
            beside = ledger.execute(_BESIDE_JUDGES, {"run": identity(url)}).fetchall()
            return _facts(annotations, beside) if annotations else None
    return None


def _facts(annotations: list[sqlite3.Row], beside: list[sqlite3.Row]) -> PeopleFacts:
    by_person: dict[str, list[sqlite3.Row]] = defaultdict(list)
    scores: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    for row in annotations:
        by_person[row["annotator"]].append(row)
        if row["score"] is not None:
            (shares if row["is_comparison"] else scores)[row["key"]].append(row["score"])
    scored = [(row["judge_score"], row["people_score"]) for row in beside if row["people_score"] is not None]
    words = [(row["judge_preference"], row["people_preference"]) for row in beside if row["people_preference"]]
    return PeopleFacts(
        people=[_person(name, rows) for name, rows in by_person.items()],
        num_questions=len({row["key"] for row in annotations}),
        num_shared=sum(len(answers) > 1 for answers in (*scores.values(), *shares.values())),
        alpha_scores=_known(krippendorff_alpha(list(scores.values()), interval)),
        alpha_preferences=_known(krippendorff_alpha(list(shares.values()), nominal)),
        num_beside_judges=len(beside),
        mean_difference=statistics.fmean(judge - people for judge, people in scored) if scored else None,
        mean_distance=statistics.fmean(abs(judge - people) for judge, people in scored) if scored else None,
        kappa=_known(cohen_kappa(*map(list, zip(*words, strict=True)))) if words else None,
    )


def _person(name: str, rows: list[sqlite3.Row]) -> PersonFacts:
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    return PersonFacts(
        name=name,
        num_answers=len(rows),
        num_cannot_say=sum(row["score"] is None for row in rows),
        median_s=statistics.median(seconds) if seconds else None,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
