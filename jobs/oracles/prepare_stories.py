"""Turn a file of stories into prompts (first sentences) and seed rows (a prompt, what follows).

    python -m jobs.oracles.prepare_stories ../shared/data/tinystories_train.jsonl.gz stories

Writes `prompts.jsonl` and `seed.jsonl` into the folder. Prompts are unique: where two stories begin with the same
sentence, the prompt of the later one is a sentence longer.
"""

import argparse
import gzip
import json
import re
from pathlib import Path

SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=["A-Z])|\n+')
WORDS_PER_TOKEN = 0.4  # stories260K's 512 tokens cut words small


def sentences(story: str) -> list[str]:
    return [part.strip() for part in SENTENCE_END.split(story) if part.strip()]


def cut(parts: list[str], num_words: int) -> str:
    """Join as many whole sentences as fit into `num_words` words, and at least one."""
    kept: list[str] = []
    for part in parts:
        if kept and len(" ".join([*kept, part]).split()) > num_words:
            break
        kept.append(part)
    return " ".join(kept)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a file of stories into prompts and seed rows.")
    parser.add_argument("stories", type=Path, help="JSONL, gzip'd, with a text column")
    parser.add_argument("folder", type=Path, help="where prompts.jsonl and seed.jsonl go")
    parser.add_argument("--column", default="text")
    parser.add_argument("--max-tokens", type=int, default=120, help="about how long a seed response may be")
    options = parser.parse_args()
    with gzip.open(options.stories, "rt") as lines:
        stories = [sentences(json.loads(line)[options.column]) for line in lines]
    num_words = int(options.max_tokens * WORDS_PER_TOKEN)
    rows: dict[str, str] = {}
    for story in stories:
        size = next((size for size in range(1, len(story)) if " ".join(story[:size]) not in rows), None)
        if size is not None:
            rows[" ".join(story[:size])] = cut(story[size:], num_words)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_rows(options.folder / "prompts.jsonl", [{"prompt": prompt} for prompt in rows])
    seed = [{"prompt": prompt, "response": response} for prompt, response in rows.items()]
    write_rows(options.folder / "seed.jsonl", seed)


if __name__ == "__main__":
    main()
