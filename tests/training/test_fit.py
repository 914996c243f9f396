"""Real fits: Ray Train and DeepSpeed around the real loops, on the quickstart's model."""

import json
import threading
import time
from itertools import combinations
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from rayrl.config import DpoConfig, LoraConfig, PolicyConfig, SftConfig
from rayrl.data.blocks import BlockTable
from rayrl.data.collate import collate
from rayrl.metrics.curves import read_metrics
from rayrl.models.policy import load_policy, response_logprobs
from rayrl.records import Checkpoint
from rayrl.stages.fitting import stream_of
from rayrl.training.deepspeed_engine import train_step
from rayrl.training.dpo import DpoJob, train_dpo
from rayrl.training.launch import fit
from rayrl.training.sft import SftJob, train_sft
from rayrl.training.steps import row_names

NUM_ROWS = 13  # in blocks of 5, 5 and 3: two ranks get 8 and 5 rows


def tokens(generator, low, high):
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(3, 700, (length,), generator=generator).tolist()


def write_pairs(folder, model):
    """Pairs with M1's exact reference log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in range(NUM_ROWS):
        prompt, chosen, rejected = tokens(generator, 3, 12), tokens(generator, 2, 20), tokens(generator, 2, 20)
        with torch.no_grad():
            references = response_logprobs(model, collate([prompt, prompt], [chosen, rejected])).tolist()
        rows.append(
            {
                "chosen_id": f"{n}-0",
                "rejected_id": f"{n}-1",
                "prompt_token_ids": prompt,
                "chosen_token_ids": chosen,
                "rejected_token_ids": rejected,
                "chosen_reference_logprob": references[0],
                "rejected_reference_logprob": references[1],
            }
        )
    return write(folder, rows)


def write(folder, rows):
    table = BlockTable(str(folder), 3)
    for block, start in enumerate((0, 5, 10)):
        table.write(block, pa.Table.from_pylist(rows[start : start + 5]))
    return table


def run_dpo(folder, table, policy, dpo, reference="generation", on_gpu=False):
    job = DpoJob(
        stage="dpo",
        run_url=str(folder),
        checkpoint_url=f"{folder}/checkpoint",
        policy=PolicyConfig(path=policy.path),
        start=policy.checkpoint,
        dpo=dpo,
        reference=reference,
        dtype="bfloat16" if on_gpu else "float32",
        seed=0,
        num_rows=NUM_ROWS,
    )
    fit(train_dpo, job, dpo, stream_of(table, 0), storage=f"{folder}/fit", on_gpu=on_gpu)
    return read_metrics(f"{folder}/metrics/dpo.jsonl")


def weights(folder):
    return load_file(Path(folder) / "checkpoint" / "model.safetensors")


@pytest.mark.slow
def test_zero3_on_two_workers_is_zero0_on_one(ray_cluster, tiny_policy, tmp_path):
    table = write_pairs(tmp_path / "pairs", tiny_policy.load())
    whole = {"batch_size": 2 * NUM_ROWS, "epochs": 3, "learning_rate": 1e-4, "micro_batch_tokens": 128}
    one = run_dpo(tmp_path / "one", table, tiny_policy, DpoConfig(**whole))
    sharded = DpoConfig(**whole, num_workers=2, zero_stage=3)
    two = run_dpo(tmp_path / "two", table, tiny_policy, sharded, reference="pass")
    assert [row["step"] for row in two] == [1, 2, 3]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-4)
    assert one[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert one[2]["loss"] < one[0]["loss"] - 0.01
    alone = weights(tmp_path / "one")
    for name, weight in weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, alone[name], atol=2e-4, rtol=0)
    passed = {}
    for rank in range(2):
        passed |= json.loads((tmp_path / f"two/stages/dpo/references-{rank}-of-2.json").read_text())
    rows = [row for block in table.blocks() for row in block.to_pylist()]
    names = {f"{row['chosen_id']}/{row['rejected_id']}" for row in rows}
    assert passed.keys() - {"idle/idle"} == names  # unequal ranks: no row is dropped
    for row in rows:
        reference = passed[f"{row['chosen_id']}/{row['rejected_id']}"]
        assert reference["chosen_reference_logprob"] == pytest.approx(row["chosen_reference_logprob"], abs=1e-3)
        assert reference["rejected_reference_logprob"] == pytest.approx(row["rejected_reference_logprob"], abs=1e-3)


def sft_fit(folder, table, policy, training):
    job = SftJob(
        stage="sft",
        run_url=str(folder),
        checkpoint_url=f"{folder}/checkpoint",
        policy=PolicyConfig(path=policy.path),
        start=policy.checkpoint,
        training=training,
        dtype="float32",
        seed=0,
        num_rows=NUM_ROWS,
    )
    fit(train_sft, job, training, stream_of(table, 0), storage=f"{folder}/fit", on_gpu=False)
    return read_metrics(f"{folder}/metrics/sft.jsonl")


def write_examples(folder):
    generator = torch.Generator().manual_seed(1)
    names = ("prompt_token_ids", "response_token_ids")
    return write(folder, [{name: tokens(generator, 3, 20) for name in names} for _ in range(NUM_ROWS)])


def kill_a_worker_after(url, num_steps):
    """SIGKILL this test's training worker once the curve has `num_steps` steps; the thread's result is in `.killed`."""

    def watch():
        while len(read_metrics(url)) < num_steps:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killer.killed.append(process.pid)

    killer = threading.Thread(target=watch, daemon=True)
    killer.killed = []
    killer.start()
    return killer


def test_a_killed_worker_resumes_where_it_was_and_lora_is_exported_merged(ray_cluster, tiny_policy, tmp_path):
    table = write_examples(tmp_path / "examples")
    lora = LoraConfig(rank=4, alpha=8)
    training = SftConfig(batch_size=2, epochs=3, learning_rate=1e-3, checkpoint_every=2, lora=lora)
    undisturbed = sft_fit(tmp_path / "a", table, tiny_policy, training)
    killer = kill_a_worker_after(f"{tmp_path}/b/metrics/sft.jsonl", 9)
    disturbed = sft_fit(tmp_path / "b", table, tiny_policy, training)
    assert len(killer.killed) == 1
    lines = [json.loads(line)["step"] for line in (tmp_path / "b/metrics/sft.jsonl").read_text().splitlines()]
    steps = list(range(1, 3 * 7 + 1))
    assert [row["step"] for row in undisturbed] == steps == [row["step"] for row in disturbed]
    assert lines.count(1) == 1, "the restarted worker began again at step 1"
    for name in ("loss", "num_tokens"):
        assert [row[name] for row in disturbed] == pytest.approx([row[name] for row in undisturbed], abs=1e-4)
    ours, theirs = weights(tmp_path / "b"), weights(tmp_path / "a")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4)
    check_first_loss(undisturbed[0], table, tiny_policy.load())
    check_export(tmp_path / "b", tiny_policy)


def check_first_loss(first, table, model):
    """The loss is per response token: some two rows' mean over just those tokens is what was logged."""
    rows = [row for block in table.blocks() for row in block.to_pylist()]
    batch = collate([r["prompt_token_ids"] for r in rows], [r["response_token_ids"] for r in rows])
    with torch.no_grad():
        sums = (-response_logprobs(model, batch)).tolist()
    lengths = [len(r["response_token_ids"]) for r in rows]
    possible = [
        sum(sums[i] for i in batch) / first["num_tokens"]
        for batch in combinations(range(NUM_ROWS), 2)
        if sum(lengths[i] for i in batch) == first["num_tokens"]
    ]
    assert min(abs(first["loss"] - loss) for loss in possible) < 1e-4


def check_export(folder, policy):
    """A plain model folder, whose probe is what transformers answers and M1 does not."""
    model = load_policy(Checkpoint(path=f"{folder}/checkpoint", version="fitted"), torch.float32).eval()
    probe = json.loads((Path(folder) / "checkpoint" / "probe.json").read_text())

    def answer(of):
        with torch.no_grad():
            logprobs = of(torch.tensor([probe["prompt_token_ids"]])).logits[0, -1].log_softmax(-1)
        return logprobs[probe["token_ids"]].tolist()

    assert answer(model) == pytest.approx(probe["logprobs"], abs=1e-4)
    assert answer(policy.load()) != pytest.approx(probe["logprobs"], abs=1e-2)
    assert not any("lora" in name for name in weights(folder))
    assert "lm_head.weight" in weights(folder)  # a swapped engine finds a tied head by this name only


class Engine:
    """As much of a DeepSpeed engine as a step touches."""

    world_size, global_steps, device, optimizer = 1, 6, torch.device("cpu"), None
    stepped = False

    def backward(self, loss):
        self.loss = loss

    def step(self):
        self.stepped = True


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(bad):
    engine = Engine()
    with pytest.raises(FloatingPointError, match="at step 7; the last checkpoint is intact"):
        train_step(engine, [1.0, bad], torch.tensor, 2, 0.0)
    assert not engine.stepped


def test_a_loss_that_is_not_finite_names_its_rows():
    names = row_names([{"chosen_id": "a", "rejected_id": "b"}, {"response_id": "c", "prompt_id": "d"}, {"id": "e"}])
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 7 on rows a/b, c, e; the last"):
        train_step(Engine(), [float("nan")], torch.tensor, 3, 0.0, names)


def test_a_step_is_the_mean_over_samples():
    engine = Engine()
    assert train_step(engine, [3.0, 5.0], torch.tensor, 4, 0.0) == 2.0
    assert engine.loss.item() == pytest.approx(5 / 4)
    assert engine.stepped
