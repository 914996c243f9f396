"""Turn a file of prompts with graded candidates into one row per graded response.

    python -m jobs.oracles.prepare_graded bon16_tulu2dpo13b_gpt4_even.jsonl.gz graded.jsonl

Each line of the source has `instruction` and `candidates`, and a candidate `output` and `pref`, 1 + P(it beats the
reference) as a judge graded it (AlpacaEval's annotations). The score is the logit of that probability, cut at 5 on both
sides and moved to the rubric's 0 to 5: 2.5 is as good as the reference. Candidates without a grade are left out.
"""

import argparse
import gzip
import json
import math
from pathlib import Path

LARGEST_LOGIT = 5.0


def score_of(preference: float) -> float:
    """Map 1 + P to the logit of P, from 0 to 5."""
    probability = min(max(preference - 1, 1e-6), 1 - 1e-6)
    logit = math.log(probability / (1 - probability))
    cut = min(max(logit, -LARGEST_LOGIT), LARGEST_LOGIT)
    return round((cut + LARGEST_LOGIT) / 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="JSONL, gzip'd")
    parser.add_argument("target", type=Path, help="JSONL with prompt, response and score")
    options = parser.parse_args()
    num_rows = 0
    options.target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(options.source, "rt") as lines, options.target.open("w") as target:
        for line in lines:
            item = json.loads(line)
            for candidate in item["candidates"]:
                if candidate.get("pref") is None or not candidate["output"].strip():
                    continue
                row = {"prompt": item["instruction"], "response": candidate["output"]}
                target.write(json.dumps(row | {"score": score_of(candidate["pref"])}) + "\n")
                num_rows += 1
    print(f"{options.target}: {num_rows} rows")


if __name__ == "__main__":
    main()
