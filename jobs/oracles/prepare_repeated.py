"""Turn published answers that several experts gave, or one gave several times, into a table that a study reads.

    python -m jobs.oracles.prepare_repeated pandalm pandalm_human.jsonl.gz pandalm.jsonl
    python -m jobs.oracles.prepare_repeated prometheus prometheus_vicuna_gpt4x3.jsonl.gz prometheus.jsonl

pandalm: pairs that three people compared. `preference` is the first person's; `others` is what the two others agree on,
and empty where they do not. Pairs with an empty response are left out.

prometheus: responses that GPT-4 graded three times, from 1 to 5. `score` is the first grade, `others` the mean of the
two others.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

WORDS = ("tie", "first", "second")
"""By PandaLM's number of the better response."""
BEFORE_PROMPT = "###The instruction to evaluate:"
BEFORE_RESPONSE = "###Response to evaluate:"
AFTER_RESPONSE = "###Reference Answer"


def pandalm_row(item: dict[str, Any]) -> dict[str, Any] | None:
    """Make the row of a pair; None if a response is empty."""
    # Some responses are JSON's true and false.
    names = ("instruction", "input", "response1", "response2")
    prompt, context, first, second = (str(item[name]).strip() for name in names)
    if not first or not second:
        return None
    one, two, three = (WORDS[item[f"annotator{number}"]] for number in (1, 2, 3))
    pair = {"prompt": f"{prompt}\n\n{context}".strip(), "first": first, "second": second}
    return pair | {"preference": one, "others": two if two == three else ""}


def prometheus_row(item: dict[str, Any]) -> dict[str, Any]:
    """Make the row of a graded response, which is in a judge prompt together with its question."""
    _, _, asked = item["instruction"].partition(BEFORE_PROMPT)
    prompt, _, answered = asked.partition(BEFORE_RESPONSE)
    response, _, _ = answered.partition(AFTER_RESPONSE)
    first, *others = item["gpt4_score"]
    row = {"prompt": prompt.strip(), "response": response.strip()}
    return row | {"score": first, "others": sum(others) / len(others)}


ROWS = {"pandalm": pandalm_row, "prometheus": prometheus_row}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=ROWS, help="what the source is")
    parser.add_argument("source", type=Path, help="JSONL, gzip'd")
    parser.add_argument("target", type=Path, help="JSONL")
    options = parser.parse_args()
    options.target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(options.source, "rt") as lines, options.target.open("w") as target:
        rows = [row for line in lines if (row := ROWS[options.kind](json.loads(line))) is not None]
        target.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{options.target}: {len(rows)} rows")


if __name__ == "__main__":
    main()
