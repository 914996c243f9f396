"""Which responses the expert may be asked about: M1's own, or, as the off-policy control, those of the seed data.

Either way the evaluator labels M1's responses, and the policy is trained on those.
"""

import math
import time
from functools import partial

from rayrl.data.blocks import BlockTable
from rayrl.data.reading import read_seed_rows
from rayrl.data.tokenizing import encode_prompt, encode_response, load_tokenizer, render
from rayrl.records import Response, Sampled, to_table
from rayrl.runs.run import Run
from rayrl.stages.generate import Responses


def candidates(run: Run, responses: Responses) -> Responses:
    """The pool of the selection."""
    if run.config.generate.source == "policy":
        return responses
    key = run.key("seed_responses", run.config.seed_data, run.config.policy, run.config.generate.block_size)
    rows = seed_responses(run)
    size = run.config.generate.block_size
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    table = BlockTable(run.folder("seed_responses", "table"), len(blocks))
    num_responses = sum(len(row.responses) for row in rows)
    if run.finished("seed_responses", key) is None:
        started = time.monotonic()
        for number, block in enumerate(blocks):
            table.write(number, to_table(block, Sampled))
        run.finish(
            "seed_responses",
            key,
            since=started,
            num_rows=len(rows),
            metrics={"num_responses": num_responses},
            summary=f"{num_responses} responses of the seed data stand in for M1's",
        )
    return Responses(
        key=key,
        table=table,
        num_prompts=len(rows),
        num_responses=num_responses,
        block_counts=[sum(len(row.responses) for row in block) for block in blocks],
    )


def seed_responses(run: Run) -> list[Sampled]:
    """The seed data, one row per prompt with its distinct responses."""
    config = run.config
    assert config.seed_data is not None, "the config is refused without seed data"
    tokenizer = load_tokenizer(config.policy)
    renderer = partial(render, tokenizer, config.policy.prompt_format)
    grouped: dict[str, Sampled] = {}
    for prompt, text in read_seed_rows(config.seed_data, renderer):
        tokens = encode_prompt(tokenizer, prompt.rendered, config.policy.prompt_format)
        new = Sampled(prompt_id=prompt.id, prompt=prompt.text, prompt_token_ids=tokens, responses=[])
        row = grouped.setdefault(prompt.id, new)
        if all(text != response.text for response in row.responses):
            row.responses.append(
                Response(
                    id=f"seed-{prompt.id}-{len(row.responses)}",
                    text=text,
                    token_ids=encode_response(tokenizer, text),
                    seed=0,
                    policy_version="seed data",
                    logprob=math.nan,  # the policy did not say it, and is not trained on it
                    finish_reason="data",
                )
            )
    return list(grouped.values())
