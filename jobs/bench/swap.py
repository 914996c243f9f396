"""Weight swaps of a running generation replica: their error, and their cost beside a restart.

    python jobs/bench/swap.py --swaps 8

The replica swaps between the policy and the same policy with noise on its weights. After each swap it reads the
log-probability of the last 100 tokens of a 300-token prompt (cached under the old weights, longer than a KV block),
which is compared with what transformers computes from the same weights.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from hardware import hardware

from rayrl.config import EngineConfig
from rayrl.data.collate import collate
from rayrl.engines.generator import Generator
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.fleets.fleet import start_fleet
from rayrl.models.policy import load_policy, response_logprobs
from rayrl.records import Checkpoint
from rayrl.training.sync.export import probe_prompt

NUM_READ = 100


def noisy_copy(policy: str, folder: Path) -> Any:
    """Save the policy with noise on its weights to `folder`, and return it."""
    model = load_policy(Checkpoint(path=policy, version="original"), torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for tokenizer_file in Path(policy).glob("tokenizer*"):
        shutil.copy(tokenizer_file, folder)
    return model


def trainer_logprob(model: Any, prompt: list[int]) -> float:
    """Return the summed log-probability of the prompt's last tokens by transformers, in nats."""
    with torch.no_grad():
        return response_logprobs(model, collate([prompt[:-NUM_READ]], [prompt[-NUM_READ:]])).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="jobs/quickstart/model")
    parser.add_argument("--swaps", type=int, default=8)
    arguments = parser.parse_args()
    machine = hardware()
    torch.set_num_threads(1)
    path = str(Path(arguments.policy).absolute())
    ray.init(include_dashboard=False, log_to_driver=False)
    original = Checkpoint(path=path, version="original")
    spec = EngineSpec(
        checkpoint=original,
        config=EngineConfig(),
        dtype="float32",
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=False,
    )
    fleet = start_fleet("bench", Generator, spec)
    with tempfile.TemporaryDirectory() as folder:
        noisy = Checkpoint(path=folder, version="noisy")
        models = {"noisy": noisy_copy(path, Path(folder)), "original": load_policy(original, torch.float32).eval()}
        prompt = probe_prompt(models["original"].config)
        expected = {version: trainer_logprob(model, prompt) for version, model in models.items()}
        (status,) = fleet.wait_ready()
        differences = []
        for i in range(arguments.swaps + 1):  # the first one is no swap: it fills the prefix cache
            checkpoint = noisy if i % 2 else original
            (answer,) = fleet.call("logprobs", checkpoint, [prompt[:-NUM_READ]], [prompt[-NUM_READ:]])
            differences.append(abs(answer - expected[checkpoint.version]))
        (after,) = fleet.wait_ready()
    fleet.stop()
    swaps_s = after["swaps_s"]
    median = statistics.median(swaps_s)
    print(f"\n{machine}; {arguments.policy}, float32\n")
    print(f"The two models' answers are {abs(expected['noisy'] - expected['original']):.2f} nats apart.\n")
    print("Differences after each swap: " + " ".join(f"{d:.1e}" for d in differences[1:]) + "\n")
    print("| swaps | largest difference to trainer, nats | swap, median s | worst s | engine start, s | start / swap |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {len(swaps_s)} | {max(differences[1:]):.1e} | {median:.3f} | {max(swaps_s):.3f} | {status['start_s']:.1f} "
        f"| {status['start_s'] / median:.0f} |"
    )


if __name__ == "__main__":
    main()
