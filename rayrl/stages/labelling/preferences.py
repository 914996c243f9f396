"""Stage preferences: D, the pairs a reward model learns from. Judged by somebody before, or by the expert now."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

from ray.actor import ActorHandle

from rayrl.config import PreferenceDataConfig
from rayrl.data.blocks import BlockTable, write_blocks
from rayrl.data.pairs import PairCounts, read_pairs
from rayrl.data.tokenizing import context_length, encode_prompt, encode_response, load_tokenizer, render
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import load_rubric
from rayrl.models.pairwise_prompt import pairwise_version
from rayrl.records import Checkpoint, PreferencePair
from rayrl.runs.run import Manifest, Run
from rayrl.stages.artifacts import Pool, Preferences
from rayrl.stages.labelling.comparisons import compare_responses
from rayrl.stages.sampling.generate import generate


def gather_preferences(
    run: Run,
    services: Services,
    oracle: ActorHandle,
    policy: Checkpoint,
    pool: Pool,
    earlier: Preferences | None = None,
) -> Preferences:
    """D: from the file `preferences.data`, or the expert's comparisons of a policy's responses (costs budget).

    Args:
        run: the run.
        services: fleets.
        oracle: compares.
        policy: whose responses are compared: M1, and in a later round the last policy.
        pool: the prompts.
        earlier: D of the rounds before, if the expert compares: D is the union.

    Raises:
        DataError: no usable pair; says what became of the rows, or of the questions.
    """
    config = run.config.preferences
    assert config is not None, "the config is refused without preferences"
    if config.source == "oracle":
        responses = generate(run, services, policy, pool)
        inputs = [responses.key] + ([earlier.key] if earlier else [])
        asked = pairwise_version(load_rubric(run.config.rubric))
        key = run.key("preferences", config, run.config.select, run.config.oracle, asked, *inputs)
        done = run.finished("preferences", key)
        done = done or compare_responses(run, services, oracle, policy, responses, key, earlier)
        compared = (*(earlier.compared if earlier else ()), BlockTable(run.folder("preferences", "comparisons"), 1))
    else:
        compared = ()
        assert config.data is not None, "the config is refused without a file"
        key = run.key("preferences", config, run.config.policy, run.config.generate.block_size)
        done = run.finished("preferences", key) or _read(run, config.data, key)
    table = BlockTable(run.folder("preferences", "table"), done.metrics["num_blocks"])
    return Preferences(key=key, table=table, num_pairs=done.num_rows, compared=compared)


def _read(run: Run, data: PreferenceDataConfig, key: str) -> Manifest:
    started = time.monotonic()
    counts, cut = PairCounts(), Counter(num_truncated=0, num_too_long=0, num_same_when_cut=0)
    pairs = _tokenised(run, data, counts, cut)
    table, num_pairs = write_blocks(
        run.folder("preferences", "table"), pairs, PreferencePair, run.config.generate.block_size
    )
    dropped = (
        f"{counts.num_unusable} rows without a prompt or two answers, {counts.num_tied} tied, "
        f"{counts.num_other_prompt} with two prompts; {cut['num_too_long']} pairs too long for the context, "
        f"{cut['num_same_when_cut']} the same up to it"
    )
    if num_pairs == 0:
        raise DataError(
            f"preferences.data.path {data.path} leaves no pair: {counts.num_rows} rows read, {dropped}; name a "
            "file with two different answers to prompts that are shorter than the context"
        )
    metrics = {
        "source": "data",
        "num_pairs": num_pairs,
        "num_blocks": table.num_blocks,
        "num_prompts": len(counts.prompt_ids),
        "num_rows_read": counts.num_rows,
        "num_unusable": counts.num_unusable,
        "num_tied": counts.num_tied,
        "num_other_prompt": counts.num_other_prompt,
    }
    summary = f"{num_pairs} pairs of {len(counts.prompt_ids)} prompts; dropped {dropped}"
    return run.finish(
        "preferences", key, since=started, num_rows=num_pairs, metrics=metrics | dict(cut), summary=summary
    )


def _tokenised(run: Run, data: PreferenceDataConfig, counts: PairCounts, cut: Counter[str]) -> Iterator[PreferencePair]:
    """Pairs as the policy reads them, answers cut to the context; those that it then cannot tell apart are left out."""
    policy = run.config.policy
    tokenizer, limit = load_tokenizer(policy), context_length(policy)
    for prompt, chosen, rejected in read_pairs(data, partial(render, tokenizer, policy.prompt_format), counts):
        prompt_ids = encode_prompt(tokenizer, prompt.rendered, policy.prompt_format)
        room = limit - len(prompt_ids)
        if room < 1:
            cut["num_too_long"] += 1
            continue
        whole = [encode_response(tokenizer, answer.text) for answer in (chosen, rejected)]
        chosen_ids, rejected_ids = (token_ids[:room] for token_ids in whole)
        if chosen_ids == rejected_ids:
            cut["num_same_when_cut"] += 1
            continue
        cut["num_truncated"] += max(map(len, whole)) > room
        yield PreferencePair(
            prompt_id=prompt.id,
            prompt=prompt.text,
            prompt_token_ids=prompt_ids,
            chosen_id=chosen.id,
            rejected_id=rejected.id,
            chosen=chosen.text,
            rejected=rejected.text,
            chosen_token_ids=chosen_ids,
            rejected_token_ids=rejected_ids,
            chosen_score=math.nan,
            rejected_score=math.nan,
            chosen_reference_logprob=math.nan,  # M1 did not write them
            rejected_reference_logprob=math.nan,
            source="data",
        )
