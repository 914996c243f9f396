"""A small finished run, made up: every file a report may find, with plausible numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrl.metrics.curves import MetricLog
from rayrl.records import Judgement, content_id, to_table
from tests.report.manifests import estimate, write_manifest
from tests.report.rlp_run import write_rlp_run

CONFIG = {
    "name": "made-up-run",
    "run_dir": "runs/made-up",
    "seed": 3,
    "labels": "proxy",
    "policy": {"path": "models/tiny-llama"},
    "pool": {"path": "prompts.jsonl", "num_eval": 64},
    "generate": {"source": "policy", "k": 4},
    "select": {"budget": 128, "strategy": "k_center", "unit": "response", "text": "prompt_response"},
    "oracle": {"type": "http", "model": "judge-large", "api_key_env": "OPENAI_API_KEY"},
    "evaluator": {"type": "generative", "scoring": "score_first"},
    "pseudo_label": {"pairing": "best_worst"},
    "dpo": {"loss": "sigmoid", "beta": 0.1, "learning_rate": 1e-6, "epochs": 1},
    "evaluate": {"budget": 128},
}
ATTACK = "<script>alert('x')</script> & <img src=http://evil.example/a onerror=alert(1)> {{ 7*7 }} \u202etxt.exe"


def made_up_metrics() -> dict[str, dict[str, Any]]:
    ledger = {
        "budget": 128,
        "spent": 128,
        "scored": 124,
        "abstained": 4,
        "lost": 0,
        "in_flight": 0,
        "cost_usd": 0.41,
    }
    centers = [0.6, 1.5, 2.4, 3.4, 4.3]
    return {
        "sft": {"num_steps": 60},
        "generate": {
            "num_prompts": 1200,
            "num_responses": 4800,
            "num_empty": 12,
            "num_duplicates": 143,
            "mean_tokens": 47.2,
            "truncated_share": 0.08,
        },
        "select": {
            "strategy": "k_center",
            "num_selected": 128,
            "num_candidates": 4800,
            "radius": list(1.4 / np.sqrt(np.arange(1, 129))),
        },
        "query": {
            "label": ledger,
            "evaluate": ledger | {"spent": 0, "scored": 0, "abstained": 0, "cost_usd": 0.0},
            "score_histogram": {"0": 14, "1": 30, "2": 38, "3": 25, "4": 12, "5": 5},
        },
        "fit_evaluator": {
            "validation": {
                "num": 19,
                "loss": 0.83,
                "spearman": estimate(0.61, 0.14, 19),
                "within_one": 0.84,
                "calibration": [
                    {"low": c - 0.5, "high": c + 0.5, "num": n, "mean_predicted": c, "mean_expert": c + d}
                    for c, n, d in zip(centers, [3, 5, 6, 4, 1], [-0.2, 0.1, -0.1, 0.3, -0.4], strict=True)
                ]
                + [{"low": 5, "high": 6, "num": 0, "mean_predicted": None, "mean_expert": None}],
            }
        },
        "pseudo_label": {
            "num_scored": 4672,
            "num_pairs": 1163,
            "num_ties": 37,
            "num_expert_scored": 124,
            "mode": "overlap",
        },
        "dpo": {"num_steps": 19, "tokens_per_s": 5210.0, "padding_share": 0.06, "final_loss": 0.52},
        "evaluate": {
            "score_m1": estimate(2.11, 0.14),
            "score_m2": estimate(2.56, 0.15),
            "difference": estimate(0.45, 0.11),
            "win_rate": estimate(0.66, 0.05),
            "length_controlled_win_rate": estimate(0.63, 0.055),
            "kl": estimate(4.2, 0.3),
            "evaluator_spearman": estimate(0.55, 0.11),
            "length_m1": 46.8,
            "length_m2": 51.3,
            "perplexity_m1": 4.9,
            "perplexity_m2": 5.6,
            "distinct2_m1": 0.412,
            "distinct2_m2": 0.398,
            "self_bleu_m1": 0.231,
            "self_bleu_m2": 0.252,
        },
    }


def _write_tables(run_dir: Path) -> None:
    random = np.random.default_rng(0)
    before = random.binomial(5, 0.42, 64)
    after = np.clip(before + random.choice([-1, 0, 1, 2], 64, p=[0.15, 0.35, 0.3, 0.2]), 0, 5)
    rows = [
        {
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
    for stage, name, table in (
        ("evaluate", "table/part-00000.parquet", pa.Table.from_pylist(rows)),
        ("select", "projection.parquet", pa.table(projection)),
        ("query", "table/part-00000.parquet", to_table(judgements, Judgement)),
    ):
        path = run_dir / "stages" / stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run directory."""
    folder = tmp_path / "made-up"
    for i, (stage, metrics) in enumerate(made_up_metrics().items()):
        write_manifest(folder, stage, metrics, seconds=20.0 + 7 * i)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    timings = [
        ("ray", 3.1),
        ("engine:generate", 17.4),
        ("fit:sft", 14.2),
        ("fit:dpo", 13.9),
        ("engine:generate", 16.8),
    ]
    (folder / "timings.json").write_text(json.dumps([{"what": w, "seconds": s} for w, s in timings]))
    _write_tables(folder)
    random = np.random.default_rng(1)
    for stage, num_steps in (("sft", 60), ("fit_evaluator", 24), ("dpo", 19)):
        with MetricLog(str(folder), stage) as log:
            for step in range(1, num_steps + 1):
                loss = 0.5 + 2 * np.exp(-step / 15) + 0.05 * random.normal()
                extra = {"accuracy": 0.5 + 0.02 * step, "margin": 0.05 * step} if stage == "dpo" else {}
                log.log(step, loss=loss, learning_rate=1e-5, **extra)
    return folder


@pytest.fixture
def rlp_run_dir(tmp_path: Path) -> Path:
    """A finished run directory of the second pipeline."""
    return write_rlp_run(tmp_path / "made-up-rlp")
