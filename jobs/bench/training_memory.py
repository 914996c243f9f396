"""Memory of training workers: measured peaks of DPO steps beside the estimate of `rayrl.preflight.memory`.

    python -m jobs.bench.training_memory                        # on CPU: resident memory, two workers over gloo
    python -m jobs.bench.training_memory --device cuda          # one worker: torch's allocated peak

Each row is a fresh random Llama in processes of its own. A step is two micro-batches, so that gradients of the first
exist beside the activations of the second. The peak is that of the second step, without what the process had before the
model; the estimate is without its term for the process. glibc returns freed blocks at once (MALLOC_MMAP_THRESHOLD_),
since it would otherwise keep them resident.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jobs.bench.hardware import hardware

BOUND = 0.15
MIB = 2**20
RESULT = "RESULT "
TERMS = ("weights", "gradients", "optimizer", "buffers", "activations", "logits")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a model, and how it is trained."""

    hidden_size: int
    num_layers: int
    zero_stage: int
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    lora: bool = False
    quantization: Literal["nf4"] | None = None
    """Of the weights under adapters."""
    num_workers: int = 2
    vocab_size: int = 1000
    micro_batch_tokens: int = 512
    device: str = "cpu"


def model_config(case: Case) -> Any:
    """Make the sizes of a Llama: heads of 64, half as many key-value heads, an MLP of three times the width."""
    from transformers import LlamaConfig

    num_heads = case.hidden_size // 64
    return LlamaConfig(
        vocab_size=case.vocab_size, hidden_size=case.hidden_size, intermediate_size=3 * case.hidden_size,
        num_hidden_layers=case.num_layers, num_attention_heads=num_heads, num_key_value_heads=num_heads // 2,
        tie_word_embeddings=False,
    )  # fmt: skip


def estimate(case: Case) -> dict[str, float]:
    """Return the formula's terms for a case, without the process."""
    from rayrl.config import LoraConfig
    from rayrl.preflight.memory import DTYPE_BYTES, Networks, TrainerSettings, trainer_memory
    from rayrl.preflight.model import model_shape

    config = model_config(case).to_dict()
    shape = model_shape(config, None)
    assert shape is not None
    settings = TrainerSettings(
        num_workers=case.num_workers,
        # In bfloat16, gradients are added up in float32, which DeepSpeed has from stage 1 on.
        zero_stage=max(1, case.zero_stage) if case.dtype == "bfloat16" else case.zero_stage,
        cpu_offload=False,
        gradient_checkpointing=case.gradient_checkpointing,
        lora=LoraConfig(quantization=case.quantization) if case.lora else None,
        micro_batch_tokens=case.micro_batch_tokens,
    )
    on_gpu = case.device == "cuda"
    memory = trainer_memory(shape, settings, Networks(), width=DTYPE_BYTES[case.dtype], on_gpu=on_gpu)
    return {name: num_bytes for name, num_bytes in memory.terms.items() if name != "process"}


def measure(case: Case, rank: int, rendezvous: str) -> int:
    """Train two steps as one of the case's workers; return the peak's bytes in the second."""
    # These libraries are part of the process, and not of what a model takes.
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from rayrl.config import DpoConfig, LoraConfig
    from rayrl.models.policy import TokenLogprobs, add_lora
    from rayrl.records import Checkpoint
    from rayrl.training import deepspeed_engine as zero
    from rayrl.training.dpo import IDLE_PAIR, PairBatch, pair_batch, pair_losses

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(case.num_workers), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    backend = "nccl" if case.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=case.num_workers)
    dtype: torch.dtype = getattr(torch, case.dtype)
    training = DpoConfig(
        zero_stage=case.zero_stage,  # type: ignore[arg-type]
        gradient_checkpointing=case.gradient_checkpointing,
        micro_batch_tokens=case.micro_batch_tokens,
        lora=LoraConfig(quantization=case.quantization) if case.lora else None,
    )
    before = resident(case.device)
    torch.manual_seed(0)
    with zero.sharded_loading(training, dtype):
        # As a trainer's: under ZeRO-3 no worker ever has the whole model.
        model: Any = AutoModelForCausalLM.from_config(model_config(case), dtype=dtype)
        if training.lora:
            model = add_lora(model, training.lora, Checkpoint(path="", version="untrained"))
        engine: Any = zero.start(TokenLogprobs(model), training, dtype, 100)
    del model
    engine.train()
    draw = torch.Generator().manual_seed(rank)

    def tokens(num: int) -> list[int]:
        return torch.randint(0, case.vocab_size, (num,), generator=draw).tolist()

    sequence = 128
    rows = [
        IDLE_PAIR | {"prompt_token_ids": tokens(32), "chosen_token_ids": tokens(96), "rejected_token_ids": tokens(96)}
        for _ in range(case.micro_batch_tokens // sequence // 2)
    ]
    batch = pair_batch(rows).to(engine.device)  # type: ignore[arg-type]

    def summed_loss(pairs: PairBatch) -> torch.Tensor:
        return pair_losses(engine, pairs, training)[0].sum()

    for _ in range(2):
        reset_peak(case.device)
        zero.train_step(engine, [batch, batch], summed_loss, 2 * len(rows), batch)
    found = peak(case.device) - before
    dist.destroy_process_group()
    return found


def resident(device: str) -> int:
    """Bytes that this process has now."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def peak(device: str) -> int:
    """Most bytes that this process had since the last `reset_peak`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def reset_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measured(case: Case) -> int:
    """Run all workers of a case as processes; return rank 0's peak.

    Raises:
        RuntimeError: a worker failed, with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
        command = [sys.executable, "-m", "jobs.bench.training_memory", "--case", json.dumps(asdict(case))]
        workers = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--rendezvous", f"{folder}/rendezvous"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for rank in range(case.num_workers)
        ]
        outputs = [worker.communicate()[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        if worker.returncode != 0:
            raise RuntimeError(output[-2000:])
    return int(next(line for line in outputs[0].splitlines() if line.startswith(RESULT)).removeprefix(RESULT))


def row(case: Case) -> tuple[str, float]:
    """Return a case's row of the table, and the estimate's relative error."""
    terms = estimate(case)
    total, found = sum(terms.values()), measured(case)
    error = total / found - 1
    changes = ", checkpointing" * case.gradient_checkpointing + ", LoRA" * case.lora
    changes += "" if case.quantization is None else f", {case.quantization}"
    cells = [
        f"{case.hidden_size} x {case.num_layers}{changes}", case.dtype, str(case.zero_stage),
        *(f"{terms[name] / MIB:.0f}" for name in TERMS),
        f"{total / MIB:.0f}", f"{found / MIB:.0f}", f"{error:+.0%}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |", error


HEADER = (
    "| width x layers | dtype | ZeRO | weights | gradients | optimizer | buffers | activations | logits | estimate "
    "| measured | error |\n" + "|---" * 12 + "|"
)


def cases(device: str) -> list[Case]:
    """List the rows: sizes and ZeRO stages, then bfloat16, checkpointing and adapters."""
    sizes = [(640, 8), (768, 8), (1024, 8)] if device == "cpu" else [(1024, 16), (2048, 16), (3072, 26)]
    base = Case(hidden_size=512, num_layers=8, zero_stage=0, device=device, num_workers=2 if device == "cpu" else 1)
    dtype = "float32" if device == "cpu" else "bfloat16"
    found = [
        replace(base, hidden_size=hidden, num_layers=layers, zero_stage=stage, dtype=dtype)
        for hidden, layers in sizes
        for stage in range(4)
    ]
    found += [replace(base, hidden_size=640, zero_stage=stage, dtype="bfloat16") for stage in range(4)]
    found.append(replace(base, num_layers=16, gradient_checkpointing=True, micro_batch_tokens=2048))
    found.append(replace(base, hidden_size=1024, lora=True))
    found.append(replace(base, hidden_size=1024, lora=True, quantization="nf4"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", help="be one worker of this case")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--rendezvous", default="")
    arguments = parser.parse_args()
    if arguments.case:
        case = Case(**json.loads(arguments.case))
        print(f"{RESULT}{measure(case, arguments.rank, arguments.rendezvous)}")
        return
    print(f"{hardware()}; MiB of one worker beyond its process\n\n{HEADER}", flush=True)
    errors = []
    for case in cases(arguments.device):
        text, error = row(case)
        errors.append(abs(error))
        print(text, flush=True)
    print(f"\nlargest error {max(errors):.0%} (bound {BOUND:.0%}: {'holds' if max(errors) <= BOUND else 'BROKEN'})")


if __name__ == "__main__":
    main()
