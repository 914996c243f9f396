"""Two processes that train together over gloo, without a cluster: every trainer, at every ZeRO stage, in one go.

    python -m tests.training.two_processes FOLDER POLICY COMBINATIONS

COMBINATIONS is a JSON list of `Combination`s. Each is trained for two steps, resumed from the checkpoint of its first
step, and exported both times; FOLDER/results.json then holds, by the combination's name, what the test compares.
"""

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
NUM_ROWS = 8
TIMEOUT_S = 800


class Combination(NamedTuple):
    """One way to train."""

    trainer: str
    zero_stage: int
    lora: bool = False
    dtype: str = "bfloat16"
    settings: dict[str, Any] | None = None
    then: dict[str, Any] | None = None
    """Settings that it is resumed with instead."""

    @property
    def name(self) -> str:
        adapters = "-lora" if self.lora else ""
        others = "".join(f"-set-{name}" for name in self.settings or {})
        then = "".join(f"-then-{name}-{value}" for name, value in (self.then or {}).items())
        return f"{self.trainer}-zero{self.zero_stage}-{self.dtype}{adapters}{others}{then}"


def train_all(folder: Path, policy: str, combinations: list[Combination]) -> dict[str, dict[str, Any]]:
    """Train every combination in a pair of processes, and return the results by the combinations' names."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, "-m", "tests.training.two_processes", str(folder), policy, json.dumps(combinations)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in ("0", "1"):
        environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        with (folder / f"rank{rank}.txt").open("w") as output:
            ranks.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=output, stderr=output))
    try:
        codes = [process.wait(TIMEOUT_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "\n".join((folder / f"rank{rank}.txt").read_text()[-3000:] for rank in (0, 1))
    return json.loads((folder / "results.json").read_text())


def main() -> None:
    folder, policy, combinations = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    def run() -> None:
        import deepspeed  # noqa: F401
        import torch.distributed as dist
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        # DeepSpeed collects garbage at every start of an engine: a second for all that is imported by now.
        gc.freeze()
        results = {}
        for each in combinations:
            combination = Combination(*each)
            try:
                results[combination.name] = run_one(folder / combination.name, policy, combination)
            except Exception:  # shown by the test, after those that work
                results[combination.name] = {"error": traceback.format_exc()[-3000:]}
            dist.barrier()
        if dist.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(results))

    TorchTrainer(run, scaling_config=ScalingConfig(num_workers=0)).fit()


def run_one(folder: Path, policy: str, combination: Combination) -> dict[str, Any]:
    """Train, resume and export one combination in this process's share."""
    import torch
    import torch.distributed as dist

    from rayrl.models.policy import load_policy
    from rayrl.records import Checkpoint
    from rayrl.training import checkpoints, launch

    use_folder(str(folder / "fit"))
    train = train_ppo if combination.trainer == "ppo" else train_rows
    train(folder, policy, combination)
    dist.barrier()
    first = folder / "first"
    if dist.get_rank() == 0:
        (folder / "checkpoint").rename(first)
        curve = folder / "metrics" / f"{combination.trainer}.jsonl"
        shutil.copy(curve, folder / "first.jsonl") if curve.exists() else None
        newest, *_ = checkpoints.whole(str(folder / "fit"))
        shutil.rmtree(folder / "fit" / newest)
    dist.barrier()
    train(folder, policy, combination._replace(settings={**(combination.settings or {}), **(combination.then or {})}))
    dist.barrier()
    if launch.rank() != 0:
        return {}
    dtype = getattr(torch, combination.dtype)
    trained = load_policy(Checkpoint(path=str(first), version=""), dtype).state_dict()
    resumed = load_policy(Checkpoint(path=str(folder / "checkpoint"), version=""), dtype).state_dict()
    started = load_policy(Checkpoint(path=policy, version=""), dtype).state_dict()
    head = first / "head" / "head.safetensors"
    if head.exists():
        from safetensors.torch import load_file

        trained |= {f"head.{name}": weight for name, weight in load_file(head).items()}
        again = load_file(folder / "checkpoint" / "head" / "head.safetensors")
        resumed |= {f"head.{name}": weight for name, weight in again.items()}
    return {
        "changed": largest_difference(trained, started),
        "resumed": largest_difference(trained, resumed),
        "dtypes": sorted({str(weight.dtype) for name, weight in trained.items() if "head." not in name}),
        "head": sum(weight.abs().sum().item() for name, weight in trained.items() if name.startswith("head.")),
        "files": sorted(file.name for file in first.iterdir()),
        "losses": [row["loss"] for row in map(json.loads, (folder / "first.jsonl").read_text().splitlines())]
        if (folder / "first.jsonl").exists()
        else [],
    }


def largest_difference(one: dict, other: dict) -> float:
    names = one.keys() & other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in names)


def use_folder(fit_url: str) -> None:
    """Write a fit's checkpoints to a folder that both ranks see, at once: without a cluster there is no controller."""
    import torch.distributed as dist
    from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils

    from rayrl.training import checkpoints, launch

    class SharedFolder(LocalTrainFnUtils):
        def broadcast_from_rank_zero(self, data):
            values = [data]
            dist.broadcast_object_list(values, 0)
            return values[0]

    def report(metrics, save):
        step = int(metrics["step"])
        with tempfile.TemporaryDirectory() as part:
            save(part)()
            checkpoints.seal(part, step, dist.get_rank(), dist.get_world_size())
            shutil.copytree(part, f"{fit_url}/{checkpoints.PREFIX}{step:08d}", dirs_exist_ok=True)
        dist.barrier()

    set_train_fn_utils(
        SharedFolder("fit", world_size=dist.get_world_size(), world_rank=dist.get_rank(), local_world_size=2)
    )
    launch._fit_url.set(fit_url)
    launch.report = report


def train_rows(folder: Path, policy: str, combination: Combination) -> None:
    """Run a trainer's own loop over some rows, which rank 0 deals."""
    import pyarrow as pa
    import torch

    from rayrl.config import DpoConfig, EvaluatorConfig, PolicyConfig, RewardModelConfig, SftConfig, UmlConfig
    from rayrl.records import Checkpoint
    from rayrl.training.dpo import DpoJob, train_dpo
    from rayrl.training.evaluator import ScalarJob, train_scalar
    from rayrl.training.reward_model import RewardModelJob, train_reward_model
    from rayrl.training.sft import SftJob, train_sft
    from rayrl.training.views import Views

    generator = torch.Generator().manual_seed(0)

    def tokens(low: int = 4, high: int = 16) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 700, (length,), generator=generator).tolist()

    settings = {
        **{"zero_stage": combination.zero_stage, "num_workers": 2, "batch_size": NUM_ROWS // 2, "epochs": 1},
        **{"learning_rate": 1e-3, "checkpoint_every": 1, "micro_batch_tokens": 48},
        **({"lora": {"rank": 4, "alpha": 8}} if combination.lora else {}),
        **(combination.settings or {}),
    }
    common = {
        "stage": combination.trainer,
        "run_url": str(folder),
        "checkpoint_url": str(folder / "checkpoint"),
        "policy": PolicyConfig(path=policy),
        "start": Checkpoint(path=policy, version="start"),
        "dtype": combination.dtype,
        "seed": 0,
        "num_rows": NUM_ROWS,
    }
    match combination.trainer:
        case "sft":
            rows = [{"prompt_token_ids": tokens(), "response_token_ids": tokens()} for _ in range(NUM_ROWS)]
            loop, job = train_sft, SftJob(training=SftConfig(**settings), **common)
        case "dpo":
            names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
            rows = [
                {name: tokens() for name in names}
                | {"chosen_id": f"{n}a", "rejected_id": f"{n}b"}
                | {"chosen_reference_logprob": 0.0, "rejected_reference_logprob": 0.0}
                for n in range(NUM_ROWS)
            ]
            loop, job = train_dpo, DpoJob(dpo=DpoConfig(**settings), reference="pass", **common)
        case "evaluator":
            rows = [{"response_id": f"{n}", "token_ids": tokens(), "score": float(n % 5)} for n in range(NUM_ROWS)]
            evaluator = EvaluatorConfig(type="scalar", **settings)
            loop, job = train_scalar, ScalarJob(evaluator=evaluator, pooling="mean", mean_score=2.0, **common)
        case "reward_model" | "views":
            rows = [{"chosen_token_ids": tokens(), "rejected_token_ids": tokens()} for _ in range(NUM_ROWS)]
            views = None
            if combination.trainer == "views":
                views = Views(
                    table=view_table(folder),
                    uml=UmlConfig(batch_size=4, z_dim=8, hidden_dim=32),
                    batch_size=4,
                    max_tokens=64,
                )
            training = RewardModelConfig(**settings)
            loop = train_reward_model
            job = RewardModelJob(training=training, pooling="last", random_head=True, views=views, **common)
        case other:
            raise ValueError(other)
    loop(job, lambda: iter([pa.Table.from_pylist(rows)]))


def view_table(folder: Path):
    import pyarrow as pa

    from rayrl.data.blocks import BlockTable

    rows = []
    for n in range(4):
        responses = [{"text": f"{n} {i}", "token_ids": [50 + n, 60 + i, 70]} for i in range(3)]
        rows.append({"prompt_id": f"p{n}", "prompt_token_ids": [1, 20 + n], "responses": responses})
    table = BlockTable(str(folder / f"views-{os.environ['RANK']}"), 1)
    if not (folder / f"views-{os.environ['RANK']}").exists():
        table.write(0, pa.Table.from_pylist(rows))
    return table


def train_ppo(folder: Path, policy: str, combination: Combination) -> None:
    """Take two updates of PPO on made-up rollouts; the fleets are no part of this."""
    from rayrl.config import PolicyConfig, PpoConfig
    from rayrl.engines.generator import Continuation, Sampling
    from rayrl.records import Checkpoint
    from rayrl.training import deepspeed_engine as zero
    from rayrl.training import launch, ppo
    from rayrl.training.ppo_job import PpoJob
    from rayrl.training.rollout import Experience, Rollout, evaluate_rollout
    from rayrl.training.steps import checkpoint, restore
    from rayrl.training.sync.export import export_policy

    start = Checkpoint(path=policy, version="start")
    settings = {
        **{"zero_stage": combination.zero_stage, "num_workers": 2, "rollout_size": NUM_ROWS, "batch_size": NUM_ROWS},
        **{"learning_rate": 1e-3, "inner_epochs": 1, "micro_batch_tokens": 48, "checkpoint_every": 1},
        **({"lora": {"rank": 4, "alpha": 8}} if combination.lora else {}),
        **(combination.settings or {}),
    }
    config = PpoConfig(**settings)
    job = PpoJob(
        **{"stage": "ppo", "run_url": str(folder), "checkpoint_url": str(folder / "checkpoint")},
        **{"policy": PolicyConfig(path=policy), "dtype": combination.dtype, "seed": 0, "num_rows": 2 * NUM_ROWS},
        **{"best_url": "", "held_out_url": "", "sync_url": "", "m1": start, "value_start": start, "ppo": config},
        **{"sampling": Sampling(temperature=1.0, max_tokens=8), "fleet": None, "rewards": None, "held_out": []},
    )
    engine, reference = ppo.start(job)
    done = int(restore(engine).get("step", 0))
    for step in range(done + 1, 3):
        prompts, continuations, rewards = [], [], []
        for n in range(launch.rank(), NUM_ROWS, 2):
            prompts.append({"id": f"p{n}", "text": f"prompt {n}", "token_ids": [1, 20 + n, 30 + step]})
            continuations.append(
                Continuation(
                    **{"text": "", "token_ids": [40 + n, 50 + n, 60 + n], "logprob": -9.0},
                    **{"token_logprobs": [-3.0] * 3, "finish_reason": "stop", "versions": ["0"], "candidates": []},
                )
            )
            rewards.append(float(n % 3))
        rollout = Rollout(
            step=0, prompts=prompts, continuations=continuations, rewards=rewards, generate_s=0.0, reward_s=0.0
        )
        experience = evaluate_rollout(engine, reference, rollout, config, 0.02)
        ppo.learn(engine, Experience.joined(zero.gathered(experience)), job, step)
        checkpoint(engine, step)
    export_policy(engine, engine.module.policy, job.policy, job.checkpoint_url)


if __name__ == "__main__":
    main()
