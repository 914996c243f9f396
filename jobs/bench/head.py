"""Memory of the head: peak bytes per response token of a forward and backward pass, beyond the weights' own.

    python jobs/bench/head.py

Each row is a fresh process with a random Llama of one narrow layer, so that little but the head takes memory: the peak
resident size of the pass over that before it, without the gradients of the weights, by the response tokens. "All
logits" is z_t[y_t] - logsumexp z_t of all logits at once, its gradient by autograd.
"""

import argparse
import json
import random
import resource
import subprocess
import sys

import torch
from hardware import hardware
from transformers import LlamaConfig, LlamaForCausalLM

from rayrl.data.collate import collate
from rayrl.models.policy import response_logprobs

WIDTH = 64
SEQUENCE = 128  # tokens, the first of them a prompt


def one_pass(num_words: int, num_tokens: int, is_whole: bool) -> float:
    """Return the peak of a pass in bytes per response token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=num_words, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=SEQUENCE, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    draw = random.Random(0)
    num_rows = num_tokens // (SEQUENCE - 1)
    rows = [[draw.randrange(num_words) for _ in range(SEQUENCE)] for _ in range(num_rows)]
    response_logprobs(model, collate([[1]], [[2]])).sum().backward()  # gradients and libraries have their memory
    before = resident_bytes()
    if is_whole:
        ids = torch.tensor(rows)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = (logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)).sum()
    else:
        loss = response_logprobs(model, collate([row[:1] for row in rows], [row[1:] for row in rows])).sum()
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - before) / (num_rows * (SEQUENCE - 1))


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="response tokens of the pass")
    parser.add_argument("--only", nargs=3, help="words, tokens and 'whole' or 'chunks': one pass in this process")
    arguments = parser.parse_args()
    if arguments.only:
        words, tokens, way = arguments.only
        print(json.dumps(one_pass(int(words), int(tokens), way == "whole")))
        return
    print(f"\n{hardware()}; peak bytes per response token\n")
    print("| words | response tokens | all logits | in chunks |")
    print("|---|---|---|---|")
    for words in arguments.words:
        for tokens in arguments.tokens:
            peaks: list[float] = []
            for way in ("whole", "chunks"):
                command = [sys.executable, __file__, "--only", str(words), str(tokens), way]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                peaks.append(json.loads(run.stdout.splitlines()[-1]))
            print(f"| {words:,} | {tokens:,} | {peaks[0]:,.0f} | {peaks[1]:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
