"""Win rates against a fixed table of reference answers, the metric of arXiv 2403.19279.

An oracle that compares decides which of two answers is better, a policy's or the reference. One that only scores has
both scored. Which of the two it was is a part of the result.
"""

from collections.abc import Mapping

import numpy as np
from ray.actor import ActorHandle

from rayrl.algorithms import statistics
from rayrl.algorithms.comparisons import TURNED, Order
from rayrl.algorithms.estimate import Estimate
from rayrl.data.blocks import BlockTable
from rayrl.data.reading import read_reference_answers
from rayrl.data.tokenizing import load_tokenizer, renderer_of
from rayrl.models.judge_prompt import load_rubric
from rayrl.models.pairwise_prompt import pairwise_version
from rayrl.oracles.protocol import PREFERENCE_SHARES
from rayrl.records import Comparison, content_id, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import ReferenceEvaluation, ReferencesEvaluation
from rayrl.runs.stage_table import EVALUATE
from rayrl.stages.evaluation.held_out import HeldOut
from rayrl.stages.labelling.ask import oracle_scores
from rayrl.stages.labelling.ask_pairs import ask_about, count_answers, in_drawn_order, pair_question

Wins = list[float | None]
"""Of a policy, by prompt: 1 for a win over the reference, 0.5 for a tie, 0; None where the oracle abstained."""
MIN_DECIDED = 2
"""Decided prompts below which there is no standard error."""


def comparison_wording(run: Run) -> list[str]:
    """Name the wording of comparisons with the references, for the key of an evaluation that has such; else nothing."""
    compares = run.config.competes_by in ("both", "random")
    return [pairwise_version(load_rubric(run.config.rubric))] if compares else []


def against_references(
    run: Run, oracle: ActorHandle, answers: Mapping[str, list[HeldOut]]
) -> ReferencesEvaluation | None:
    """Measure the win rate of every policy, under the evaluation budget; None without a table of references.

    Args:
        run: the run.
        oracle: compares, or scores the references.
        answers: by policy, all to the same prompts, scored by the oracle.
    """
    by = run.config.competes_by
    if by is None:
        return None
    references = read_references(run)
    answered = {
        name: [answer for answer in policy_answers if answer.prompt_id in references]
        for name, policy_answers in answers.items()
    }
    if by == "scores":
        policies = compare_scores(oracle, answered, references)
    else:
        policies = {
            name: compare_answers(run, oracle, name, policy_answers, references, by)
            for name, policy_answers in answered.items()
        }
    num_prompts = len(next(iter(answered.values())))
    return ReferencesEvaluation(by=by, num_prompts=num_prompts, policies=policies)


def read_references(run: Run) -> dict[str, str]:
    """Read the fixed table's answers, by prompt id."""
    table = run.config.evaluate.reference_answers
    assert table is not None, "without a table there is nothing to compete with"
    tokenizer = load_tokenizer(run.config.policy)
    rows = read_reference_answers(table, renderer_of(tokenizer, run.config.policy))
    return {prompt.id: answer for prompt, answer in rows}


def compare_answers(
    run: Run, oracle: ActorHandle, name: str, answers: list[HeldOut], references: Mapping[str, str], order: Order
) -> ReferenceEvaluation:
    """Have each answer compared with the reference. Equal texts are a tie and are not asked about.

    Every comparison is kept as a table beside the evaluation's.
    """
    different = [answer for answer in answers if answer.text != references[answer.prompt_id]]
    questions = [as_question(answer, references[answer.prompt_id], run.seed) for answer in different]
    comparisons, verdicts = ask_about(oracle, questions, order, EVALUATE, describe=f"comparing {name} with references")
    table = BlockTable(run.folder(EVALUATE, f"comparisons-{name}"), 1)
    table.write(0, to_table(comparisons, Comparison))
    num_same = len(answers) - len(different)
    # Equal texts tie without a question.
    wins: Wins = [0.5] * num_same
    for answer, question, verdict in zip(different, questions, verdicts, strict=True):
        if verdict is None:
            wins.append(None)
        else:
            # The verdict is about the question's order, the win is the policy's.
            is_first = question.first == answer.text
            wins.append(PREFERENCE_SHARES[verdict if is_first else TURNED[verdict]])
    counts = count_answers(comparisons, verdicts, order)
    return ReferenceEvaluation(
        win_rate=win_rate(wins), num_abstained=counts.num_abstained, num_same=num_same, counts=counts
    )


def as_question(answer: HeldOut, reference: str, seed: int) -> Comparison:
    """Put a policy's answer and the reference as a question, in a drawn order."""
    sides = [(content_id(answer.prompt_id, text), text) for text in (answer.text, reference)]
    return pair_question(answer.prompt_id, answer.prompt, in_drawn_order(seed, *sides))


def compare_scores(
    oracle: ActorHandle, answers: Mapping[str, list[HeldOut]], references: Mapping[str, str]
) -> dict[str, ReferenceEvaluation]:
    """Count how often an answer scores more than the reference; the references are scored once, for all policies."""
    # All policies answer the same prompts.
    some_policy = next(iter(answers.values()))
    texts = [(answer.prompt_id, answer.prompt, references[answer.prompt_id]) for answer in some_policy]
    reference_scores = oracle_scores(oracle, texts, EVALUATE, describe="scoring references")
    policies: dict[str, ReferenceEvaluation] = {}
    for name, policy_answers in answers.items():
        wins: Wins = []
        for answer, reference_score in zip(policy_answers, reference_scores, strict=True):
            if answer.score is None or reference_score is None:
                wins.append(None)
            else:
                wins.append((1 + float(np.sign(answer.score - reference_score))) / 2)
        policies[name] = ReferenceEvaluation(win_rate=win_rate(wins), num_abstained=wins.count(None))
    return policies


def win_rate(wins: Wins) -> Estimate | None:
    """Return the mean of what was decided, with its standard error; None with fewer than two."""
    decided = np.array([win for win in wins if win is not None])
    return statistics.win_rate(decided, 1 - decided) if len(decided) >= MIN_DECIDED else None
