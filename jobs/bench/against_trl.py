"""Trainings against TRL: tokens per second and peak memory of the optimizer steps, start-up excluded.

    python jobs/bench/against_trl.py                       # SFT, reward model and DPO, two models
    python jobs/bench/against_trl.py --trainings dpo --trl-micro-batch 8

Same model, rows, optimizer batch, learning rate, clipping and threads, one process; reference log-probabilities are
columns of the data on both sides. TRL runs with its own defaults except gradient checkpointing and bf16, both off; its
SFT is run padded and without padding. Rounds alternate in one process; a round is one pass over the rows without its
first step. The texts are the model's own samples, cut to log-normal lengths, as responses have.

Peak memory is that of a process of each side's own: the highest resident size of one round over the size before it. It
holds gradients, the optimizer's state, activations and logits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hardware import hardware
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl_trainers import LEARNING_RATE, QUICKSTART, Round, Row, Theirs, load

from rayrl.algorithms.batching import allocated_tokens
from rayrl.config import DpoConfig, TrainingConfig
from rayrl.data.collate import collate
from rayrl.models.packing import is_packed
from rayrl.models.policy import TokenLogprobs
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training import dpo, reward_model, sft

RANDOM_VOCAB = 32_000
LONGEST_PROMPT, LONGEST_RESPONSE = 60, 240  # tokens
SIDES = {"sft": ("rayrl", "TRL", "TRL, padding-free"), "reward_model": ("rayrl", "TRL"), "dpo": ("rayrl", "TRL")}
"""Who runs a training; TRL's padding-free SFT is made for flash attention, and runs on torch's."""


def random_model(folder: str) -> str:
    """Save a random 8M Llama with a real vocabulary; as in small instruct models, its head costs most."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=RANDOM_VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_pairs(num_pairs: int, path: str) -> list[Row]:
    """Make pairs of the model's own samples: prompts of 16 tokens in the median, responses of 48."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)

    def lengths(median: float, spread: float, low: int, high: int) -> list[int]:
        return np.clip(rng.lognormal(np.log(median), spread, num_pairs), low, high).astype(int).tolist()

    first = torch.full((num_pairs, 1), load(path).config.bos_token_id)
    prompts = sample(path, first, LONGEST_PROMPT)
    chosen, rejected = (sample(path, prompts, LONGEST_RESPONSE)[:, prompts.shape[1] :].tolist() for _ in range(2))
    cuts = zip(
        lengths(16, 0.4, 4, LONGEST_PROMPT),
        lengths(48, 0.6, 4, LONGEST_RESPONSE),
        lengths(48, 0.6, 4, LONGEST_RESPONSE),
        strict=True,
    )
    return [
        dpo.IDLE_PAIR
        | {
            "prompt_token_ids": prompts[i, -prompt:].tolist(),
            "chosen_token_ids": chosen[i][:first],
            "rejected_token_ids": rejected[i][:second],
        }
        for i, (prompt, first, second) in enumerate(cuts)
    ]


def sample(path: str, prompts: Tensor, num_tokens: int) -> Tensor:
    """Sample `num_tokens` tokens after each row; no end-of-text token comes earlier."""
    model = load(path)
    return model.generate(
        prompts, do_sample=True, min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0, top_k=0
    )


class Ours:
    """rayrl's steps, without Ray around them."""

    def __init__(self, training: str, path: str, pairs: list[Row], batch_size: int, micro_batch_tokens: int):
        if not dist.is_initialized():
            rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
            dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        settings = {"learning_rate": LEARNING_RATE, "batch_size": batch_size, "schedule": "constant"}
        self.config = TrainingConfig(**settings, micro_batch_tokens=micro_batch_tokens)
        self.rows, self.collated, self.weight, start = PARTS[training](pairs, path)
        model, self.packed, self.idle, losses = start()
        self.engine = zero.start(model, self.config, torch.float32, 1000)
        self.engine.train()
        self.losses: Callable[[Any], Tensor] = lambda batch: losses(self.engine, batch)

    def round(self) -> Round:
        started, num_tokens, num_allocated = 0.0, 0, 0
        size = self.config.batch_size
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            batches = self.collated(rows, self.config.micro_batch_tokens, self.packed)
            zero.train_step(self.engine, batches, self.losses, self.weight(rows), self.idle)
            if start == 0:
                started = time.perf_counter()
                continue
            for batch in batches:
                lengths = getattr(batch, "tokens", batch).lengths
                num_tokens += sum(lengths)
                num_allocated += allocated_tokens(lengths, is_packed=self.packed)
        return Round(time.perf_counter() - started, num_tokens, num_allocated)


def sft_parts(pairs: list[Row], path: str) -> tuple[Any, ...]:
    rows = [
        {"prompt_token_ids": pair["prompt_token_ids"], "response_token_ids": pair["chosen_token_ids"]} for pair in pairs
    ]

    def start() -> tuple[Any, ...]:
        policy = load(path)
        return TokenLogprobs(policy), is_packed(policy), collate([[0]], [[0]]), lambda engine, b: -engine(b).sum()

    return rows, sft.collated, lambda rows: sum(len(row["response_token_ids"]) for row in rows), start


def reward_model_parts(pairs: list[Row], path: str) -> tuple[Any, ...]:
    rows = [
        {f"{side}_token_ids": pair["prompt_token_ids"] + pair[f"{side}_token_ids"] for side in ("chosen", "rejected")}
        for pair in pairs
    ]

    def start() -> tuple[Any, ...]:
        checkpoint = Checkpoint(path=path, version=path)
        model = reward_model.new_reward_model(checkpoint, "last", torch.float32, lora=None, trust_remote_code=False)
        idle = reward_model.pair_batch([reward_model.IDLE_PAIR])
        return (
            model,
            is_packed(model.backbone),
            idle,
            lambda engine, b: reward_model.pair_losses(engine, b).losses.sum(),
        )

    return rows, reward_model.collated, len, start


def dpo_parts(pairs: list[Row], path: str) -> tuple[Any, ...]:
    settings = DpoConfig()

    def start() -> tuple[Any, ...]:
        policy = load(path)
        idle = dpo.pair_batch([dpo.IDLE_PAIR])
        losses = lambda engine, batch: dpo.pair_losses(engine, batch, settings)[0].sum()  # noqa: E731
        return TokenLogprobs(policy), is_packed(policy), idle, losses

    return pairs, dpo.collated, len, start


PARTS: dict[str, Callable[[list[Row], str], tuple[Any, ...]]] = {
    "sft": sft_parts,
    "reward_model": reward_model_parts,
    "dpo": dpo_parts,
}
"""Of each training: rows, their collation in micro-batches, the weight of a batch, and the start of its model."""


def start_side(side: str, training: str, path: str, pairs: list[Row], arguments: argparse.Namespace) -> Any:
    """Start one side's training."""
    if side == "rayrl":
        return Ours(training, path, pairs, arguments.batch_size, arguments.micro_batch_tokens)
    micro_batch = arguments.trl_micro_batch or arguments.batch_size
    padding_free = side == "TRL, padding-free"
    return Theirs(training, path, pairs, arguments.batch_size, micro_batch, padding_free=padding_free)


def timed_rounds(training: str, path: str, pairs: list[Row], arguments: argparse.Namespace) -> dict[str, list[Round]]:
    """Run the rounds of all sides by turns; the first of each is a warm-up and left out."""
    # TRL first: it must take note that it is alone before there is a process group.
    sides = {side: start_side(side, training, path, pairs, arguments) for side in reversed(SIDES[training])}
    rounds: dict[str, list[Round]] = {side: [] for side in SIDES[training]}
    for _ in range(arguments.repeats + 1):
        for side in SIDES[training]:
            # As our engine does at its start.
            torch.set_flush_denormal(side == "rayrl" or arguments.trl_flush_denormal)
            rounds[side].append(sides[side].round())
    return {side: done[1:] for side, done in rounds.items()}


def peak_bytes(side: str, training: str, path: str, pairs: list[Row], arguments: argparse.Namespace) -> int:
    """Return the highest resident size of one round, beyond the size before it."""
    started = start_side(side, training, path, pairs, arguments)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    started.round()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """Read a size of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def in_a_process(what: str, training: str, path: str, pairs_file: str, options: Sequence[str]) -> Any:
    """Run `timed_rounds` ("all"), or the `peak_bytes` of a side, in a process of its own."""
    command = [sys.executable, __file__, *options, "--only", what, training, path, pairs_file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def table_rows(name: str, path: str, arguments: argparse.Namespace, options: Sequence[str]) -> list[str]:
    """Measure all trainings of one model; one row for each of TRL's sides."""
    pairs = make_pairs(arguments.num_pairs, path)
    rows: list[str] = []
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(pairs, file)
        file.flush()
        for training in arguments.trainings:
            done = in_a_process("all", training, path, file.name, options)
            rounds = {side: [Round(*each) for each in rounds] for side, rounds in done.items()}
            peaks = {side: in_a_process(side, training, path, file.name, options) for side in rounds}
            ours = rounds.pop("rayrl")
            for side, theirs in rounds.items():
                ratios = [
                    a.num_tokens / a.seconds * b.seconds / b.num_tokens for a, b in zip(ours, theirs, strict=True)
                ]
                speeds = [statistics.median(r.num_tokens / r.seconds for r in done) for done in (ours, theirs)]
                padding = [1 - done[-1].num_tokens / done[-1].num_allocated for done in (ours, theirs)]
                rows.append(
                    f"| {training} | {name} | {side} | {speeds[0]:,.0f} | {speeds[1]:,.0f} "
                    f"| {statistics.median(ratios):.2f} | {' '.join(f'{ratio:.2f}' for ratio in ratios)} "
                    f"| {padding[0]:.0%} | {padding[1]:.0%} "
                    f"| {peaks['rayrl'] / 2**20:,.0f} | {peaks[side] / 2**20:,.0f} |"
                )
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=DpoConfig().micro_batch_tokens)
    parser.add_argument("--trl-micro-batch", type=int, default=None, help="rows; default: the whole batch at once")
    parser.add_argument(
        "--trl-flush-denormal", action="store_true", help="give TRL our engine's floating-point mode too"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=("quickstart", "random"), default=["quickstart", "random"])
    parser.add_argument("--trainings", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    machine = hardware()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # else accelerate takes all cores
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        what, training, path, pairs_file = arguments.only
        pairs = json.loads(Path(pairs_file).read_text())
        found = (
            timed_rounds(training, path, pairs, arguments)
            if what == "all"
            else peak_bytes(what, training, path, pairs, arguments)
        )
        print(json.dumps(found))
        return
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            path, vocab_size = (QUICKSTART, 768) if name == "quickstart" else (random_model(folder), RANDOM_VOCAB)
            rows += table_rows(f"{name}, {vocab_size:,} words", path, arguments, sys.argv[1:])
    shape = f"batches of {arguments.batch_size} rows, rayrl's micro-batches of {arguments.micro_batch_tokens} tokens"
    print(f"\n{machine}; {shape}, {arguments.threads} thread, median of {arguments.repeats}; MiB above the start\n")
    print(
        "| training | model | against | rayrl, tokens/s | TRL, tokens/s | ratio | each round | padding, rayrl "
        "| padding, TRL | peak, rayrl | peak, TRL |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
