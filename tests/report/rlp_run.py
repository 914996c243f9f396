"""A small finished run of the second pipeline, made up: every file a report may find, with plausible numbers."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrl.metrics.curves import MetricLog
from rayrl.oracles.ledger_schema import connect
from rayrl.records import PreferencePair, to_table
from tests.report.manifests import estimate, write_manifest

CONFIG = {
    "name": "made-up-rlp",
    "pipeline": "rlp",
    "run_dir": "runs/made-up-rlp",
    "seed": 3,
    "policy": {"path": "models/tiny-llama"},
    "pool": {"path": "prompts.jsonl", "num_eval": 120},
    "generate": {"source": "policy", "k": 2},
    "select": {"budget": 300, "strategy": "random"},
    "preferences": {"source": "oracle", "order": "random", "data": None},
    "oracle": {"type": "scripted", "compare_function": "experts:compare"},
    "reward_model": {"num_members": 1, "objective": "mean"},
    "ppo": {"kl_coef": 0.02, "clip_range": 0.2, "learning_rate": 2e-4},
    "refresh": {"method": "spg", "n": 8, "spg": {"gamma": 0.5, "clustering": "strict"}, "uml": {"objective": "uml"}},
    "evaluate": {"budget": 480, "diagnosis_budget": 200, "best_of_n": 4, "temperature": 0.7},
}
SECONDS = {"pool": 1.0, "sft": 20.0, "generate": 10.0, "select": 4.0, "preferences": 9.0, "fit_reward_model": 30.0}
SECONDS |= {"ppo": 130.0, "samples": 12.0, "synthesize": 18.0, "refit_reward_model": 34.0, "ppo_refreshed": 136.0}
SECONDS |= {"track_rewards": 4.0, "audit_pairs": 2.0, "evaluate": 25.0}
NUM_JUDGED = 120


def policy_row(score: float, gain: float, kl: float, **spoken: float) -> dict[str, Any]:
    return {
        "kl": estimate(kl, 0.2 if kl else 0.0, NUM_JUDGED),
        "base_score": estimate(2.1, 0.1, NUM_JUDGED),
        "score": estimate(score, 0.11, NUM_JUDGED),
        "difference": estimate(gain, 0.09 if gain else 0.0, NUM_JUDGED),
        "win_rate": estimate(0.5 + gain / 4, 0.04 if gain else 0.0, NUM_JUDGED),
        "length_controlled_win_rate": estimate(0.5 + gain / 5, 0.043 if gain else 0.0, NUM_JUDGED),
    } | spoken


def reward_metrics(accuracy: float, calibration_error: float, correlation: float, num_pairs: int) -> dict[str, Any]:
    validation = {
        "num": 28,
        "num_abstained": 0,
        "accuracy": estimate(accuracy, 0.06, 28),
        "calibration_error": calibration_error,
        "mean_margin": 0.84,
        "length_correlation": estimate(correlation, 0.13, 56),
    }
    member = validation | {"num_steps": 40, "first_loss": 0.7, "final_loss": 0.4}
    return {"num_pairs": num_pairs, "means": [0.1], "stds": [1.0], "members": [member], "validation": validation}


def ppo_metrics(final_reward: float, final_kl: float) -> dict[str, Any]:
    return {
        "num_steps": 24,
        "first_reward": 0.112,
        "final_reward": final_reward,
        "best_held_out_reward": final_reward - 0.05,
        "final_kl": final_kl,
        "num_responses": 3072,
        "samples_per_s": 24.3,
        "generate_s": 41.2,
        "reward_s": 12.6,
        "train_s": 63.9,
        "sync_s": 8.1,
        "sync_share": 0.064,
        "overlap": False,
    }


def tracked(ppo: str, step: int, kl: float, score: float, accuracy: tuple[float, float]) -> dict[str, Any]:
    rewards = {
        name: {"mean": 0.3 * step, "accuracy": estimate(of, 0.08, 12), "spearman": estimate(of - 0.4, 0.1, 26)}
        for name, of in zip(("r", "refreshed"), accuracy, strict=True)
    }
    return {"ppo": ppo, "step": step, "kl": kl, "expert_score": estimate(score, 0.2, 26), "rewards": rewards}


def rlp_metrics() -> dict[str, dict[str, Any]]:
    paid = {"budget": 300, "spent": 300, "scored": 296, "abstained": 4, "lost": 0, "in_flight": 0, "cost_usd": 0.9}
    confidences = {"0.2": 31, "0.4": 52, "0.5": 38, "0.6": 33, "0.8": 27, "1.0": 19}
    return {
        "pool": {"num_prompts": 480, "num_eval": 120},
        "sft": {"num_steps": 60},
        "generate": {"num_prompts": 480, "num_responses": 958, "num_empty": 1, "truncated_share": 0.1},
        "select": {"strategy": "random", "num_selected": 600, "num_candidates": 958},
        "preferences": {
            "source": "oracle",
            "num_pairs": 274,
            "order": "random",
            "num_asked": 300,
            "num_ties": 22,
            "num_abstained": 4,
            "num_disagreements": 0,
            "first_position_share": 0.518,
            "label": paid,
        },
        "fit_reward_model": reward_metrics(0.71, 0.093, 0.21, 246),
        "ppo": ppo_metrics(1.317, 6.21),
        "samples": {"num_prompts": 200, "num_responses": 1580},
        "synthesize": {
            "method": "spg",
            "clustering": "strict",
            "gamma": 0.5,
            "num_prompts": 200,
            "num_pairs": 101,
            "acceptance_rate": 0.505,
            "outcomes": {"accepted": 101, "one_cluster": 16, "low_confidence": 83},
            "confidences": confidences,
            "cluster_sizes": {"1": 402, "2": 61, "3": 44, "4": 38, "6": 31, "8": 25},
            "num_clusters": {"1": 16, "2": 31, "3": 84, "4": 69},
            "pairs_by_gamma": {
                f"{g / 10:.1f}": n for g, n in enumerate([184, 184, 184, 153, 153, 101, 63, 30, 30, 3, 3])
            },
            "num_nli_calls": 6021,
            "num_truncated_pairs": 7,
            "num_sample_pairs": 11060,
            "deduplicated_share": 0.173,
            "mean_chosen_chars": 141.0,
            "mean_rejected_chars": 133.5,
            "mean_chosen_tokens": 31.4,
            "mean_rejected_tokens": 29.2,
            "gap_chars": 7.5,
            "gap_tokens": 2.2,
        },
        "refit_reward_model": reward_metrics(0.74, 0.081, 0.18, 347),
        "ppo_refreshed": ppo_metrics(1.522, 5.87),
        "track_rewards": {
            "points": [
                tracked("ppo", 0, 0.0, 2.1, (0.7, 0.71)),
                tracked("ppo", 24, 6.3, 2.4, (0.6, 0.69)),
                tracked("ppo_refreshed", 24, 5.9, 2.8, (0.58, 0.7)),
            ],
            "num_answers": 78,
            "num_scored": 76,
        },
        "audit_pairs": {
            "num_audited": 50,
            "accuracy": estimate(0.72, 0.064, 50),
            "accuracy_by_gamma": {"0.0": estimate(0.72, 0.064, 50), "0.5": estimate(0.8, 0.08, 25), "1.0": None},
        },
        "evaluate": {
            "policies": {
                "m1": policy_row(2.1, 0.0, 0.0, perplexity=4.9, length=46.8, distinct2=0.412, self_bleu=0.231),
                "ppo": policy_row(2.47, 0.37, 6.3, perplexity=5.6, length=50.2, distinct2=0.391, self_bleu=0.247),
                "rlp": policy_row(2.89, 0.79, 5.9, perplexity=5.4, length=49.1, distinct2=0.402, self_bleu=0.239),
                "best_of_n": policy_row(2.6, 0.5, 0.64, perplexity=4.8, length=47.0, distinct2=0.4, self_bleu=0.23)
                | {"kl_is_bound": True},
            },
            "reward_accuracy": {
                "r": {
                    "ppo": estimate(0.66, 0.05, 94),
                    "rlp": estimate(0.63, 0.055, 97),
                    "best_of_n": estimate(0.68, 0.05, 90),
                },
                "refreshed": {
                    "ppo": estimate(0.69, 0.051, 94),
                    "rlp": estimate(0.72, 0.049, 97),
                    "best_of_n": estimate(0.67, 0.05, 90),
                },
            },
            "num_judged": NUM_JUDGED,
            "references": {
                "by": "random",
                "num_prompts": NUM_JUDGED,
                "policies": {
                    name: {"win_rate": estimate(mean, 0.042, NUM_JUDGED - 2), "num_abstained": 2}
                    for name, mean in (("m1", 0.31), ("ppo", 0.347), ("rlp", 0.389), ("best_of_n", 0.36))
                },
            },
        },
    }


def _write_table(run_dir: Path) -> None:
    random = np.random.default_rng(0)
    scores = {"m1": random.binomial(5, 0.42, NUM_JUDGED)}
    scores["ppo"] = np.clip(scores["m1"] + random.choice([-1, 0, 1], NUM_JUDGED, p=[0.15, 0.4, 0.45]), 0, 5)
    scores["rlp"] = np.clip(scores["ppo"] + random.choice([-1, 0, 1], NUM_JUDGED, p=[0.1, 0.4, 0.5]), 0, 5)
    scores["best_of_n"] = np.clip(scores["m1"] + random.choice([0, 1], NUM_JUDGED), 0, 5)
    columns: dict[str, Any] = {"prompt": [f"Tell a story about fox number {i}." for i in range(NUM_JUDGED)]}
    for name, of_policy in scores.items():
        columns[f"{name}_response"] = [
            f"{name} says: the fox <b>ran</b> home. " * (1 + i % 3) for i in range(NUM_JUDGED)
        ]
        values = [None if (name, i) == ("rlp", 5) else float(score) for i, score in enumerate(of_policy)]
        columns[f"{name}_score"] = pa.array(values, pa.float64())
    path = run_dir / "stages" / "evaluate" / "table" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)


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
    path = run_dir / "stages" / "preferences" / "table" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(to_table(pairs, PreferencePair), path)


def _write_ledger(run_dir: Path) -> None:
    """What `evaluate` paid is nowhere else."""
    answers = [("label", "scored")] * 296 + [("label", "abstained")] * 4 + [("evaluate", "scored")] * 660
    rows = [
        (str(i), purpose, state, "p", "r", "Tell.", "Once.", "o", 1.0 if state == "scored" else None, 0.003)
        + (("r2", f"Twice, {i}.") if purpose == "label" else (None, None))
        for i, (purpose, state) in enumerate(answers)
    ]
    columns = (
        "key, purpose, state, prompt_id, response_id, prompt, response, oracle, score, cost_usd, second_id, second"
    )
    with contextlib.closing(connect(run_dir / "ledger.sqlite")) as db:
        db.execute("BEGIN")
        db.executemany(f"INSERT INTO attempts ({columns}) VALUES ({', '.join('?' * 12)})", rows)
        db.execute("COMMIT")


def _log_curves(run_dir: Path) -> None:
    random = np.random.default_rng(1)
    for stage, num_steps in (("sft", 60), ("fit_reward_model-0", 40), ("refit_reward_model-0", 50)):
        with MetricLog(str(run_dir), stage) as log:
            for step in range(1, num_steps + 1):
                log.log(step, loss=0.4 + np.exp(-step / 15) + 0.03 * random.normal(), learning_rate=1e-5)
    for stage, final in (("ppo", 1.3), ("ppo_refreshed", 1.5)):
        with MetricLog(str(run_dir), stage) as log:
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


def write_rlp_run(folder: Path) -> Path:
    """A finished run directory."""
    for stage, metrics in rlp_metrics().items():
        write_manifest(folder, stage, metrics, seconds=SECONDS[stage])
    (folder / "config.json").write_text(json.dumps(CONFIG))
    timings = [("ray", 3.1), ("engine:generate", 17.4), ("fit:ppo", 128.0), ("fit:ppo_refreshed", 134.0)]
    (folder / "timings.json").write_text(json.dumps([{"what": w, "seconds": s} for w, s in timings]))
    _write_table(folder)
    _write_preferences(folder)
    _write_ledger(folder)
    _log_curves(folder)
    return folder


def leave_ppo_alone(folder: Path, reward: str) -> Path:
    """The finished run as it would be with another `ppo.reward`: M1 and one PPO."""
    config = CONFIG | {"preferences": None, "evaluate": {"budget": 240}}
    config["ppo"] = CONFIG["ppo"] | {"reward": reward, "function": "rewards:jokes" if reward == "function" else None}
    (folder / "config.json").write_text(json.dumps(config | {"evaluator": {"type": "scalar"}}))
    (folder / "timings.json").unlink()
    kept = {"pool", "sft", "ppo", "evaluate"} | ({"generate", "select"} if reward == "evaluator" else set())
    for stage in rlp_metrics():
        if stage not in kept:
            shutil.rmtree(folder / "stages" / stage)
    policies = {name: row for name, row in rlp_metrics()["evaluate"]["policies"].items() if name in ("m1", "ppo")}
    agreement = {"reward": {"ppo": estimate(0.7, 0.05, 94)}}
    evaluated = {"policies": policies, "reward_accuracy": agreement, "num_judged": NUM_JUDGED}
    write_manifest(folder, "evaluate", evaluated, seconds=SECONDS["evaluate"])
    table = folder / "stages" / "evaluate" / "table" / "part-00000.parquet"
    columns = [name for name in pq.read_schema(table).names if not name.startswith(("rlp", "best"))]
    pq.write_table(pq.read_table(table, columns=columns), table)
    if reward == "evaluator":
        write_manifest(folder, "query", {"label": rlp_metrics()["preferences"]["label"], "score_histogram": {"2": 7}})
        validation = {"spearman": estimate(0.6, 0.1, 44), "within_one": 0.75, "loss": 0.9, "calibration": []}
        write_manifest(folder, "fit_evaluator", {"validation": validation})
    else:
        (folder / "ledger.sqlite").unlink()
    return folder
