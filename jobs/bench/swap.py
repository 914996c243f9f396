"""Weight swaps of a running generation replica: their error, their cost beside a restart, and that of their check.

    python jobs/bench/swap.py --swaps 8
    python jobs/bench/swap.py --swaps 200 --dtype bfloat16
    python jobs/bench/swap.py --swaps 4 --dtype bfloat16 --policy FOLDER

The replica swaps between the policy and the same policy with noise on its weights. After each swap it reads the
log-probability of the last 100 tokens of a 300-token prompt (cached under the old weights, longer than a KV block),
which is compared with what transformers computes from the same weights. The check of a swap is measured beside it: the
sums on the trainer's side, and those that the engine gives when it is asked. In a CPU engine the sums of linear layers
are taken while it loads, and are a part of the swap's own time.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from hardware import hardware

from rayrl.config import EngineConfig
from rayrl.data.collate import collate
from rayrl.engines.generator import Generator
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.engines.weight_folder import RECORD_FILE, WeightRecord
from rayrl.engines.weight_sums import Sums, grouped, named_sums
from rayrl.fleets.fleet import start_fleet
from rayrl.models.policy import load_policy, response_logprobs
from rayrl.records import Checkpoint

NUM_READ = 100
NUM_TOKENS = 300


class MeasuredGenerator(Generator):
    """Generation replica that also tells how long its engine takes to give the sums of its weights."""

    async def time_sums(self) -> float:
        """Return the seconds."""
        started = time.monotonic()
        await self._served_sums()
        return time.monotonic() - started


def noisy_copy(policy: str, folder: Path, dtype: torch.dtype) -> Any:
    """Save the policy with noise on its weights to `folder`, with the record of its sums, and return it."""
    model = load_policy(Checkpoint(path=policy, version="original"), dtype).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for tokenizer_file in Path(policy).glob("tokenizer*"):
        shutil.copy(tokenizer_file, folder)
    record = WeightRecord(dtype=str(dtype).removeprefix("torch."), sums=model_sums(model), text=None)
    (folder / RECORD_FILE).write_text(json.dumps(record))
    return model


def model_sums(model: Any) -> Sums:
    """Return the sums that a trainer with this model in memory records."""
    return grouped(named_sums(dict(model.named_parameters(remove_duplicate=False))))


def trainer_logprob(model: Any, prompt: list[int]) -> float:
    """Return the summed log-probability of the prompt's last tokens by transformers, in nats."""
    with torch.no_grad():
        return response_logprobs(model, collate([prompt[:-NUM_READ]], [prompt[-NUM_READ:]])).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="jobs/quickstart/model")
    parser.add_argument("--swaps", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    machine = hardware()
    torch.set_num_threads(1)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    path = str(Path(arguments.policy).absolute())
    ray.init(include_dashboard=False, log_to_driver=False)
    original = Checkpoint(path=path, version="original")
    spec = EngineSpec(
        checkpoint=original,
        config=EngineConfig(),
        dtype=arguments.dtype,
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=False,
    )
    fleet = start_fleet("bench", MeasuredGenerator, spec)
    with tempfile.TemporaryDirectory() as folder:
        noisy = Checkpoint(path=folder, version="noisy")
        models = {"noisy": noisy_copy(path, Path(folder), dtype), "original": load_policy(original, dtype).eval()}
        vocabulary = models["original"].config.get_text_config().vocab_size
        prompt = torch.randint(vocabulary, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        expected = {version: trainer_logprob(model, prompt) for version, model in models.items()}
        (status,) = fleet.wait_ready()
        differences = []
        for i in range(arguments.swaps + 1):  # the first one is no swap: it fills the prefix cache
            checkpoint = noisy if i % 2 else original
            (answer,) = fleet.call("logprobs", checkpoint, [prompt[:-NUM_READ]], [prompt[-NUM_READ:]])
            differences.append(abs(answer - expected[checkpoint.version]))
        (after,) = fleet.wait_ready()
        engine_sums_s = statistics.median(ray.get(fleet.replicas[0].time_sums.remote()) for _ in range(3))
        trainer_sums_s: list[float] = []
        for _ in range(3):
            started = time.monotonic()
            model_sums(models["noisy"])
            trainer_sums_s.append(time.monotonic() - started)
    fleet.stop()
    swaps_s = after["swaps_s"]
    assert after["pid"] == status["pid"], "an honest swap stopped the replica"
    num_weights = sum(parameter.numel() for parameter in models["original"].parameters())
    print(f"\n{machine}; {arguments.policy}, {num_weights / 1e6:.1f}M weights, {arguments.dtype}\n")
    print(f"The two models' answers are {abs(expected['noisy'] - expected['original']):.2f} nats apart.\n")
    print("| honest swaps | replica stopped | largest difference to trainer, nats | swap, median s | worst s |", end="")
    print(" sums in the trainer, s | in the engine, s | engine start, s |")
    print("|---|---|---|---|---|---|---|---|")
    sums_s = f"{statistics.median(trainer_sums_s):.4f} | {engine_sums_s:.4f}"
    print(
        f"| {len(swaps_s)} | 0 times | {max(differences[1:]):.1e} | {statistics.median(swaps_s):.3f} "
        f"| {max(swaps_s):.3f} | {sums_s} | {status['start_s']:.1f} |"
    )


if __name__ == "__main__":
    main()
