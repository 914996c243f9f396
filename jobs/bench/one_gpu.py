"""Checks on one GPU, without vLLM, in about ten minutes; one table at the end, and exit code 1 if a check failed.

    python -m jobs.bench.one_gpu                  # make test-gpu
    python -m jobs.bench.one_gpu --device cpu     # the same checks on a small model, for a machine without a GPU

Every trainer at ZeRO 0 to 3 in bfloat16 takes steps that lower its loss, and goes on from a checkpoint as if it had not
stopped. The optimizer on the GPU and the one in the node's memory agree; a DPO step is TRL's; the estimate of memory
(`rayrl.preflight.memory`) is compared with measured peaks; exact k-center picks what a plain loop on the device picks.
Each check is a process of its own. Engines and several GPUs are tested by tests/gpu (`make test-gpu-cluster`).
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jobs.bench.hardware import hardware

TRAINERS = ("sft", "dpo", "reward_model", "scalar", "ppo")
TIMEOUT_S = 300.0
DONE = "DONE "
NUM_STEPS = 3
LEARNING_RATE = 1e-3


def sizes(device: str) -> dict[str, int]:
    """Sizes of the random model that is trained."""
    return (
        {"hidden": 1024, "layers": 8, "vocab": 32_000}
        if device == "cuda"
        else {"hidden": 128, "layers": 2, "vocab": 768}
    )


def random_model(folder: str, device: str) -> str:
    """Save a random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = sizes(device)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab"], hidden_size=size["hidden"], intermediate_size=3 * size["hidden"],
        num_hidden_layers=size["layers"], num_attention_heads=size["hidden"] // 64, tie_word_embeddings=True,
        dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start_process_group(device: str) -> None:
    """Make this process the only rank of a training."""
    import torch.distributed as dist

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=rendezvous, rank=0, world_size=1)


def trainer_setup(trainer: str, device: str, training: Any, dtype: Any) -> tuple[Any, Any, Callable[[Any], Any], int]:
    """Build a trainer as its loop does: the engine, one micro-batch, its summed loss, and the loss's denominator."""
    import torch

    from rayrl.algorithms.preference import bradley_terry_loss
    from rayrl.config import DpoConfig, PpoConfig
    from rayrl.data.collate import collate, sequence_batch
    from rayrl.models.actor_critic import ActorCritic
    from rayrl.models.policy import TokenLogprobs, load_policy
    from rayrl.records import Checkpoint
    from rayrl.training import deepspeed_engine as zero
    from rayrl.training.dpo import IDLE_PAIR, pair_batch, pair_losses
    from rayrl.training.ppo import token_losses
    from rayrl.training.reward_model import new_reward_model
    from rayrl.training.rollout import TokenTargets

    folder = random_model(tempfile.mkdtemp(), device)
    start = Checkpoint(path=folder, version="random")
    torch.manual_seed(0)
    with zero.sharded_loading(training, dtype):
        if trainer in ("reward_model", "scalar"):
            network: Any = new_reward_model(start, "last", dtype, lora=None, trust_remote_code=False)
        elif trainer == "ppo":
            network = ActorCritic(load_policy(start, dtype), load_policy(start, dtype))
        else:
            network = TokenLogprobs(load_policy(start, dtype))
        engine = zero.start(network, training, dtype, 100)
    engine.train()
    draw = torch.Generator().manual_seed(0)
    num_rows, vocab = 4, sizes(device)["vocab"]

    def tokens(num: int) -> list[int]:
        return torch.randint(1, vocab, (num,), generator=draw).tolist()

    prompts, responses = [tokens(16) for _ in range(num_rows)], [tokens(48) for _ in range(num_rows)]
    batch: Any = collate(prompts, responses).to(engine.device)
    sequences: Any = sequence_batch([prompts[i] + responses[i] for i in range(num_rows)]).to(engine.device)
    scores = torch.arange(num_rows, dtype=torch.float32, device=engine.device)
    match trainer:
        case "sft":
            return engine, batch, lambda batch: -engine(batch).sum(), 48 * num_rows
        case "dpo":
            pairs = [
                IDLE_PAIR
                | {"prompt_token_ids": prompts[i], "chosen_token_ids": tokens(48), "rejected_token_ids": tokens(48)}
                for i in range(num_rows)
            ]
            pair: Any = pair_batch(pairs).to(engine.device)  # type: ignore[arg-type]
            with torch.no_grad():
                chosen, rejected = engine(pair.tokens).sum(-1).chunk(2)
            pair.reference_chosen.copy_(chosen)
            pair.reference_rejected.copy_(rejected)
            return engine, pair, lambda batch: pair_losses(engine, batch, DpoConfig())[0].sum(), num_rows
        case "reward_model":

            def preference(batch: Any) -> Any:
                return bradley_terry_loss(*engine(batch).chunk(2)).sum()

            return engine, sequences, preference, num_rows // 2
        case "scalar":

            def squared(batch: Any) -> Any:
                return (engine(batch) - scores).square().sum()

            return engine, sequences, squared, num_rows
        case _:
            targets = TokenTargets.zeros(num_rows, 48)
            with torch.no_grad():
                now = engine(batch)
            targets.logprobs.copy_(now.logprobs)
            targets.importance.fill_(1.0)
            assert targets.returns is not None
            targets.returns.fill_(1.0)
            targets.advantages.fill_(0.0)
            return engine, (batch, targets), lambda both: token_losses(engine, both, PpoConfig())[0], 48 * num_rows


def check_trainer(trainer: str, stage: int, device: str) -> str:
    """Train a few steps, save, go on, load, and go on again: the loss falls, and both ways go on alike."""
    import torch

    from rayrl.config import TrainingConfig
    from rayrl.training import deepspeed_engine as zero

    start_process_group(device)
    training = TrainingConfig(zero_stage=stage, learning_rate=LEARNING_RATE, warmup_ratio=0.0)  # type: ignore[arg-type]
    engine, batch, summed_loss, num = trainer_setup(trainer, device, training, torch.bfloat16)

    def step() -> float:
        return zero.train_step(engine, [batch], summed_loss, num, batch).loss

    losses = [step() for _ in range(NUM_STEPS)]
    assert all(map(math.isfinite, losses)), losses
    with tempfile.TemporaryDirectory() as folder:
        zero.save(engine, folder, {"step": float(NUM_STEPS)})()
        before = [step() for _ in range(2)]
        assert zero.load(engine, folder)["step"] == NUM_STEPS
        after = [step() for _ in range(2)]
    assert before[-1] < losses[0], (losses, before)
    assert after == before or max(abs(a - b) for a, b in zip(after, before, strict=True)) < 1e-2, (before, after)
    return f"loss {losses[0]:.4f} -> {before[-1]:.4f}; after the load {after[-1]:.4f}"


def check_adam(device: str) -> str:
    """Compare the optimizer on the GPU with DeepSpeed's in the node's memory: the same losses."""
    import torch
    import torch.distributed as dist

    from rayrl.config import TrainingConfig
    from rayrl.training import deepspeed_engine as zero

    if device == "cpu":
        return "not on a CPU: there is one optimizer"
    start_process_group(device)
    curves: list[list[float]] = []
    for offload in (False, True):
        training = TrainingConfig(zero_stage=2, cpu_offload=offload, learning_rate=LEARNING_RATE, warmup_ratio=0.0)
        engine, batch, summed_loss, num = trainer_setup("sft", device, training, torch.bfloat16)
        curves.append([zero.train_step(engine, [batch], summed_loss, num, batch).loss for _ in range(NUM_STEPS)])
        dist.barrier()
    worst = max(abs(a - b) for a, b in zip(*curves, strict=True))
    assert worst < 2e-2, curves
    return f"losses differ by {worst:.1e} at most"


def check_memory(device: str) -> str:
    """Compare the estimate with the measured peak: of 3 billion parameters on a GPU, with adapters and whole."""
    from jobs.bench.training_memory import BOUND, Case, estimate, measured

    if device == "cuda":
        import torch

        base = Case(
            hidden_size=3072, num_layers=26, vocab_size=32_000, dtype="bfloat16", device="cuda", num_workers=1,
            micro_batch_tokens=2048, gradient_checkpointing=True, zero_stage=0,
        )  # fmt: skip
        room = 0.9 * torch.cuda.get_device_properties(0).total_memory
    else:
        base, room = Case(hidden_size=640, num_layers=8, zero_stage=0, num_workers=1), math.inf
    found: list[str] = []
    for case in (replace(base, lora=True), base):
        total = sum(estimate(case).values())
        if total > room:
            found.append(f"{total / 2**30:.1f} GiB would not fit")
            continue
        peak = measured(case)
        found.append(f"{total / 2**30:.2f} for {peak / 2**30:.2f} GiB")
        assert abs(total / peak - 1) < BOUND, found
    return "estimated " + ", ".join(found)


def check_trl(device: str) -> str:
    """Take one DPO step in float32 here and in TRL, from the same weights: the same loss afterwards."""
    import torch

    from jobs.bench.trl_trainers import Theirs
    from rayrl.config import DpoConfig
    from rayrl.models.policy import TokenLogprobs, load_policy
    from rayrl.records import Checkpoint
    from rayrl.training import deepspeed_engine as zero
    from rayrl.training.dpo import IDLE_PAIR, pair_batch, pair_losses

    folder = random_model(tempfile.mkdtemp(), device)
    draw = torch.Generator().manual_seed(0)

    def tokens(num: int) -> list[int]:
        return torch.randint(1, 700, (num,), generator=draw).tolist()

    pairs: Any = [
        IDLE_PAIR | {"prompt_token_ids": tokens(16), "chosen_token_ids": tokens(32), "rejected_token_ids": tokens(40)}
        for _ in range(4)
    ]
    theirs = Theirs("dpo", folder, pairs, 4, 4, use_cpu=device == "cpu")
    theirs.round()
    start_process_group(device)
    training = DpoConfig(learning_rate=1e-5, schedule="constant", warmup_ratio=0.0, batch_size=4)
    model = load_policy(Checkpoint(path=folder, version="random"), torch.float32)
    engine: Any = zero.start(TokenLogprobs(model), training, torch.float32, 100)
    engine.train()
    batch = pair_batch(pairs).to(engine.device)

    def loss_of(model: Any) -> float:
        with torch.no_grad():
            return pair_losses(model, batch, training)[0].mean().item()

    before = loss_of(engine)
    zero.train_step(engine, [batch], lambda pairs: pair_losses(engine, pairs, training)[0].sum(), 4, batch)
    their_model: Any = theirs.trainer.model
    ours, trl = loss_of(engine), loss_of(TokenLogprobs(their_model.to(engine.device)))
    assert before - ours > 0 and abs(ours - trl) < 0.05 * (before - ours), (before, ours, trl)
    return f"loss {before:.5f} -> {ours:.5f}, TRL {trl:.5f}"


def check_k_center(device: str) -> str:
    """Compare exact k-center, which computes on CPUs, with a plain farthest-first loop in float64 on the device."""
    import numpy as np
    import torch

    from rayrl.algorithms.selection import CoresetShard, LocalShards, k_center

    num_points, dimension, num_selected = (50_000, 384, 500) if device == "cuda" else (2_000, 64, 100)
    vectors = np.random.default_rng(0).standard_normal((num_points, dimension)).astype(np.float32)
    started = time.monotonic()
    ids = k_center(LocalShards([CoresetShard(np.arange(num_points), vectors)]), num_selected).ids
    ours_s = time.monotonic() - started
    started = time.monotonic()
    points = torch.from_numpy(vectors).to(device, torch.float64)
    picks, nearest = [ids[0]], torch.full((num_points,), math.inf, dtype=torch.float64, device=device)
    while len(picks) < num_selected:
        nearest = torch.minimum(nearest, (points - points[picks[-1]]).square().sum(1))
        picks.append(int(nearest.argmax()))
    assert ids == picks, "the picks differ"
    plain_s = time.monotonic() - started
    return f"{num_selected} of {num_points:,} alike: {ours_s:.1f} s, plain loop on {device} {plain_s:.1f} s"


CHECKS: dict[str, Callable[[str], str]] = {
    **{
        f"{trainer}, ZeRO-{stage}": lambda device, trainer=trainer, stage=stage: check_trainer(trainer, stage, device)
        for trainer in TRAINERS
        for stage in range(4)
    },
    "optimizer on GPU and CPU": check_adam,
    "memory": check_memory,
    "DPO step against TRL": check_trl,
    "k-center": check_k_center,
}


def run_check(name: str, device: str) -> tuple[bool, float, str]:
    """Run a check in a process of its own; return whether it passed, its seconds, and what it found."""
    started = time.monotonic()
    command = [sys.executable, "-m", "jobs.bench.one_gpu", "--device", device, "--check", name]
    environment = os.environ | ({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        return False, TIMEOUT_S, "no end in time"
    lines = [line for line in done.stdout.splitlines() if line.startswith(DONE)]
    seconds = time.monotonic() - started
    if done.returncode == 0 and lines:
        return True, seconds, lines[-1].removeprefix(DONE)
    last = (done.stderr.strip().splitlines() or ["nothing was written"])[-1]
    return False, seconds, last[:200].replace("|", "/")


def device_name(device: str) -> str:
    """Name the hardware and what runs on it."""
    import torch

    gpu = f"{torch.cuda.get_device_name(0)}; " if device == "cuda" else ""
    return f"{gpu}{hardware()}; torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--check", choices=CHECKS, help="run one check in this process")
    parser.add_argument("--only", default="", help="run the checks whose names contain this")
    arguments = parser.parse_args()
    if arguments.check:
        print(DONE + CHECKS[arguments.check](arguments.device))
        return 0
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: there is no GPU here that torch can use; --device cpu runs the same checks small", file=sys.stderr
        )
        return 2
    print(f"{device_name(arguments.device)}\n\n| check | result | seconds | found |\n|---|---|---|---|", flush=True)
    results: list[bool] = []
    for name in CHECKS:
        if arguments.only in name:
            passed, seconds, found = run_check(name, arguments.device)
            results.append(passed)
            print(f"| {name} | {'passed' if passed else 'FAILED'} | {seconds:.0f} | {found} |", flush=True)
    print(f"\n{sum(results)} of {len(results)} passed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
