"""Finished runs of both pipelines, made up: every file a report may find, with plausible numbers.

Configs, manifests and tables are those of the package's own classes, so that they cannot drift from what runs write.
"""

import contextlib
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.algorithms.estimate import CalibrationBin, Estimate
from rayrl.config import RunConfig
from rayrl.metrics.curves import MetricLog
from rayrl.oracles import ledger_schema
from rayrl.records import Comparison, Judgement, PreferencePair, content_id, to_table
from rayrl.runs import stage_metrics as metrics
from rayrl.runs import storage
from rayrl.runs.run import MANIFEST, Manifest, read_manifest
from rayrl.runs.stage_table import (
    AUDIT_PAIRS,
    DPO,
    EVALUATE,
    FIT_EVALUATOR,
    FIT_REWARD_MODEL,
    GENERATE,
    POOL,
    PPO,
    PPO_REFRESHED,
    PREFERENCES,
    PSEUDO_LABEL,
    QUERY,
    REFIT_REWARD_MODEL,
    SAMPLES,
    SELECT,
    SFT,
    SYNTHESIZE,
    TRACK_REWARDS,
    Stage,
)
from rayrl.stages.selection.select import QUERY_SCHEMA

Metrics = dict[Stage, metrics.StageMetrics]

SHARED = {
    "seed": 3,
    "policy": {"path": "models/tiny-llama"},
    "seed_data": {"path": "seed.jsonl"},
    "pool": {"path": "prompts.jsonl", "num_eval": 64},
}
PROXY_DPO = SHARED | {
    "name": "made-up-run",
    "select": {"budget": 128},
    "oracle": {"type": "http", "base_url": "https://judge.example/v1", "model": "judge-large"},
    "dpo": {"learning_rate": 1e-6},
}
RLP = SHARED | {
    "name": "made-up-rlp",
    "pipeline": "rlp",
    "pool": {"path": "prompts.jsonl", "num_eval": 120},
    "generate": {"k": 2},
    "select": {"budget": 300, "strategy": "random"},
    "preferences": {"source": "oracle", "order": "random"},
    "oracle": {"type": "scripted", "function": "oracles:judge", "compare_function": "oracles:compare"},
    "ppo": {"learning_rate": 2e-4},
    "refresh": {"n": 8},
    "evaluate": {
        "budget": 480,
        "diagnosis_budget": 200,
        "best_of_n": 4,
        "reference_answers": {"path": "references.jsonl"},
    },
}
ATTACK = "<script>alert('x')</script> & <img src=http://evil.example/a onerror=alert(1)> {{ 7*7 }} \u202etxt.exe"
RLP_SECONDS = {
    POOL: 1.0,
    SFT: 20.0,
    GENERATE: 10.0,
    SELECT: 4.0,
    PREFERENCES: 9.0,
    FIT_REWARD_MODEL: 30.0,
    PPO: 130.0,
    SAMPLES: 12.0,
    SYNTHESIZE: 18.0,
    REFIT_REWARD_MODEL: 34.0,
    PPO_REFRESHED: 136.0,
    TRACK_REWARDS: 4.0,
    AUDIT_PAIRS: 2.0,
    EVALUATE: 25.0,
}
NUM_JUDGED = 120
FINISHED_AT = "2025-01-01T00:00:00+00:00"
"""When every made-up stage ended."""


def estimate(mean: float, standard_error: float | None, num: int = 64) -> Estimate:
    return Estimate(mean, math.inf if standard_error is None else standard_error, num)


def write_config(run_dir: Path, content: dict[str, Any]) -> RunConfig:
    """Write the config.json of a run as the run itself does."""
    config = RunConfig.model_validate(content | {"run_dir": str(run_dir)})
    storage.write_json(str(run_dir / "config.json"), config.model_dump(mode="json"))
    return config


def edit_config(run_dir: Path, **changes: Any) -> RunConfig:
    """Change some settings of a run; those of a table one by one."""
    content = json.loads((run_dir / "config.json").read_text())
    return write_config(run_dir, merged(content, changes))


def merged(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with some of them changed, table by table."""
    changed = {
        name: merged(content[name], value) if isinstance(value, dict) and isinstance(content.get(name), dict) else value
        for name, value in changes.items()
    }
    return content | changed


def write_manifest(
    folder: Path, stage: Stage, content: metrics.StageMetrics, *, seconds: float = 1.0, summary: str | None = None
) -> None:
    """Finish a stage, in the folder of a run or of a round."""
    assert isinstance(content, stage.metrics)
    manifest = Manifest(
        stage=stage.name,
        key="k",
        seconds=seconds,
        num_rows=10,
        metrics=content,
        summary=f"{stage.name} is over" if summary is None else summary,
        finished_at=FINISHED_AT,
    )
    storage.write_json(str(folder / "stages" / stage.name / MANIFEST), asdict(manifest))


def edit_metrics(folder: Path, stage: Stage, **changes: Any) -> None:
    """Replace some metrics of a finished stage."""
    manifest = read_manifest(str(folder), stage)
    assert manifest is not None
    edited: Any = replace(manifest.metrics, **changes)
    write_manifest(folder, stage, edited, seconds=manifest.seconds, summary=manifest.summary)


def spent(num: int, *, budget: int, abstained: int = 0, lost: int = 0, cost_usd: float = 0.0) -> metrics.LedgerCounts:
    states = {"scored": num - abstained - lost, "abstained": abstained, "lost": lost}
    return metrics.LedgerCounts.from_states(states, budget=budget, cost_usd=cost_usd)


def pool_metrics(num_prompts: int, num_eval: int) -> metrics.PoolMetrics:
    return metrics.PoolMetrics(
        num_rows=num_prompts + num_eval,
        num_empty=0,
        num_duplicates=0,
        num_prompts=num_prompts,
        num_eval=num_eval,
        num_train_blocks=10,
        num_held_out_blocks=1,
    )


FITTED: dict[str, Any] = {"first_loss": 0.7, "final_loss": 0.4, "fit_s": 9.0}


def generate_metrics(num_prompts: int, num_responses: int, **changes: Any) -> metrics.GenerateMetrics:
    content: dict[str, Any] = {
        "num_empty": 1,
        "num_duplicates": 1,
        "num_tokens": 47 * num_responses,
        "num_truncated": 10,
        "mean_tokens": 47.2,
        "truncated_share": 0.1,
        "tokens_per_s": 900.0,
    }
    return metrics.GenerateMetrics(num_prompts=num_prompts, num_responses=num_responses, **content | changes)


def policy_evaluation(score: float, gain: float, kl: float, /, **changes: Any) -> metrics.PolicyEvaluation:
    content: dict[str, Any] = {
        "kl": estimate(kl, 0.2 if kl else 0.0, NUM_JUDGED),
        "kl_is_bound": False,
        "kl_length": 47.0,
        "perplexity": 5.0,
        "length": 47.0,
        "distinct2": 0.4,
        "self_bleu": 0.23,
        "score": estimate(score, 0.11, NUM_JUDGED),
        "base_score": estimate(2.1, 0.1, NUM_JUDGED),
        "difference": estimate(gain, 0.09 if gain else 0.0, NUM_JUDGED),
        "win_rate": estimate(0.5 + gain / 4, 0.04 if gain else 0.0, NUM_JUDGED),
        "length_controlled_win_rate": estimate(0.5 + gain / 5, 0.043 if gain else 0.0, NUM_JUDGED),
    }
    return metrics.PolicyEvaluation(**content | changes)


def agreement(accuracy: float, standard_error: float = 0.05, num: int = 94, rank: float = 0.5):
    return metrics.RewardEvaluation(
        accuracy=estimate(accuracy, standard_error, num), spearman=estimate(rank, 0.08, NUM_JUDGED)
    )


def evaluator_metrics(spearman: Estimate | None, **changes: Any) -> metrics.FitEvaluatorMetrics:
    centers, nums, shifts = [0.6, 1.5, 2.4, 3.4, 4.3], [3, 5, 6, 4, 1], [-0.2, 0.1, -0.1, 0.3, -0.4]
    bins = [
        CalibrationBin(low=at - 0.5, high=at + 0.5, num=num, mean_predicted=at, mean_oracle=at + shift)
        for at, num, shift in zip(centers, nums, shifts, strict=True)
    ]
    content: dict[str, Any] = {
        "num": 19,
        "num_abstained": 0,
        "loss": 0.83,
        "spearman": spearman,
        "within_one": 0.84,
        "calibration": bins,
    }
    return metrics.FitEvaluatorMetrics(
        num_steps=24, **FITTED, validation=metrics.EvaluatorValidation(**content | changes)
    )


def reward_model_metrics(
    accuracy: Estimate, calibration_error: float, correlation: Estimate, num_pairs: int
) -> metrics.RewardModelMetrics:
    validation = metrics.PairValidation(
        num=28,
        num_abstained=0,
        accuracy=accuracy,
        calibration_error=calibration_error,
        mean_margin=0.84,
        length_correlation=correlation,
    )
    member = metrics.MemberMetrics(fit=metrics.FitMetrics(num_steps=40, **FITTED), validation=validation)
    return metrics.RewardModelMetrics(
        num_pairs=num_pairs, num_left_out=0, means=[0.1], stds=[1.0], members=[member], validation=validation
    )


def ppo_metrics(final_reward: float, final_kl: float) -> metrics.PpoMetrics:
    return metrics.PpoMetrics(
        num_steps=24,
        **FITTED,
        first_reward=0.112,
        final_reward=final_reward,
        best_held_out_reward=final_reward - 0.05,
        final_kl=final_kl,
        num_responses=3072,
        samples_per_s=24.3,
        generate_s=41.2,
        reward_s=12.6,
        train_s=63.9,
        sync_s=8.1,
        sync_share=0.064,
        overlap=False,
    )


def tracked(ppo: str, step: int, kl: float, score: float, accuracy: tuple[float, float]) -> metrics.TrackedPoint:
    rewards = {
        name: metrics.TrackedReward(
            mean=0.3 * step, accuracy=estimate(share, 0.08, 12), spearman=estimate(share - 0.4, 0.1, 26)
        )
        for name, share in zip(("r", "refreshed"), accuracy, strict=True)
    }
    return metrics.TrackedPoint(ppo=ppo, step=step, kl=kl, oracle_score=estimate(score, 0.2, 26), rewards=rewards)


def query_metrics(ledger: metrics.LedgerCounts, histogram: dict[str, int]) -> metrics.QueryMetrics:
    return metrics.QueryMetrics(
        num_spent=ledger.spent,
        num_scored=ledger.scored,
        num_abstained=ledger.abstained,
        score_histogram=histogram,
        abstentions={"timed out": ledger.abstained},
        ledger={"label": ledger},
    )


def proxy_dpo_metrics() -> Metrics:
    label = spent(128, budget=128, abstained=4, cost_usd=0.41)
    return {
        POOL: pool_metrics(1200, 64),
        SFT: metrics.SftMetrics(
            num_steps=60, **FITTED, num_empty=0, num_below_score=0, num_truncated=2, num_too_long=1
        ),
        GENERATE: generate_metrics(1200, 4800, num_empty=12, num_duplicates=143, truncated_share=0.08),
        SELECT: metrics.SelectMetrics(
            strategy="k_center",
            num_selected=128,
            num_candidates=4800,
            radius=[float(1.4 / np.sqrt(i)) for i in range(1, 129)],
            num_embedded=4800,
            embed_s=3.0,
        ),
        QUERY: query_metrics(label, {"0": 14, "1": 30, "2": 38, "3": 25, "4": 12, "5": 5}),
        FIT_EVALUATOR: evaluator_metrics(estimate(0.61, 0.14, 19)),
        PSEUDO_LABEL: metrics.PseudoLabelMetrics(
            num_prompts=1200,
            num_scored=4672,
            num_abstained=0,
            num_oracle_scored=124,
            num_pairs=1163,
            num_synthetic=0,
            num_ties=37,
            pairs_per_query=1163 / 128,
            mode="overlap",
        ),
        DPO: metrics.DpoMetrics(num_steps=19, **FITTED, tokens_per_s=5210.0, padding_share=0.06, reward_accuracy=0.71),
        EVALUATE: metrics.EvaluateMetrics(
            num_judged=64,
            policies={
                "m1": policy_evaluation(
                    2.11,
                    0.0,
                    0.0,
                    score=estimate(2.11, 0.14),
                    perplexity=4.9,
                    length=46.8,
                    distinct2=0.412,
                    self_bleu=0.231,
                ),
                "m2": policy_evaluation(
                    2.56,
                    0.45,
                    4.2,
                    kl=estimate(4.2, 0.3),
                    score=estimate(2.56, 0.15),
                    difference=estimate(0.45, 0.11),
                    win_rate=estimate(0.66, 0.05),
                    length_controlled_win_rate=estimate(0.63, 0.055),
                    perplexity=5.6,
                    length=51.3,
                    distinct2=0.398,
                    self_bleu=0.252,
                ),
            },
            rewards={
                "evaluator": {
                    "m2": metrics.RewardEvaluation(accuracy=estimate(0.67, 0.06, 51), spearman=estimate(0.55, 0.11))
                }
            },
            references=None,
            lm_eval={},
            ledger={"label": label, "evaluate": spent(128, budget=128, cost_usd=0.4)},
        ),
    }


def rlp_metrics() -> Metrics:
    label = spent(300, budget=300, abstained=4, cost_usd=0.9)
    evaluate = spent(660, budget=680, cost_usd=1.98)
    spoken = [(4.9, 46.8, 0.412, 0.231), (5.6, 50.2, 0.391, 0.247), (5.4, 49.1, 0.402, 0.239), (4.8, 47.0, 0.4, 0.23)]
    text = [dict(zip(("perplexity", "length", "distinct2", "self_bleu"), row, strict=True)) for row in spoken]
    gammas = enumerate([184, 184, 184, 153, 153, 101, 63, 30, 30, 3, 3])
    return {
        POOL: pool_metrics(480, 120),
        SFT: metrics.SftMetrics(
            num_steps=60, **FITTED, num_empty=0, num_below_score=0, num_truncated=2, num_too_long=1
        ),
        GENERATE: generate_metrics(480, 958),
        SELECT: metrics.SelectMetrics(strategy="random", num_selected=600, num_candidates=958),
        PREFERENCES: metrics.PreferencesMetrics(
            num_pairs=274,
            num_blocks=8,
            asked=metrics.AskedPairs(
                order="random",
                num_asked=300,
                num_asked_before=0,
                num_without_two_responses=2,
                num_new_pairs=274,
                num_spent=300,
                counts=metrics.ComparisonCounts(
                    num_ties=22,
                    num_abstained=4,
                    num_disagreements=0,
                    first_position_share=0.518,
                    abstentions={"timed out": 4},
                ),
                ledger={"label": label},
            ),
        ),
        FIT_REWARD_MODEL: reward_model_metrics(estimate(0.71, 0.06, 28), 0.093, estimate(0.21, 0.13, 56), 246),
        PPO: ppo_metrics(1.317, 6.21),
        SAMPLES: generate_metrics(200, 1580),
        SYNTHESIZE: metrics.SynthesizeMetrics(
            method="spg",
            clustering="strict",
            gamma=0.5,
            num_blocks=4,
            num_prompts=200,
            num_pairs=101,
            acceptance_rate=0.505,
            outcomes={"accepted": 101, "one_cluster": 16, "low_confidence": 83},
            confidences={"0.2": 31, "0.4": 52, "0.5": 38, "0.6": 33, "0.8": 27, "1.0": 19},
            cluster_sizes={"1": 402, "2": 61, "3": 44, "4": 38, "6": 31, "8": 25},
            num_clusters={"1": 16, "2": 31, "3": 84, "4": 69},
            pairs_by_gamma={f"{gamma / 10:.1f}": num for gamma, num in gammas},
            entailment=metrics.EntailmentCosts(
                num_nli_calls=6021, num_truncated_pairs=7, num_sample_pairs=11060, deduplicated_share=0.173
            ),
            lengths=metrics.PairLengths(
                chosen_chars=141.0, rejected_chars=133.5, chosen_tokens=31.4, rejected_tokens=29.2
            ),
        ),
        REFIT_REWARD_MODEL: reward_model_metrics(estimate(0.74, 0.06, 28), 0.081, estimate(0.18, 0.13, 56), 347),
        PPO_REFRESHED: ppo_metrics(1.522, 5.87),
        TRACK_REWARDS: metrics.TrackRewardsMetrics(
            points=[
                tracked(PPO.name, 0, 0.0, 2.1, (0.7, 0.71)),
                tracked(PPO.name, 24, 6.3, 2.4, (0.6, 0.69)),
                tracked(PPO_REFRESHED.name, 24, 5.9, 2.8, (0.58, 0.7)),
            ],
            num_answers=78,
            num_scored=76,
        ),
        AUDIT_PAIRS: metrics.AuditPairsMetrics(
            num_audited=50,
            accuracy=estimate(0.72, 0.064, 50),
            accuracy_by_gamma={"0.0": estimate(0.72, 0.064, 50), "0.5": estimate(0.8, 0.08, 25), "1.0": None},
            ledger={"label": label, "evaluate": spent(180, budget=680, cost_usd=0.54)},
        ),
        EVALUATE: metrics.EvaluateMetrics(
            num_judged=NUM_JUDGED,
            policies={
                "m1": policy_evaluation(2.1, 0.0, 0.0, **text[0]),
                "ppo": policy_evaluation(2.47, 0.37, 6.3, **text[1]),
                "rlp": policy_evaluation(2.89, 0.79, 5.9, **text[2]),
                "best_of_n": policy_evaluation(2.6, 0.5, 0.64, **text[3], kl_is_bound=True),
            },
            rewards={
                "r": {
                    "ppo": agreement(0.66, 0.05, 94),
                    "rlp": agreement(0.63, 0.055, 97),
                    "best_of_n": agreement(0.68, 0.05, 90),
                },
                "refreshed": {
                    "ppo": agreement(0.69, 0.051, 94),
                    "rlp": agreement(0.72, 0.049, 97),
                    "best_of_n": agreement(0.67, 0.05, 90),
                },
            },
            references=metrics.ReferencesEvaluation(
                by="random",
                num_prompts=NUM_JUDGED,
                policies={
                    name: metrics.ReferenceEvaluation(win_rate=estimate(mean, 0.042, NUM_JUDGED - 2), num_abstained=2)
                    for name, mean in (("m1", 0.31), ("ppo", 0.347), ("rlp", 0.389), ("best_of_n", 0.36))
                },
            ),
            lm_eval={},
            ledger={"label": label, "evaluate": evaluate},
        ),
    }


def write_part(run_dir: Path, stage: Stage, name: str, table: pa.Table) -> None:
    path = run_dir / "stages" / stage.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


PART = "table/part-00000.parquet"


def write_timings(run_dir: Path, *timings: tuple[str, float]) -> None:
    content = [{"what": what, "seconds": seconds, "ended_at": 1.7e9} for what, seconds in timings]
    (run_dir / "timings.json").write_text(json.dumps(content))


def write_proxy_dpo_run(folder: Path) -> Path:
    """A finished run directory of proxy DPO."""
    write_config(folder, PROXY_DPO)
    for i, (stage, content) in enumerate(proxy_dpo_metrics().items()):
        write_manifest(folder, stage, content, seconds=20.0 + 7 * i)
    engine = ("engine:generate", 17.4)
    write_timings(folder, ("ray", 3.1), engine, ("fit:sft", 14.2), ("fit:dpo", 13.9), ("engine:generate", 16.8))
    _write_proxy_dpo_tables(folder)
    random = np.random.default_rng(1)
    for stage, num_steps in ((SFT, 60), (FIT_EVALUATOR, 24), (DPO, 19)):
        with MetricLog(str(folder), stage.name) as log:
            for step in range(1, num_steps + 1):
                loss = 0.5 + 2 * np.exp(-step / 15) + 0.05 * random.normal()
                extra = {"accuracy": 0.5 + 0.02 * step, "margin": 0.05 * step} if stage is DPO else {}
                log.log(step, loss=loss, learning_rate=1e-5, **extra)
    return folder


def _write_proxy_dpo_tables(run_dir: Path) -> None:
    random = np.random.default_rng(0)
    before = random.binomial(5, 0.42, 64)
    after = np.clip(before + random.choice([-1, 0, 1, 2], 64, p=[0.15, 0.35, 0.3, 0.2]), 0, 5)
    rows = [
        {
            "prompt_id": f"p{i}",
            "prompt": f"Tell a story about a small fox and its friend number {i}.",
            "m1_response": "The fox ran. The fox ran home.\nIt was late." if i else ATTACK,
            "m2_response": "The fox shared its berries with a friend, and both were glad. " * (1 + i % 3),
            "m1_score": float(before[i]),
            "m2_score": None if i == 5 else float(after[i]),
            "m1_num_tokens": 12,
            "m2_num_tokens": 15 * (1 + i % 3),
        }
        for i in range(64)
    ]
    centers = random.normal(0, 3, (6, 2))
    points = centers[random.integers(0, 6, 1500)] + random.normal(0, 0.7, (1500, 2))
    projection = {"x": points[:, 0], "y": points[:, 1], "selected": np.arange(1500) % 12 == 0}
    judgements = [
        Judgement(
            key=content_id(str(i)),
            prompt_id=f"p{i}",
            response_id=f"p{i}-0",
            prompt="Tell a story.",
            response=f"Story {i}.",
            oracle="http:judge-large",
            status="abstained" if i % 32 == 0 else "scored",
            score=None if i % 32 == 0 else float(i % 6),
            rationale="clear" if i % 32 else "timed out",
            purpose="label",
            cost_usd=0.0032,
        )
        for i in range(128)
    ]
    write_part(run_dir, EVALUATE, PART, pa.Table.from_pylist(rows))
    write_part(run_dir, SELECT, "projection.parquet", pa.table(projection))
    write_part(run_dir, QUERY, PART, to_table(judgements, Judgement))


def write_vectors(folder: Path, vectors: dict[str, np.ndarray], *, name: str = "embeddings-0", shift: int = 0) -> None:
    """Write the query set of a round, and the vectors of its responses, in two blocks.

    Args:
        folder: of the round.
        vectors: by response id, "<prompt id>-<index>".
        name: of the folder of vectors.
        shift: added to the ordinals of the vectors; with any, they are those of other responses.
    """
    chosen = [
        {"ordinal": 64 * ordinal, "prompt_id": response.rpartition("-")[0], "response_id": response}
        | {"prompt": "Tell.", "response": response, "token_ids": [1]}
        for ordinal, response in enumerate(vectors)
    ]
    write_part(folder, SELECT, PART, pa.Table.from_pylist(chosen, schema=QUERY_SCHEMA))
    ordinals = pa.array([row["ordinal"] + shift for row in chosen], pa.int64())
    matrix = np.stack(list(vectors.values())).astype(np.float32)
    nested = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    table = pa.table({"ordinal": ordinals, "vector": nested})
    half = len(chosen) // 2
    for block, rows in enumerate((table.slice(0, half), table.slice(half))):
        write_part(folder, SELECT, f"{name}/part-{block:05d}.parquet", rows)


def write_judgements(folder: Path, num_prompts: int = 48, *, seed: int = 0, status: str = "scored") -> None:
    """Write two judgements of each of some prompts, whose scores can be learnt from their vectors."""
    random = np.random.default_rng(seed)
    vectors: dict[str, np.ndarray] = {}
    judgements: list[Judgement] = []
    for response in (f"p{prompt}-{index}" for prompt in range(num_prompts) for index in range(2)):
        vectors[response] = random.standard_normal(6)
        score = float(np.clip(np.round(2.5 + vectors[response][0] + 0.5 * random.standard_normal()), 0, 5))
        asked = replace(judgement(response), prompt_id=response.rpartition("-")[0], response_id=response)
        judgements.append(replace(asked, status=status, score=score if status == "scored" else None))
    # One abstention, which teaches nothing.
    judgements[0] = replace(judgements[0], status="abstained", score=None)
    write_part(folder, QUERY, PART, to_table(judgements, Judgement))
    write_vectors(folder, vectors)


def write_comparisons(folder: Path, num_prompts: int = 64) -> None:
    """Write a comparison of each of some prompts, which can be learnt from the vectors; every eighth is a tie."""
    random = np.random.default_rng(0)
    vectors: dict[str, np.ndarray] = {}
    comparisons: list[Comparison] = []
    for prompt in range(num_prompts):
        first, second = f"p{prompt}-0", f"p{prompt}-1"
        vectors |= {first: random.standard_normal(6), second: random.standard_normal(6)}
        margin = vectors[first][0] - vectors[second][0] + 0.5 * random.standard_normal()
        preference = "tie" if prompt % 8 == 0 else "first" if margin > 0 else "second"
        asked = replace(_comparison(second), prompt_id=f"p{prompt}", first_id=first, second_id=second)
        comparisons.append(replace(asked, status="scored", preference=preference))
    write_part(folder, PREFERENCES, "comparisons/part-00000.parquet", to_table(comparisons, Comparison))
    write_vectors(folder, vectors)


def write_rlp_run(folder: Path) -> Path:
    """A finished run directory of the second pipeline."""
    write_config(folder, RLP)
    for stage, content in rlp_metrics().items():
        write_manifest(folder, stage, content, seconds=RLP_SECONDS[stage])
    write_timings(folder, ("ray", 3.1), ("engine:generate", 17.4), ("fit:ppo", 128.0), ("fit:ppo_refreshed", 134.0))
    _write_evaluation_table(folder)
    _write_preferences(folder)
    _write_ledger(folder)
    _log_curves(folder)
    return folder


def _write_evaluation_table(run_dir: Path) -> None:
    random = np.random.default_rng(0)
    scores = {"m1": random.binomial(5, 0.42, NUM_JUDGED)}
    scores["ppo"] = np.clip(scores["m1"] + random.choice([-1, 0, 1], NUM_JUDGED, p=[0.15, 0.4, 0.45]), 0, 5)
    scores["rlp"] = np.clip(scores["ppo"] + random.choice([-1, 0, 1], NUM_JUDGED, p=[0.1, 0.4, 0.5]), 0, 5)
    scores["best_of_n"] = np.clip(scores["m1"] + random.choice([0, 1], NUM_JUDGED), 0, 5)
    columns: dict[str, Any] = {
        "prompt_id": [f"p{i}" for i in range(NUM_JUDGED)],
        "prompt": [f"Tell a story about fox number {i}." for i in range(NUM_JUDGED)],
    }
    for name, policy_scores in scores.items():
        columns[f"{name}_response"] = [
            f"{name} says: the fox <b>ran</b> home. " * (1 + i % 3) for i in range(NUM_JUDGED)
        ]
        values = [None if (name, i) == ("rlp", 5) else float(score) for i, score in enumerate(policy_scores)]
        columns[f"{name}_score"] = pa.array(values, pa.float64())
        columns[f"{name}_num_tokens"] = [9 * (1 + i % 3) for i in range(NUM_JUDGED)]
    write_part(run_dir, EVALUATE, PART, pa.table(columns))


def _write_preferences(run_dir: Path) -> None:
    unknown = dict.fromkeys(("chosen_score", "rejected_score"), math.nan)
    unknown |= dict.fromkeys(("chosen_reference_logprob", "rejected_reference_logprob"), -40.0)
    pairs = [
        PreferencePair(
            prompt_id=f"p{i}",
            prompt=f"Tell a story about hare number {i}.",
            prompt_token_ids=[1, 2],
            chosen_id=f"p{i}-0",
            rejected_id=f"p{i}-1",
            chosen="The hare came home.",
            rejected="<i>Hare</i> hare hare.",
            chosen_token_ids=[3, 4],
            rejected_token_ids=[5],
            source="oracle",
            **unknown,
        )
        for i in range(6)
    ]
    write_part(run_dir, PREFERENCES, PART, to_table(pairs, PreferencePair))


def judgement(response: str, purpose: str = "label") -> Judgement:
    """A question about one response, as the oracle pool puts it to the ledger."""
    return Judgement(
        key=content_id(response),
        prompt_id="p",
        response_id="p-0",
        prompt="Tell.",
        response=response,
        oracle="o",
        purpose=purpose,
    )


def _comparison(second: str) -> Comparison:
    return Comparison(
        key=content_id(second),
        prompt_id="p",
        first_id="p-0",
        second_id="p-1",
        prompt="Tell.",
        first="Once.",
        second=second,
        oracle="o",
        purpose="label",
    )


def _write_ledger(run_dir: Path) -> None:
    paid = {"status": "scored", "cost_usd": 0.003}
    answers = [replace(_comparison(f"Twice, {i}."), preference="first", **paid) for i in range(296)]
    answers += [replace(_comparison(f"Thrice, {i}."), status="abstained", cost_usd=0.003) for i in range(4)]
    answers += [replace(judgement(f"Once, {i}.", "evaluate"), score=1.0, **paid) for i in range(660)]
    with contextlib.closing(ledger_schema.connect(run_dir / "ledger.sqlite")) as db:
        db.execute("BEGIN")
        for answer in answers:
            unanswered = {"preference": None} if isinstance(answer, Comparison) else {"score": None}
            question = replace(answer, **unanswered)
            attempt = ledger_schema.insert(db, question, run="", stage=answer.purpose, estimated_usd=answer.cost_usd)
            ledger_schema.settle(
                db, attempt, answer, state=answer.status, disagreement=None, input_tokens=9, output_tokens=9
            )
        db.execute("COMMIT")


def _log_curves(run_dir: Path) -> None:
    random = np.random.default_rng(1)
    for stage, num_steps in ((SFT, 60), (FIT_REWARD_MODEL.member(0), 40), (REFIT_REWARD_MODEL.member(0), 50)):
        with MetricLog(str(run_dir), stage.name) as log:
            for step in range(1, num_steps + 1):
                log.log(step, loss=0.4 + np.exp(-step / 15) + 0.03 * random.normal(), learning_rate=1e-5)
    for stage, final in ((PPO, 1.3), (PPO_REFRESHED, 1.5)):
        with MetricLog(str(run_dir), stage.name) as log:
            for step in range(1, 25):
                learnt = 1 - np.exp(-step / 8)
                held_out = {"held_out_reward": (final - 0.1) * learnt} if step % 4 == 0 else {}
                log.log(
                    step,
                    reward=0.1 + final * learnt + 0.05 * random.normal(),
                    kl=6 * learnt,
                    kl_coef=0.02,
                    length=46 + 4 * learnt + random.normal(),
                    policy_loss=-0.01 * learnt + 0.002 * random.normal(),
                    value_loss=0.3 * np.exp(-step / 6),
                    clip_fraction=0.12 + 0.02 * random.normal(),
                    seconds=5.0,
                    **held_out,
                )


def leave_ppo_alone(folder: Path, reward: str) -> Path:
    """Turn the finished run of the second pipeline into one with another `ppo.reward`: M1 and one PPO."""
    content = {name: value for name, value in RLP.items() if name != "preferences"}
    content["ppo"] = {"reward": reward} | ({"function": "rewards:jokes"} if reward == "function" else {})
    content["evaluate"] = {"budget": 240}
    write_config(folder, content | {"evaluator": {"type": "scalar"}})
    (folder / "timings.json").unlink()
    kept = {POOL, SFT, PPO, EVALUATE} | ({GENERATE, SELECT} if reward == "evaluator" else set())
    for stage in rlp_metrics():
        if stage not in kept:
            shutil.rmtree(folder / "stages" / stage.name)
    evaluated = rlp_metrics()[EVALUATE]
    assert isinstance(evaluated, metrics.EvaluateMetrics)
    alone = replace(
        evaluated,
        policies={name: evaluated.policies[name] for name in ("m1", "ppo")},
        rewards={"reward": {"ppo": agreement(0.7, 0.05, 94)}},
        references=None,
    )
    write_manifest(folder, EVALUATE, alone, seconds=RLP_SECONDS[EVALUATE])
    table = folder / "stages" / EVALUATE.name / PART
    columns = [name for name in pq.read_schema(table).names if not name.startswith(("rlp", "best"))]
    pq.write_table(pq.read_table(table, columns=columns), table)
    if reward == "evaluator":
        label = spent(300, budget=300, abstained=4, cost_usd=0.9)
        write_manifest(folder, QUERY, query_metrics(label, {"2": 7}))
        fitted = evaluator_metrics(estimate(0.6, 0.1, 44), within_one=0.75, loss=0.9, calibration=[])
        write_manifest(folder, FIT_EVALUATOR, fitted)
    else:
        (folder / "ledger.sqlite").unlink()
    return folder
