"""Generation through the fleet against raw vLLM: tokens per second, and whether the answers are equal.

    python jobs/bench/generation.py
    python jobs/bench/generation.py --policy path/to/model --num-prompts 200 --k 4

The fleet's side is what the stage runs: Ray Data over blocks of prompts, a replica's answer, a Parquet part per block.
The raw side is one `vllm.LLM.generate` call with the same tokens, seeds, sampling and engine settings, in the processes
vLLM makes by default. Both engines stay up and one is idle while the other is measured; measurements alternate, after
one warm-up each. It needs two idle cores: the fleet's front end works beside its engine, and neighbours cost it more.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from hardware import hardware

from rayrl.config import EngineConfig, GenerateConfig, PolicyConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.rows import read_rows
from rayrl.data.tokenizing import encode_prompt, load_tokenizer
from rayrl.engines.generator import Generator, Sampling
from rayrl.engines.start import CPU_BATCHED_TOKENS, EngineSpec, environment
from rayrl.fleets.fleet import Fleet, start_fleet
from rayrl.records import Checkpoint, content_id
from rayrl.stages.sampling.generate import response_seed, sample_block, sampling_of

SEED = 0


def write_prompts(arguments: argparse.Namespace, folder: str, block_size: int) -> BlockTable:
    """Write the prompts in blocks, as stage `pool` does."""
    tokenizer = load_tokenizer(PolicyConfig(path=arguments.policy))
    texts = list(dict.fromkeys(str(row.cells["prompt"]) for row in read_rows(arguments.prompts, ["prompt"])))[
        : arguments.num_prompts
    ]
    rows = [{"id": content_id(t), "text": t, "token_ids": encode_prompt(tokenizer, t, "plain")} for t in texts]
    blocks = [rows[start : start + block_size] for start in range(0, len(rows), block_size)]
    table = BlockTable(f"{folder}/prompts", len(blocks))
    for number, block in enumerate(blocks):
        table.write(number, pa.Table.from_pylist(block))
    return table


def through_fleet(prompts: BlockTable, fleet: Fleet, policy: Checkpoint, config: GenerateConfig, folder: str) -> Any:
    """Return the seconds until all parts are on disk, and the token ids by response id."""
    table = BlockTable(folder, prompts.num_blocks)
    compute = partial(sample_block, prompts, fleet, policy, config.k, sampling_of(config), SEED)
    started = time.perf_counter()
    map_blocks(table, compute, concurrency=fleet.concurrency, describe=lambda t: {"n": t.num_rows}, progress="fleet")
    seconds = time.perf_counter() - started
    rows = [row for block in table.blocks() for row in block.to_pylist()]
    return seconds, {response["id"]: response["token_ids"] for row in rows for response in row["responses"]}


def start_raw(policy: str, config: EngineConfig) -> Any:
    """Start the engine that a script without Ray would use, with the replica's settings."""
    variables = environment(config, on_gpu=False)
    variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    os.environ.update(variables, VLLM_CPU_OMP_THREADS_BIND="nobind")
    from vllm import LLM

    return LLM(
        model=policy,
        dtype="float32",
        max_num_seqs=config.max_num_seqs,
        enforce_eager=True,
        kv_cache_memory_bytes=config.kv_cache_mb << 20,
        enable_chunked_prefill=False,
        max_num_batched_tokens=CPU_BATCHED_TOKENS,
        seed=0,
    )


def raw(
    llm: Any, prompts: list[list[int]], seeds: Iterable[int], config: GenerateConfig | Sampling
) -> tuple[float, list[list[int]]]:
    """Return the seconds of one call, drawing the seeds included, and the token ids of one response per seed."""
    from vllm import SamplingParams

    sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}
    started = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(**sampling, stop=list(config.stop), logprobs=0, seed=seed) for seed in seeds],
        use_tqdm=False,
    )
    return time.perf_counter() - started, [list(output.outputs[0].token_ids) for output in outputs]


def through_raw(prompts: BlockTable, llm: Any, config: GenerateConfig) -> Any:
    """Return the seconds of one call, and the token ids by response id."""
    places = [(row, i) for block in prompts.blocks() for row in block.to_pylist() for i in range(config.k)]
    seeds = (response_seed(SEED, row["id"], i) for row, i in places)
    seconds, answers = raw(llm, [row["token_ids"] for row, _ in places], seeds, config)
    return seconds, {f"{row['id']}-{i}": answer for (row, i), answer in zip(places, answers, strict=True)}


def comparison(fleet_s: list[float], raw_s: list[float], num_tokens: int, equal: str) -> tuple[str, float]:
    """Return the table of both sides' rounds, and the median of the rounds' ratios."""
    ratio = statistics.median(b / a for a, b in zip(fleet_s, raw_s, strict=True))
    lines = [
        f"| side | median of {len(raw_s)}, s | every time, s | tokens/s | ratio to raw | rows equal to raw |",
        "|---|---|---|---|---|---|",
    ]
    for name, times, last in (("raw vLLM", raw_s, "1 | |"), ("fleet", fleet_s, f"{ratio:.3f} | {equal} |")):
        every, median = " ".join(f"{t:.1f}" for t in times), statistics.median(times)
        lines.append(f"| {name} | {median:.2f} | {every} | {num_tokens / median:.0f} | {last}")
    return "\n".join(lines), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="jobs/quickstart/model")
    parser.add_argument("--prompts", default="jobs/quickstart/prompts.jsonl")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    machine = hardware()
    policy = Checkpoint(path=str(Path(arguments.policy).absolute()), version="bench")
    engine, config = (
        EngineConfig(),
        GenerateConfig(k=arguments.k, temperature=0.9, top_p=1.0, max_tokens=arguments.max_tokens),
    )
    llm = start_raw(policy.path, engine)
    ray.init(include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    spec = EngineSpec(
        checkpoint=policy, config=engine, dtype="float32", max_model_len=None, trust_remote_code=False, on_gpu=False
    )
    fleet = start_fleet("bench", Generator, spec)
    fleet.wait_ready()
    fleet_s, raw_s, ours, theirs = [], [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_prompts(arguments, folder, config.block_size)
        for repeat in range(arguments.repeats + 1):
            seconds, ours = through_fleet(prompts, fleet, policy, config, f"{folder}/responses-{repeat}")
            fleet_s.append(seconds)
            seconds, theirs = through_raw(prompts, llm, config)
            raw_s.append(seconds)
    fleet.stop()
    tokens = sum(map(len, theirs.values()))
    equal = sum(theirs[name] == token_ids for name, token_ids in ours.items())
    print(f"\n{machine}; {len(theirs)} responses, {tokens} tokens, 1 replica, 1 thread, {arguments.policy}\n")
    print(comparison(fleet_s[1:], raw_s[1:], tokens, f"{equal} of {len(ours)}")[0])


if __name__ == "__main__":
    main()
