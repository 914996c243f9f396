"""Win rates against a fixed table of reference answers, the metric of arXiv 2403.19279.

An expert that compares says which of two answers is better, a policy's or the reference. One that only scores answers
has both scored. Which of the two it was is a part of the result.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from ray.actor import ActorHandle

from rayrl.algorithms import statistics
from rayrl.algorithms.comparisons import TURNED, Order
from rayrl.data.blocks import BlockTable
from rayrl.data.reading import read_reference_answers
from rayrl.data.tokenizing import load_tokenizer, render
from rayrl.models.judge_prompt import load_rubric
from rayrl.models.pairwise_prompt import pairwise_version
from rayrl.oracles.pool import PairItem
from rayrl.oracles.protocol import PREFERENCE_SHARES
from rayrl.records import Comparison, content_id, to_table
from rayrl.runs.run import Run
from rayrl.stages.evaluation.held_out import Answer
from rayrl.stages.labelling.ask_pairs import ask_about, drawn, tally
from rayrl.stages.labelling.query import expert_scores

Wins = list[float | None]
"""Of a policy, by prompt: 1 for a win over the reference, 0.5 for a tie, 0; None where the expert abstained."""


def comparer_of(run: Run) -> list[str]:
    """The wording of comparisons with the references, for the key of an evaluation that has such."""
    compares = run.config.competes_by in ("both", "random")
    return [pairwise_version(load_rubric(run.config.rubric))] if compares else []


def against_references(run: Run, oracle: ActorHandle, answers: Mapping[str, list[Answer]]) -> dict[str, Any]:
    """Win rate of every policy, under the evaluation's budget, and what the expert did not decide.

    Args:
        run: the run.
        oracle: compares, or scores the references.
        answers: by policy, all to the same prompts, scored by the expert.

    Returns:
        "by": as `RunConfig.competes_by`; "num_prompts" with a reference; "policies": the rest, by policy. Nothing if
        there is no table of references.
    """
    by = run.config.competes_by
    if by is None:
        return {}
    references = read_references(run)
    told = {name: [a for a in of_policy if a.prompt_id in references] for name, of_policy in answers.items()}
    if by == "scores":
        policies = by_scores(oracle, told, references)
    else:
        policies = {name: by_verdicts(run, oracle, name, said, references, by) for name, said in told.items()}
    return {"by": by, "num_prompts": len(next(iter(told.values()))), "policies": policies}


def read_references(run: Run) -> dict[str, str]:
    """The fixed table's answer to each prompt it has, by prompt id."""
    table = run.config.evaluate.reference_answers
    assert table is not None, "without a table nothing competes"
    tokenizer = load_tokenizer(run.config.policy)
    rendered = read_reference_answers(table, partial(render, tokenizer, run.config.policy.prompt_format))
    return {prompt.id: answer for prompt, answer in rendered}


def by_verdicts(
    run: Run, oracle: ActorHandle, name: str, answers: list[Answer], references: Mapping[str, str], order: Order
) -> dict[str, Any]:
    """What the expert says of each answer beside the reference (kept as a table); the same text is a tie, not asked."""
    pairs = {a.prompt_id: pair(a, references[a.prompt_id], run.config.seed) for a in answers}
    asked = [a for a in answers if a.text != references[a.prompt_id]]
    said, verdicts = ask_about(
        oracle, [pairs[a.prompt_id] for a in asked], order, "evaluate", describe=f"comparing {name} with references"
    )
    BlockTable(run.folder("evaluate", f"comparisons-{name}"), 1).write(0, to_table(said, Comparison))
    wins: Wins = [0.5] * (len(answers) - len(asked))
    for answer, verdict in zip(asked, verdicts, strict=True):
        is_first = pairs[answer.prompt_id]["first"] == answer.text
        wins.append(None if verdict is None else PREFERENCE_SHARES[verdict if is_first else TURNED[verdict]])
    return {"win_rate": win_rate(wins)} | tally(said, verdicts, order) | {"num_same": len(answers) - len(asked)}


def pair(answer: Answer, reference: str, seed: int) -> PairItem:
    """A policy's answer and the reference in a drawn order."""
    sides = [(content_id(answer.prompt_id, text), text) for text in (answer.text, reference)]
    (first_id, first), (second_id, second) = sorted(sides, key=lambda side: drawn(seed, side[0]))
    return PairItem(
        prompt_id=answer.prompt_id,
        first_id=first_id,
        second_id=second_id,
        prompt=answer.prompt,
        first=first,
        second=second,
    )


def by_scores(
    oracle: ActorHandle, answers: Mapping[str, list[Answer]], references: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """How often an answer scores more than the reference; the references are scored once, for all policies."""
    told = next(iter(answers.values()))
    texts = [(a.prompt_id, a.prompt, references[a.prompt_id]) for a in told]
    fixed = expert_scores(oracle, texts, describe="scoring references")
    policies = {}
    for name, of_policy in answers.items():
        scores = [(a.score, score) for a, score in zip(of_policy, fixed, strict=True)]
        wins: Wins = [None if a is None or b is None else (1 + float(np.sign(a - b))) / 2 for a, b in scores]
        policies[name] = {"win_rate": win_rate(wins), "num_abstained": wins.count(None)}
    return policies


def win_rate(wins: Wins) -> dict[str, Any] | None:
    """The mean of what was decided, with its standard error; None of fewer than two."""
    decided = np.array([win for win in wins if win is not None])
    return asdict(statistics.win_rate(decided, 1 - decided)) if len(decided) > 1 else None
