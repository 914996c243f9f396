"""A small pool of made-up responses whose scores a linear function of their vectors decides, and studies of it."""

import json
from pathlib import Path

import numpy as np

NUM_PROMPTS, K, WIDTH = 40, 4, 6


def write_pool(folder, *, num_prompts=NUM_PROMPTS):
    """Write vectors.jsonl and judgements.jsonl; scores are 0 to 5 and follow the first two coordinates."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((num_prompts, K, WIDTH))
    scores = 2.5 + vectors @ np.array([1.0, -0.7, 0, 0, 0, 0]) + 0.2 * rng.standard_normal((num_prompts, K))
    pool, judgements = [], []
    for i in range(num_prompts):
        for j in range(K):
            text = {"prompt": f"prompt {i}", "response": f"response {j} to {i}" + " word" * ((i + j) % 7)}
            pool.append({**text, "vector": np.round(vectors[i, j], 4).tolist()})
            judgements.append({**text, "score": float(np.round(np.clip(scores[i, j], 0, 5), 3))})
    write_rows(folder / "vectors.jsonl", pool)
    write_rows(folder / "judgements.jsonl", judgements)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_study(folder, *, study="", oracle=None):
    """Write a base config and a study on the made-up pool; return the study's path."""
    Path(folder, "base.toml").write_text(
        f"""
name = "base"
run_dir = "{folder}/base"
sft.enabled = false
device = "cpu"
[policy]
path = "jobs/quickstart/model"
[pool]
path = "jobs/quickstart/prompts.jsonl"
[select]
budget = 8
{oracle or replay(folder)}
"""
    )
    path = Path(folder, "study.toml")
    path.write_text(
        f"""
name = "made-up"
study_dir = "{folder}/study"
base = "{folder}/base.toml"
strategies = ["random", "k_center"]
budgets = [10, 20]
seeds = [0, 1]
num_resamples = 100
resources.timeout_s = 120
vectors.path = "{folder}/vectors.jsonl"
{study}
"""
    )
    return path


def replay(folder):
    return f'[oracle]\ntype = "replay"\npath = "{folder}/judgements.jsonl"'


def replay_comparisons(folder, *, scores=False):
    """An oracle that replays `comparisons.jsonl`, and with it the judgements if there are `scores`."""
    path = f'\npath = "{folder}/judgements.jsonl"' if scores else ""
    return f'[oracle]\ntype = "replay"\ncomparisons_path = "{folder}/comparisons.jsonl"{path}'


def write_comparisons(folder, *, num_pairs=2):
    """Write comparisons.jsonl: disjoint pairs of every prompt's responses; those with nearly equal scores are ties.

    `others` is the same preference, and empty for every fifth prompt.
    """
    judgements = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    rows = []
    for i in range(0, len(judgements), K):
        for j in range(num_pairs):
            first, second = judgements[i + 2 * j], judgements[i + 2 * j + 1]
            gap = first["score"] - second["score"]
            preference = "tie" if abs(gap) < 0.2 else "first" if gap > 0 else "second"
            pair = {"prompt": first["prompt"], "first": first["response"], "second": second["response"]}
            rows.append(pair | {"preference": preference, "others": "" if i % (5 * K) == 0 else preference})
    write_rows(folder / "comparisons.jsonl", rows)


PAIR_STUDY = ("strategies=['random_pairs','delta_ucb']", "baseline=random_pairs", "set.select.batches=2")
PAIR_STUDY = (*PAIR_STUDY, "set.select.first_batch=random_pairs")
"""Overrides by which the made-up study asks for comparisons."""
