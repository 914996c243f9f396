"""What a reader must know before believing the numbers of a run of the second pipeline.

Thresholds are ours; they ask for a look, they do not judge.
"""

import math
from collections.abc import Iterator
from typing import Any

from rayrl.report.caveats import of_evaluator, of_gain, of_money, of_policy, of_references, of_responses, significant
from rayrl.report.rlp_summary import policy_row

MIN_JUDGED = 100
"""Prompts: the standard error of a win rate is about 0.05 there."""
MAX_LENGTH_CORRELATION = 0.5
"""Spearman's, of reward and length."""
REMEDY = "a larger ppo.kl_coef or a smaller ppo.learning_rate"


def rlp_caveats(facts: dict[str, Any]) -> list[str]:
    """All caveats of a run, the most serious first. `facts` as made by `summarize_run`."""
    metrics, rlp = facts["metrics"], facts["rlp"]
    trained = rlp["trained"]
    return [
        *_of_pairs(metrics["synthesize"]),
        *_of_policies(metrics, rlp),
        *of_gain({"difference": rlp["gain_over_ppo"]}, f" of {trained.get('rlp')} over {trained['ppo']}"),
        *of_references(metrics["evaluate"]),
        *_of_reward_models(rlp["reward_models"]),
        *of_evaluator(metrics),
        *_of_reward_accuracy(metrics["evaluate"].get("reward_accuracy", {}), rlp),
        *of_money(facts, rlp["asked"]),
        *of_responses(metrics["generate"]),
        *_of_evidence(metrics),
    ]


def _of_pairs(synthesized: dict[str, Any]) -> Iterator[str]:
    if synthesized.get("num_pairs") != 0:
        return
    beside = synthesized.get("embedding_acceptance_rate")
    other = f" Clusters of embeddings would accept {100 * beside:.0f}% of the prompts." if beside is not None else ""
    yield (
        "No synthetic pair was accepted: the refreshed reward model learnt from the old preferences alone, "
        f"so this run does not test the refresh.{other}"
    )


def _of_policies(metrics: dict[str, dict[str, Any]], rlp: dict[str, Any]) -> Iterator[str]:
    m1 = policy_row(metrics, "m1")
    for stage, of_round in zip(rlp["ppos"], rlp["trained"], strict=True):
        name = rlp["latest"][of_round]
        if name not in rlp["titles"]:
            continue
        row, title = policy_row(metrics, name), rlp["titles"][name]
        over_optimised = list(_of_reward(metrics[stage], row.get("difference"), title))
        yield from over_optimised or of_gain(row, f" of {title}")
        yield from of_policy(m1, row, title, REMEDY)


def _of_reward(trained: dict[str, Any], difference: dict[str, Any] | None, title: str) -> Iterator[str]:
    """The reward rose, the expert's score did not."""
    first, final = trained.get("first_reward"), trained.get("final_reward")
    if first is None or final is None or final <= first or not difference or difference.get("mean") is None:
        return
    if difference["mean"] <= 0 and difference.get("standard_error") is not None:
        yield (
            f"The reward of {title} rose from {first:.3g} to {final:.3g}, but the expert's score did not "
            f"({difference['mean']:+.3f} \u00b1 {difference['standard_error']:.3f} over M1): "
            f"the policy may exploit the reward (over-optimisation). Fewer rollouts or {REMEDY} can help."
        )


def _of_reward_models(models: dict[str, dict[str, Any]]) -> Iterator[str]:
    titles = {"r": "reward model r", "refreshed": "refreshed reward model"}
    for name, title in titles.items():
        accuracy, correlation = models[name].get("accuracy"), models[name].get("length_correlation")
        if accuracy and not significant(accuracy, above=0.5):
            yield f"The {title} orders held-out pairs no better than chance by two standard errors."
        if correlation and abs(correlation["mean"] or 0.0) > MAX_LENGTH_CORRELATION:
            yield f"The {title} goes by length: rank correlation {correlation['mean']:+.2f} on held-out responses."
    before, after = (models[name].get("accuracy") for name in titles)
    if before and after and None not in (*before.values(), *after.values()):
        fall, error = before["mean"] - after["mean"], math.hypot(before["standard_error"], after["standard_error"])
        if fall > 2 * error:
            yield f"The refresh made the reward model worse: accuracy {before['mean']:.3f} -> {after['mean']:.3f}."


def _of_reward_accuracy(agreement: dict[str, dict[str, Any]], rlp: dict[str, Any]) -> Iterator[str]:
    """About each policy and the reward it was trained on; without a refresh both PPOs were trained on the first."""
    titles = {"r": "r", "refreshed": "The refreshed reward", "reward": "The reward"}
    last, rewards = rlp["latest"], list(rlp["rewards"])
    for reward, trained in ((rewards[0], "ppo"), (rewards[-1], "rlp")):
        policy = last.get(trained)
        estimate = agreement.get(last[reward], {}).get(policy)
        if estimate and policy in rlp["titles"] and not significant(estimate, above=0.5):
            yield (
                f"{titles[reward]} cannot be shown to tell answers of {rlp['titles'][policy]}, trained on it, from "
                "M1's as the expert does: not above chance by two standard errors."
            )


def _of_evidence(metrics: dict[str, dict[str, Any]]) -> Iterator[str]:
    num_judged = metrics["evaluate"].get("num_judged")
    if num_judged is None:
        return
    if num_judged < MIN_JUDGED:
        yield f"Only {num_judged} prompts were judged per policy: raise evaluate.budget and pool.num_eval."
    yield "One seed: standard errors are over prompts, and another seed's PPO can differ by more."
