"""DPO training against TRL: non-padding tokens per second of the optimizer steps, start-up excluded.

    python jobs/bench/dpo.py                       # the quickstart's model, and a random one with 32,000 tokens
    python jobs/bench/dpo.py --trl-micro-batch 8   # TRL accumulating over micro-batches of 8 pairs

Same model, pairs, optimizer batch, learning rate, clipping and threads, one process; reference log-probabilities are
columns of the data on both sides. TRL runs with its own defaults except gradient checkpointing and bf16, both off.
Rounds alternate; a round is one pass over the pairs without its first step. The texts are the model's own samples, cut
to log-normal lengths, as responses have.
"""

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from dpo_trl import QUICKSTART, Round, Theirs
from hardware import hardware
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rayrl.algorithms.batching import allocated_tokens
from rayrl.config import DpoConfig
from rayrl.models.packing import is_packed
from rayrl.models.policy import TokenLogprobs, load_policy
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training.dpo import IDLE_PAIR, PairBatch, collated, pair_batch, pair_losses

RANDOM_VOCAB = 32_000
LONGEST_PROMPT, LONGEST_RESPONSE = 60, 240  # tokens


def random_model(folder: str) -> str:
    """Save a random 8M Llama with a real vocabulary; as in small instruct models, its head costs most."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=RANDOM_VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(path: str) -> Any:
    """Load the model of a folder in float32."""
    return load_policy(Checkpoint(path=path, version=path), torch.float32)


def make_pairs(num_pairs: int, path: str) -> list[Any]:
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
        IDLE_PAIR
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
    """rayrl's step, without Ray around it."""

    def __init__(self, path: str, pairs: list[Any], batch_size: int, micro_batch_tokens: int):
        self.pairs = pairs
        self.config = DpoConfig(
            learning_rate=1e-5, batch_size=batch_size, micro_batch_tokens=micro_batch_tokens, schedule="constant"
        )
        policy = load(path)
        self.packed = is_packed(policy)
        self.engine = zero.start(TokenLogprobs(policy), self.config, torch.float32, 1000)
        self.engine.train()
        self.idle = pair_batch([IDLE_PAIR])

    def loss(self, batch: PairBatch) -> Tensor:
        return pair_losses(self.engine, batch, self.config)[0].sum()

    def round(self) -> Round:
        started, num_tokens, num_padded = 0.0, 0, 0
        size = self.config.batch_size
        for start in range(0, len(self.pairs), size):
            rows = self.pairs[start : start + size]
            batches = collated(rows, self.config.micro_batch_tokens, self.packed)
            zero.train_step(self.engine, batches, self.loss, size, self.idle)
            if start == 0:
                started = time.perf_counter()
                continue
            num_tokens += sum(batch.tokens.num_tokens for batch in batches)
            num_padded += sum(allocated_tokens(batch.tokens.lengths, is_packed=self.packed) for batch in batches)
        return time.perf_counter() - started, num_tokens, num_padded


def table_row(name: str, path: str, arguments: argparse.Namespace) -> str:
    pairs = make_pairs(arguments.num_pairs, path)
    theirs = Theirs(path, pairs, arguments.batch_size, arguments.trl_micro_batch or arguments.batch_size)
    if not dist.is_initialized():  # after TRL has taken note that it is alone
        rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    ours = Ours(path, pairs, arguments.batch_size, arguments.micro_batch_tokens)
    rounds = []
    for _ in range(arguments.repeats + 1):
        torch.set_flush_denormal(True)  # as our engine does at its start
        one = ours.round()
        torch.set_flush_denormal(arguments.trl_flush_denormal)
        rounds.append((one, theirs.round()))
    rounds = rounds[1:]
    speeds = [(a[1] / a[0], b[1] / b[0]) for a, b in rounds]
    ratio = statistics.median(a / b for a, b in speeds)
    (_, tokens, padded), (_, their_tokens, their_padded) = rounds[-1]
    medians = [statistics.median(side) for side in zip(*speeds, strict=True)]
    every = " ".join(f"{a / b:.2f}" for a, b in speeds)
    return (
        f"| {name} | {medians[0]:.0f} | {medians[1]:.0f} | {ratio:.2f} | {every} "
        f"| {1 - tokens / padded:.2f} | {1 - their_tokens / their_padded:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=DpoConfig().micro_batch_tokens)
    parser.add_argument("--trl-micro-batch", type=int, default=None, help="pairs; default: the whole batch at once")
    parser.add_argument(
        "--trl-flush-denormal", action="store_true", help="give TRL our engine's floating-point mode too"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=("quickstart", "random"), default=["quickstart", "random"])
    arguments = parser.parse_args()
    machine = hardware()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # else accelerate takes all cores
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            path, vocab_size = (QUICKSTART, 768) if name == "quickstart" else (random_model(folder), RANDOM_VOCAB)
            rows.append(table_row(f"{name}, {vocab_size} tokens", path, arguments))
    shape = f"batches of {arguments.batch_size} pairs, rayrl's micro-batches of {arguments.micro_batch_tokens} tokens"
    print(f"\n{machine}; {shape}, {arguments.threads} thread, median of {arguments.repeats}\n")
    print("| model | rayrl, tokens/s | TRL, tokens/s | ratio | each round | padding, rayrl | padding, TRL |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
