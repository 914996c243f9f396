"""Real fits: Ray Train and DeepSpeed around the real loops, on the quickstart's model."""

import contextlib
import json
import re
import threading
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from rayrl.algorithms.preference import token_logprobs
from rayrl.config import DpoConfig, LoraConfig, PolicyConfig, SftConfig
from rayrl.data.blocks import BlockTable
from rayrl.data.collate import collate
from rayrl.engines.weight_folder import folder_sums, read_record
from rayrl.engines.weight_sums import difference
from rayrl.errors import TrainingStopped
from rayrl.metrics.curves import read_metrics
from rayrl.models.policy import load_policy, response_logprobs
from rayrl.records import Checkpoint
from rayrl.stages.fitting import stream_of
from rayrl.training import checkpoints
from rayrl.training import deepspeed_engine as zero
from rayrl.training.dpo import DpoJob, train_dpo
from rayrl.training.launch import fit
from rayrl.training.sft import SftJob, train_sft

NUM_ROWS = 13  # in blocks of 5, 5 and 3


def tokens(generator, low, high):
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(3, 700, (length,), generator=generator).tolist()


def write_pairs(folder, model, first=0):
    """Pairs with M1's exact reference log-probabilities, numbered from `first` on."""
    generator = torch.Generator().manual_seed(first)
    rows = []
    for n in range(first, first + NUM_ROWS):
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


def run_dpo(folder, table, policy, dpo, reference="generation", on_gpu=False, held_out=None):
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
        held_out=held_out,
    )
    fit(train_dpo, job, dpo, stream_of(table, 0), storage=f"{folder}/fit", on_gpu=on_gpu)
    return read_metrics(f"{folder}/metrics/dpo.jsonl")


def weights(folder):
    return load_file(Path(folder) / "checkpoint" / "model.safetensors")


@pytest.mark.slow
def test_zero3_on_two_workers_is_zero0_on_one(ray_cluster, tiny_policy, tmp_path):
    table = write_pairs(tmp_path / "pairs", tiny_policy.load())
    held_out = write_pairs(tmp_path / "held_out", tiny_policy.load(), first=NUM_ROWS)
    whole = {"batch_size": 2 * NUM_ROWS, "epochs": 3, "learning_rate": 1e-4, "micro_batch_tokens": 128}
    whole["evaluate_every"] = 2
    one = run_dpo(tmp_path / "one", table, tiny_policy, DpoConfig(**whole), held_out=held_out)
    sharded = DpoConfig(**whole, num_workers=2, zero_stage=3)
    two = run_dpo(tmp_path / "two", table, tiny_policy, sharded, reference="pass", held_out=held_out)
    assert [row["step"] for row in two] == [1, 2, 3]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-4)
    assert one[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert one[2]["loss"] < one[0]["loss"] - 0.01
    assert ["eval_loss" in row for row in two] == [False, True, True]
    assert [row["eval_loss"] for row in two[1:]] == pytest.approx([row["eval_loss"] for row in one[1:]], abs=1e-4)
    alone = weights(tmp_path / "one")
    for name, weight in weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, alone[name], atol=2e-4, rtol=0)
    passed = json.loads((tmp_path / "two/stages/dpo/references.json").read_text())
    rows = [row for blocks in (table, held_out) for block in blocks.blocks() for row in block.to_pylist()]
    assert passed.keys() == {f"{row['chosen_id']}/{row['rejected_id']}" for row in rows}  # unequal ranks: none dropped
    for row in rows:
        reference = passed[f"{row['chosen_id']}/{row['rejected_id']}"]
        assert reference["chosen_reference_logprob"] == pytest.approx(row["chosen_reference_logprob"], abs=1e-3)
        assert reference["rejected_reference_logprob"] == pytest.approx(row["rejected_reference_logprob"], abs=1e-3)


def sft_fit(folder, table, policy, training, loop=train_sft, held_out=None):
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
        held_out=held_out,
    )
    fit(loop, job, training, stream_of(table, 0), storage=f"{folder}/fit", on_gpu=False, name="mine-sft")
    return read_metrics(f"{folder}/metrics/sft.jsonl")


def write_examples(folder, num_blocks=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    names = ("prompt_token_ids", "response_token_ids")
    rows = [{name: tokens(generator, 3, 20) for name in names} | {"prompt_id": f"e{n}"} for n in range(NUM_ROWS)]
    if num_blocks == 3:
        return write(folder, rows)
    table = BlockTable(str(folder), 1)
    table.write(0, pa.Table.from_pylist(rows))
    return table


def test_a_table_of_one_block_trains_all_ranks_as_it_trains_one(ray_cluster, tiny_policy, tmp_path):
    table = write_examples(tmp_path / "examples", num_blocks=1)
    settings = {"batch_size": 5, "epochs": 2, "learning_rate": 1e-3}  # steps of 5, 5 and 3 rows
    one = sft_fit(tmp_path / "one", table, tiny_policy, SftConfig(**settings))
    two = sft_fit(tmp_path / "two", table, tiny_policy, SftConfig(**settings, num_workers=2, zero_stage=2))
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(1, 7))
    for name in ("loss", "num_tokens", "learning_rate", "grad_norm"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=1e-4)


def kill_a_worker_after(url, num_steps):
    """SIGKILL this test's training worker once the curve has `num_steps` steps; the thread's result is in `.killed`."""

    def watch():
        while len(read_metrics(url)) < num_steps:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # dead already: a zombie has no command line
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


def test_a_training_stops_early_and_writes_the_weights_of_its_best_evaluation(ray_cluster, tiny_policy, tmp_path):
    table, held_out = write_examples(tmp_path / "examples"), write_examples(tmp_path / "held_out", seed=2)
    training = SftConfig(
        **{"batch_size": 5, "epochs": 10, "learning_rate": 1e-2, "num_workers": 2, "zero_stage": 2},
        **{"evaluate_every": 2, "patience": 2, "micro_batch_tokens": 64},
    )
    curve = sft_fit(tmp_path, table, tiny_policy, training, held_out=held_out)
    losses = {row["step"]: row["eval_loss"] for row in curve if "eval_loss" in row}
    assert list(losses) == list(range(2, curve[-1]["step"] + 1, 2))
    assert len(curve) < 3 * 10
    best = min(losses, key=lambda step: losses[step])
    assert best == curve[-1]["step"] - 2 * 2

    rows = [row for block in held_out.blocks() for row in block.to_pylist()]
    batch = collate([r["prompt_token_ids"] for r in rows], [r["response_token_ids"] for r in rows])
    written = load_policy(Checkpoint(path=f"{tmp_path}/checkpoint", version="fitted"), torch.float32).eval()
    with torch.no_grad():
        loss = -response_logprobs(written, batch).sum() / batch.response_mask.sum()
    assert loss.item() == pytest.approx(losses[best], abs=1e-4)

    # Started again, with fewer workers, the fit finds that it was over, and leaves the weights alone.
    exported = (tmp_path / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    training = training.model_copy(update={"num_workers": 1, "zero_stage": 0})
    assert sft_fit(tmp_path, table, tiny_policy, training, held_out=held_out) == curve
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_mtime_ns == exported


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
    """A plain model folder, which transformers reads as the trainer did, and M1 does not."""
    model = load_policy(Checkpoint(path=f"{folder}/checkpoint", version="fitted"), torch.float32).eval()
    record = read_record(Path(folder) / "checkpoint")
    text = record["text"]

    def read(of):
        tokens = torch.tensor([text["token_ids"]])
        with torch.no_grad():
            return token_logprobs(of(tokens).logits[:, :-1], tokens[:, 1:])[0].tolist()

    assert read(model) == pytest.approx(text["logprobs"], abs=1e-4)
    assert read(policy.load()) != pytest.approx(text["logprobs"], abs=1e-2)
    assert difference(folder_sums(Path(folder) / "checkpoint", "float32"), record["sums"]) is None
    assert not any("lora" in name for name in weights(folder))
    assert "lm_head.weight" not in weights(folder)  # it is tied


@pytest.mark.parametrize("broken", ["gradient", "weights"])
def test_a_training_that_breaks_ends_with_one_message_and_an_intact_checkpoint(
    ray_cluster, tiny_policy, tmp_path, broken
):
    table = write_examples(tmp_path / "examples")
    training = SftConfig(batch_size=2, epochs=1, learning_rate=1e-3, checkpoint_every=1)
    with pytest.raises(TrainingStopped) as stopped:
        sft_fit(tmp_path, table, tiny_policy, training, partial(break_after_a_step, broken))
    message = str(stopped.value)
    assert "\n" not in message and message.startswith("mine-sft: ")
    expected = {
        "gradient": r"the gradient is not finite in 3 steps in a row, the last of them step 5 on rows e\d+, e\d+, ",
        "weights": r"the weights are not finite after step 3, and are not kept; ",
    }
    assert re.search(expected[broken], message)
    curve = read_metrics(f"{tmp_path}/metrics/sft.jsonl")
    skipped = [(row["step"], row["grad_norm"]) for row in curve if row["num_skipped"]]
    assert skipped == ([(3, None), (4, None)] if broken == "gradient" else [])
    last = 4 if broken == "gradient" else 2
    assert checkpoints.whole(f"{tmp_path}/fit/mine-sft")[0].startswith(f"checkpoint_{last:08d}")
    assert not (tmp_path / "checkpoint").exists()


def break_after_a_step(broken, job, data):
    """Train as usual for two steps; then something is not finite."""
    take_step = zero.train_step
    num_taken = 0

    def breaking_step(engine, batches, summed_loss, *rest):
        nonlocal num_taken
        num_taken += 1
        if num_taken <= 2:
            return take_step(engine, batches, summed_loss, *rest)
        weight = next(engine.module.parameters())
        if broken == "weights":
            taken = take_step(engine, batches, summed_loss, *rest)
            weight.data[0, 0] = float("inf")
            return taken
        extra = (weight.sum() * 0).sqrt()  # the root of 0 has an infinite slope
        return take_step(engine, batches, lambda batch: summed_loss(batch) + extra, *rest)

    zero.train_step = breaking_step
    train_sft(job, data)
