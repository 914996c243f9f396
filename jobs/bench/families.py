"""Families of policies: the trainer's log-probabilities against vLLM's, in float32, on random little models.

    python -m jobs.bench.families
    python -m jobs.bench.families gemma2 mixtral

For each family a model is loaded as a training loads it, gets adapters, takes two steps of DPO, and is exported merged.
vLLM starts on the export, and swaps to the model from before the steps as a replica does, its sums
compared. The table has the largest difference of a token's log-probability in either state, and how far the steps moved
them. A family passes below 1e-3.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TOLERANCE = 1e-3
TIMEOUT_S = 300
NUM_TOKENS = 100
"""Longer than the sliding windows of the little models."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="all, if none is named")
    parser.add_argument("--here", action="store_true", help="measure in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps({family: measure(family) for family in arguments.families}))
        return
    from tests.tiny_models import FAMILIES

    print("| family | export | after a swap | moved by the steps | |\n|---|---|---|---|---|")
    has_failed = False
    for family in arguments.families or FAMILIES:
        line, passed = row(family)
        has_failed |= not passed
        print(line, flush=True)
    sys.exit(has_failed)


def row(family: str) -> tuple[str, bool]:
    """Measure one family in a process of its own, as each engine needs; return its line, and whether it passes."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.bench.families", "--here", family],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        reason = errors[-1].strip() if errors else f"exit {done.returncode}"
        return f"| {family} | - | - | - | {reason[:200]} |", False
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])[family]
    passed = max(found["export"], found["swapped"]) < TOLERANCE < found["moved"]
    numbers = " | ".join(f"{found[name]:.1e}" for name in ("export", "swapped", "moved"))
    return f"| {family} | {numbers} | {'passes' if passed else 'FAILS'} |", passed


def measure(family: str) -> dict[str, float]:
    """Return the largest differences of a token's log-probability, nats: trainer and vLLM, after a step and before."""
    import torch

    from rayrl.config import DpoConfig, LoraConfig, PolicyConfig
    from rayrl.engines.start import WORKER_EXTENSION
    from rayrl.engines.weight_sums import difference, folder_sums, joined
    from rayrl.errors import WeightSyncError
    from rayrl.models.policy import TokenLogprobs, add_lora, load_policy, turn_off_dropout
    from rayrl.records import Checkpoint
    from rayrl.training.dpo import pair_batch, pair_losses
    from rayrl.training.sync.export import write_weights
    from rayrl.training.sync.gather import FullWeights
    from rayrl.training.sync.model_folder import complete_folder
    from tests.tiny_models import make_tiny_model

    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 700, (length,), generator=generator).tolist()

    with tempfile.TemporaryDirectory() as scratch:
        start, exported = (Path(scratch) / name for name in ("start", "exported"))
        exported.mkdir()
        make_tiny_model(start, family)
        checkpoint = Checkpoint(path=str(start), version="start")
        model = load_policy(checkpoint, torch.float32)
        turn_off_dropout(model)
        text = tokens(NUM_TOKENS)
        before = token_logprobs(model, text)
        policy = add_lora(model, LoraConfig(rank=4, alpha=8), checkpoint)
        pair: Any = {
            **{"chosen_id": "a", "rejected_id": "b", "prompt_token_ids": tokens(10)},
            **{"chosen_token_ids": tokens(20), "rejected_token_ids": tokens(20)},
            **{"chosen_reference_logprob": 0.0, "rejected_reference_logprob": 0.0},
        }
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        for _ in range(2):  # after one step only half of each adapter has moved
            losses, _, _ = pair_losses(TokenLogprobs(policy), pair_batch([pair]), DpoConfig())
            losses.sum().backward()
            optimizer.step()
        after = token_logprobs(policy, text)
        unsharded: Any = SimpleNamespace(zero_optimization_stage=lambda: 0)
        write_weights(FullWeights(unsharded, policy), exported)
        complete_folder(exported, PolicyConfig(path=str(start)))

        from vllm import LLM

        engine = LLM(
            model=str(exported),
            dtype="float32",
            max_model_len=256,
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            disable_log_stats=True,
            worker_extension_cls=WORKER_EXTENSION,
        )
        served_after = served_logprobs(engine, text)
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(start)})
        engine.collective_rpc("pack_tied_heads")
        wrong = difference(joined(engine.collective_rpc("served_weight_sums")), folder_sums(start, "float32"))
        if wrong is not None:
            raise WeightSyncError(f"after the swap, {wrong}")
        served_before = served_logprobs(engine, text)
    return {
        "export": (served_after - after).abs().max().item(),
        "swapped": (served_before - before).abs().max().item(),
        "moved": (after - before).abs().max().item(),
    }


def token_logprobs(model: Any, text: list[int]) -> Any:
    """Return log p of each token after the first, by the trainer, nats."""
    import torch

    from rayrl.data.collate import collate
    from rayrl.models.policy import response_token_logprobs

    with torch.no_grad():
        return response_token_logprobs(model.eval(), collate([text[:1]], [text[1:]]))[0]


def served_logprobs(engine: Any, text: list[int]) -> Any:
    """Return log p of each token after the first, by vLLM, nats."""
    import torch
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": text}], params, use_tqdm=False)
    positions = output.prompt_logprobs[1:]
    return torch.tensor([position[token].logprob for position, token in zip(positions, text[1:], strict=True)])


if __name__ == "__main__":
    main()
