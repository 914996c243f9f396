"""Data of the papers' configs, from the files that their authors publish.

    hf download timdettmers/openassistant-guanaco --repo-type dataset --local-dir guanaco
    python -m jobs.prepare_papers guanaco guanaco/*train*.jsonl guanaco/seed.jsonl        # for llama_8gpu.toml

    hf download tatsu-lab/alpaca_farm --repo-type dataset --local-dir farm
    python -m jobs.prepare_papers prompts farm/alpaca_instructions/unlabeled.json alpacafarm/unlabeled.jsonl
    python -m jobs.prepare_papers seed farm/alpaca_instructions/sft.json alpacafarm/sft.jsonl
    python -m jobs.prepare_papers pairs farm/alpaca_human_preference.json alpacafarm/preference.jsonl
    hf download tatsu-lab/alpaca_eval --repo-type dataset --local-dir eval
    python -m jobs.prepare_papers seed eval/alpaca_eval.json alpacafarm/text_davinci_003.jsonl

The names of the downloaded files are from memory, and were not looked up: give those that you find. AlpacaFarm's rows
are instructions with an input that may be empty, and are written in its prompt format.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TURN = re.compile(r"### (Human|Assistant):")
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
Row = dict[str, Any]


def guanaco_row(row: Row) -> Row | None:
    """Split "### Human: ... ### Assistant: ..." into its first prompt and response; None without both."""
    _, *parts = TURN.split(row["text"])
    turns = [(parts[i], parts[i + 1].strip()) for i in range(0, len(parts) - 1, 2)]
    if len(turns) < 2 or [role for role, _ in turns[:2]] != ["Human", "Assistant"] or not all(t for _, t in turns[:2]):
        return None
    return {"prompt": turns[0][1], "response": turns[1][1]}


def prompt_row(row: Row) -> Row:
    """Write an instruction and its input as AlpacaFarm's prompt."""
    template = WITH_INPUT if row.get("input") else WITHOUT_INPUT
    return {"prompt": template.format(instruction=row["instruction"], input=row.get("input", ""))}


def seed_row(row: Row) -> Row:
    """Write an instruction and its output."""
    return prompt_row(row) | {"response": row["output"]}


def pair_row(row: Row) -> Row | None:
    """Write a preference between two outputs, 1 or 2, as a pair; None for any other preference."""
    if row["preference"] not in (1, 2):
        return None
    chosen, rejected = (row["output_1"], row["output_2"])[:: 1 if row["preference"] == 1 else -1]
    return prompt_row(row) | {"chosen": chosen, "rejected": rejected}


KINDS: dict[str, Callable[[Row], Row | None]] = {
    "guanaco": guanaco_row,
    "prompts": prompt_row,
    "seed": seed_row,
    "pairs": pair_row,
}


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON list, or of a file with one JSON object per line."""
    text = path.read_text()
    yield from json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())


def prepare(kind: str, source: Path, target: Path) -> tuple[int, int]:
    """Write the rows of a file in the columns that a config reads; return how many were written, and left out."""
    rows = [KINDS[kind](row) for row in read(source)]
    written = [row for row in rows if row is not None]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in written))
    return len(written), len(rows) - len(written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    try:
        num_written, num_left_out = prepare(arguments.kind, arguments.source, arguments.target)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {arguments.source} must hold rows of the kind {arguments.kind}: {error!r}")
    print(f"{arguments.target}: {num_written} rows, {num_left_out} left out")


if __name__ == "__main__":
    main()
