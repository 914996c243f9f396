"""PPO on real parts: Ray Train and DeepSpeed around the loop, a vLLM replica answering, weights synced each update."""

import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import torch

from rayrl.config import LoraConfig, PolicyConfig, PpoConfig
from rayrl.data.blocks import BlockTable
from rayrl.data.collate import collate
from rayrl.engines.generator import Sampling
from rayrl.metrics.curves import read_metrics
from rayrl.models.actor_critic import ActorCritic
from rayrl.models.policy import load_policy, response_logprobs, response_token_logprobs
from rayrl.records import Checkpoint
from rayrl.stages.fitting import stream_of
from rayrl.training import deepspeed_engine as zero
from rayrl.training.deepspeed_engine import train_step
from rayrl.training.launch import fit
from rayrl.training.ppo import idle_micro_batch, start, token_losses, train_ppo
from rayrl.training.ppo_job import PpoJob
from rayrl.training.rollout import TokenTargets, read_tokens
from tests.training.test_fit import kill_a_worker_after

NUM_PROMPTS = 48
UNREWARDED = 17


class Wanted:
    """The share of low token ids in a response; abstains on one prompt."""

    def score(self, items, reasons=None):
        texts = [(item.prompt, item.token_ids[3:]) for item in items]
        if reasons is not None:
            reasons |= {n: "too_long" for n, item in enumerate(items) if item.prompt == f"prompt {UNREWARDED}"}
        return [
            None if p == f"prompt {UNREWARDED}" else 4.0 * sum(t < 300 for t in said) / len(said) for p, said in texts
        ]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def write_prompts(folder):
    table = BlockTable(str(folder), 3)
    for block in range(3):
        numbers = range(block * 16, block * 16 + 16)
        rows = [{"id": f"p{n}", "text": f"prompt {n}", "token_ids": [1, 20 + n, 30 + n]} for n in numbers]
        table.write(block, pa.Table.from_pylist(rows))
    return table


def train(folder, prompts, policy, fleet, transport=None, on_gpu=False, value_start=None, **settings):
    config = PpoConfig(
        **{"rollout_size": 16, "batch_size": 8, "learning_rate": 3e-4, "epochs": 2, "kl_coef": 0.01, "value_coef": 0.5}
        | {"evaluate_every": 3, "checkpoint_every": 2, "max_kl": 1000.0}
        | settings
    )
    job = PpoJob(
        stage="ppo",
        run_url=str(folder),
        checkpoint_url=f"{folder}/checkpoint",
        best_url=f"{folder}/best",
        held_out_url=f"{folder}/held_out",
        sync_url=f"{folder}/weights",
        transport=transport,
        m1=policy.checkpoint,
        policy=PolicyConfig(path=policy.path),
        value_start=value_start or policy.checkpoint,
        ppo=config,
        sampling=Sampling(temperature=1.0, max_tokens=12),
        fleet=fleet,
        rewards=Wanted(),
        held_out=prompts.read(0).to_pylist(),
        dtype="bfloat16" if on_gpu else "float32",
        seed=0,
        num_rows=NUM_PROMPTS,
    )
    fit(train_ppo, job, config, stream_of(prompts, 0), storage=f"{folder}/fit", on_gpu=on_gpu)
    m1, *curve = read_metrics(f"{folder}/metrics/ppo.jsonl")
    assert set(m1) == {"step", "held_out_reward"} and m1["step"] == 0
    return curve


def test_ppo_raises_the_reward_and_the_replica_serves_what_was_trained(generators, prompts, tiny_policy, tmp_path):
    curve = train(tmp_path, prompts, tiny_policy, generators, epochs=6)
    assert (
        [row["step"] for row in curve]
        == list(range(1, 19))
        == list(range(1, PpoConfig(rollout_size=16, batch_size=8, epochs=6).num_rollouts(48) + 1))
    )
    first, last = (sum(row["reward"] for row in rows) / 3 for rows in (curve[:3], curve[-3:]))
    assert last > first + 0.5
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-2)
    assert curve[-1]["kl"] > 0.1
    assert sum(row["num_responses"] for row in curve) == 6 * (NUM_PROMPTS - 1)  # one prompt is never rewarded
    assert sum(row["num_abstained"] for row in curve) == sum(row["num_too_long"] for row in curve) == 6
    assert not any(row["num_timed_out"] for row in curve)
    assert curve[-1]["held_out_reward"] > curve[2]["held_out_reward"]
    assert all(row["updates_behind"] == 0 for row in curve)
    # two answers to each held-out prompt are kept: M1's, and those of every third update
    kept = {int(path.name): BlockTable(str(path), 1).read(0).to_pylist() for path in (tmp_path / "held_out").iterdir()}
    assert set(kept) == set(range(0, 19, 3))
    for step, answers in kept.items():
        assert sorted(a["prompt_id"] for a in answers) == sorted([f"p{n}" for n in range(16)] * 2)
        assert len({a["response"] for a in answers}) > 24, "another random stream for the second answer"
        logged = [row["held_out_reward"] for row in curve if row["step"] == step]
        assert logged in ([], [pytest.approx(sum(a["reward"] for a in answers) / len(answers))])
    # the last weights the replica took are the ones that were exported
    version = ray.get(generators.replicas[0].status.remote())["version"]
    assert version == "tiny-ppo-18"
    prompt, said = [1, 25, 35], [100, 200, 300, 2]
    served = generators.call("logprobs", Checkpoint(path="gone", version=version), [prompt], [said])[0]
    with torch.no_grad():
        exported = response_logprobs(
            load_policy(Checkpoint(path=f"{tmp_path}/checkpoint", version=version), torch.float32).eval(),
            collate([prompt], [said]),
        )
    assert served == pytest.approx(exported.item(), abs=1e-3)


def test_rloo_raises_the_reward_without_a_value_function(generators, prompts, tiny_policy, tmp_path):
    nowhere = Checkpoint(path=f"{tmp_path}/nowhere", version="nowhere")  # loading it would fail
    settings = {"advantages": "rloo", "k": 4, "rollout_size": 8, "batch_size": 16, "value_coef": 0.1, "epochs": 3}
    curve = train(tmp_path, prompts, tiny_policy, generators, value_start=nowhere, **settings, clip_range_high=0.28)
    assert [row["step"] for row in curve] == list(range(1, 19))
    first, last = (sum(row["reward"] for row in rows) / 3 for rows in (curve[:3], curve[-3:]))
    assert last > first + 0.5
    assert sum(row["num_responses"] for row in curve) == 3 * 4 * (NUM_PROMPTS - 1)
    assert all("value_loss" not in row and row["loss"] == row["policy_loss"] for row in curve)
    assert [row["num_alone"] for row in curve] == [0] * 18
    part = next((tmp_path / "fit").rglob("part-*.pt"))
    trained = [fragment["name"] for fragment in torch.load(part)["fragments"]]
    assert trained and all(name.startswith("policy.") for name in trained), "checkpoints hold the policy alone"


def take_steps_at_every_stage(job, rows):
    """A worker's loop: at each ZeRO stage the reference, and two steps of the value alone before the policy's first."""
    prompts, responses = [[1, 5, 9], [1, 7]], [[40, 41], [50, 51, 52]]
    ones = torch.ones(2, 3)
    targets = TokenTargets(logprobs=-3 * ones, advantages=ones, importance=ones, values=0 * ones, returns=ones)
    for stage in range(4):
        # Decay would move the policy in a step of any learning rate but 0.
        config = job.ppo.model_copy(update={"zero_stage": stage, "weight_decay": 0.1})
        engine, reference = start(replace(job, ppo=config))
        is_sharded = any(hasattr(parameter, "ds_id") for parameter in reference.parameters())
        assert is_sharded == (stage == 3)
        idle = idle_micro_batch(engine.device)

        def read(engine=engine, reference=reference):
            return read_tokens(engine, reference, prompts, responses, 64)

        def step(engine=engine, config=config, idle=idle):
            batch = (collate(prompts, responses), targets)
            train_step(engine, [batch], lambda each: token_losses(engine, each, config)[0], 5, idle)
            return read()

        m1 = read()
        torch.testing.assert_close(m1.reference_logprobs, m1.logprobs, atol=1e-5, rtol=1e-5)
        assert engine.get_lr() == [0.0, 0.1]
        first, second = step(), step()
        for waiting in (first, second):
            assert torch.equal(waiting.logprobs, m1.logprobs), f"the policy has moved at stage {stage}"
        assert (second.values - m1.values).abs().max() > 0.1
        assert engine.get_lr() == [0.01, 0.1]
        with tempfile.TemporaryDirectory() as folder:
            share = [folder]
            torch.distributed.broadcast_object_list(share)
            zero.save(engine, share[0], {"step": 2})()
            zero.barrier(engine)
            third = step()
            assert (third.logprobs - m1.logprobs).abs().max() > 0.01
            assert torch.equal(third.reference_logprobs, m1.reference_logprobs)
            zero.load(engine, share[0])
            torch.testing.assert_close(step().logprobs, third.logprobs, atol=1e-5, rtol=1e-5)
            zero.barrier(engine)
        Path(job.run_url, f"stage-{stage}").touch()  # this far only if all of its assertions hold


def test_value_warm_up_and_reference_at_every_zero_stage(ray_cluster, prompts, tiny_policy, tmp_path):
    config = PpoConfig(
        num_workers=2,
        learning_rate=0.01,
        value_learning_rate=0.1,
        value_warmup_steps=2,
        schedule="constant",
        warmup_ratio=0,
        max_failures=0,
        reference_offload=True,
    )
    job = PpoJob(
        stage="ppo",
        run_url=str(tmp_path),
        checkpoint_url="",
        best_url="",
        held_out_url="",
        sync_url="",
        m1=tiny_policy.checkpoint,
        policy=PolicyConfig(path=tiny_policy.path),
        value_start=tiny_policy.checkpoint,
        ppo=config,
        sampling=Sampling(temperature=1.0, max_tokens=12),
        fleet=None,
        rewards=Wanted(),
        held_out=[],
        dtype="float32",
        seed=0,
        num_rows=NUM_PROMPTS,
    )
    fit(take_steps_at_every_stage, job, config, stream_of(prompts, 0), storage=f"{tmp_path}/fit", on_gpu=False)
    assert sorted(path.name for path in tmp_path.glob("stage-*")) == [f"stage-{stage}" for stage in range(4)]


@pytest.mark.slow
def test_overlap_is_one_update_behind_and_a_killed_trainer_resumes(generators, prompts, tiny_policy, tmp_path):
    settings = {"overlap": True, "lora": LoraConfig(rank=4, alpha=8), "target_kl": 0.5, "learning_rate": 1e-3}
    whole = train(tmp_path / "a", prompts, tiny_policy, generators, **settings)
    killer = kill_a_worker_after(f"{tmp_path}/b/metrics/ppo.jsonl", 4)
    resumed = train(tmp_path / "b", prompts, tiny_policy, generators, **settings)
    killer.join(timeout=10)
    assert killer.killed
    assert [row["updates_behind"] for row in whole] == [0, 1, 1, 1, 1, 1]
    assert [row["step"] for row in resumed] == [row["step"] for row in whole] == list(range(1, 7))
    assert [row["kl_coef"] for row in whole] != [whole[0]["kl_coef"]] * 6
    # up to the checkpoint the curves are one; after it the first rollout is no longer an update behind
    assert [row["reward"] for row in resumed[:2]] == pytest.approx([row["reward"] for row in whole[:2]], abs=1e-5)
    assert resumed[-1]["reward"] == pytest.approx(whole[-1]["reward"], abs=0.5)


@pytest.mark.slow
def test_two_sharded_workers_survive_the_loss_of_the_replica(generators, prompts, tiny_policy, tmp_path):
    settings = {"num_workers": 2, "zero_stage": 3, "max_rollouts": 5}
    whole = train(tmp_path / "a", prompts, tiny_policy, generators, **settings)
    killed = kill_the_replica_after(f"{tmp_path}/b/metrics/ppo.jsonl", 3, generators)
    disturbed = train(tmp_path / "b", prompts, tiny_policy, generators, **settings)
    assert killed.pids and killed.pids[0] != ray.get(generators.replicas[0].status.remote())["pid"]
    assert [row["step"] for row in disturbed] == [row["step"] for row in whole] == list(range(1, 6))
    for name in ("reward", "kl", "policy_loss", "value_loss"):  # every request was answered by the weights it named
        assert [row[name] for row in disturbed] == pytest.approx([row[name] for row in whole], abs=1e-3)


def kill_the_replica_after(url, num_rows, fleet):
    """SIGKILL the fleet's only replica once the curve has so many rows."""

    def watch():
        while len(read_metrics(url)) < num_rows:
            time.sleep(0.02)
        killer.pids.append(ray.get(fleet.replicas[0].status.remote())["pid"])
        os.kill(killer.pids[0], signal.SIGKILL)

    killer = threading.Thread(target=watch, daemon=True)
    killer.pids = []
    killer.start()
    return killer


def test_both_networks_take_gradient_checkpoints_and_bfloat16(tiny_policy):
    actor_critic = ActorCritic(tiny_policy.load(), tiny_policy.load()).to(torch.bfloat16)
    actor_critic.gradient_checkpointing_enable()
    assert actor_critic.policy.is_gradient_checkpointing and actor_critic.value_backbone.is_gradient_checkpointing
    read = actor_critic.train()(collate([[1, 5, 9]], [[40, 41]]))
    assert (read.values.dtype, read.values.abs().max().item()) == (torch.float32, 0.0), (
        "the value's head starts at zero"
    )
    read.values.sum().backward()


def test_a_policy_that_runs_away_is_stopped(generators, prompts, tiny_policy, tmp_path):
    curve = train(tmp_path, prompts, tiny_policy, generators, kl_coef=0.0, learning_rate=3e-3, max_kl=0.5, epochs=4)
    assert curve[-1]["kl"] > 0.5
    assert len(curve) < 12


def test_values_and_logprobs_are_those_of_the_state_before_each_token(tiny_policy):
    policy, value = tiny_policy.load(), tiny_policy.load()
    actor_critic = ActorCritic(policy, value)
    torch.nn.init.normal_(actor_critic.value_head.weight)
    prompts, responses = [[1, 5, 9], [1, 7]], [[40, 41], [50, 51, 52, 53]]
    with torch.no_grad():
        read = actor_critic(batch := collate(prompts, responses))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            for t in range(len(response)):
                so_far = torch.tensor([prompt + response[:t]])
                out = value(so_far, output_hidden_states=True)
                expected = actor_critic.value_head(out.hidden_states[-1][0, -1])
                assert read.values[row, t].item() == pytest.approx(expected.item(), abs=1e-4)
                logprob = policy(so_far).logits[0, -1].log_softmax(-1)[response[t]]
                assert read.logprobs[row, t].item() == pytest.approx(logprob.item(), abs=1e-4)
        assert response_token_logprobs(policy, batch).shape == (2, 4)
