"""Stage preferences, from a file: preference pairs D that were judged before, as the policy reads them.

The same stage asks the oracle instead where `preferences.source` says so (`rayrl.stages.labelling.comparisons`).
"""

import math
import time
from collections import Counter
from collections.abc import Iterator

from rayrl.config import PreferenceDataConfig
from rayrl.data.blocks import BlockTable, write_blocks
from rayrl.data.pairs import PairCounts, read_pairs
from rayrl.data.tokenizing import context_length, encode_prompt, encode_response, load_tokenizer, renderer_of
from rayrl.errors import DataError
from rayrl.records import PreferencePair
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import PairFileCounts, PreferencesMetrics
from rayrl.runs.stage_table import PREFERENCES
from rayrl.stages.artifacts import Preferences


def read_preferences(run: Run) -> Preferences:
    """Read D from the file `preferences.data`. Costs no budget.

    Raises:
        DataError: no usable pair; the message counts what became of the rows.
    """
    config = run.config.preferences
    assert config is not None and config.data is not None, "the config is refused without a file"
    key = run.key(PREFERENCES, config, run.config.policy, run.config.generate.block_size)
    done = run.finished(PREFERENCES, key) or _read(run, config.data, key)
    table = BlockTable(run.folder(PREFERENCES, "table"), done.metrics.num_blocks)
    return Preferences(key=key, table=table, num_pairs=done.metrics.num_pairs)


def _read(run: Run, data: PreferenceDataConfig, key: str) -> Manifest[PreferencesMetrics]:
    started = time.monotonic()
    rows = PairCounts()
    cut = Counter(num_truncated=0, num_too_long=0, num_same_when_cut=0)
    pairs = _tokenised_pairs(run, data, rows, cut)
    url = run.folder(PREFERENCES, "table")
    table, num_pairs = write_blocks(url, pairs, PreferencePair, run.config.generate.block_size)
    bad_rows = f", {rows.bad_rows.num} bad (the first: {rows.bad_rows.first})" if rows.bad_rows.num else ""
    dropped = (
        f"{rows.num_unusable} rows without a prompt or two answers, {rows.num_tied} tied, "
        f"{rows.num_other_prompt} with two prompts{bad_rows}; {cut['num_too_long']} pairs too long for the context, "
        f"{cut['num_same_when_cut']} the same up to it"
    )
    if num_pairs == 0:
        raise DataError(
            f"preferences.data.path {data.path} leaves no pair: {rows.num_rows} rows read, {dropped}; name a "
            "file with two different answers to prompts that are shorter than the context"
        )
    counts = PairFileCounts(
        num_prompts=len(rows.prompt_ids),
        num_rows=rows.num_rows,
        num_unusable=rows.num_unusable,
        num_tied=rows.num_tied,
        num_other_prompt=rows.num_other_prompt,
        num_bad=rows.bad_rows.num,
        **cut,
    )
    return run.finish(
        PREFERENCES,
        key,
        since=started,
        num_rows=num_pairs,
        metrics=PreferencesMetrics(num_pairs=num_pairs, num_blocks=table.num_blocks, file=counts),
        summary=f"{num_pairs} pairs of {counts.num_prompts} prompts; dropped {dropped}",
    )


def _tokenised_pairs(
    run: Run, data: PreferenceDataConfig, rows: PairCounts, cut: Counter[str]
) -> Iterator[PreferencePair]:
    """Yield pairs with their answers cut to the context, without those that the policy then cannot tell apart."""
    policy = run.config.policy
    tokenizer, limit = load_tokenizer(policy), context_length(policy)
    renderer = renderer_of(tokenizer, policy)
    for prompt, chosen, rejected in read_pairs(data, renderer, rows):
        prompt_ids = encode_prompt(tokenizer, prompt.rendered, policy.prompt_format)
        room = limit - len(prompt_ids)
        if room < 1:
            cut["num_too_long"] += 1
            continue
        whole_chosen, whole_rejected = (
            encode_response(tokenizer, answer.text, policy.prompt_format) for answer in (chosen, rejected)
        )
        chosen_ids, rejected_ids = whole_chosen[:room], whole_rejected[:room]
        if chosen_ids == rejected_ids:
            cut["num_same_when_cut"] += 1
            continue
        if max(len(whole_chosen), len(whole_rejected)) > room:
            cut["num_truncated"] += 1
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
            # Only the preference is known, and M1 did not write these answers.
            chosen_score=math.nan,
            rejected_score=math.nan,
            chosen_reference_logprob=math.nan,
            rejected_reference_logprob=math.nan,
            source="data",
        )
