"""Real fits of reward models on the quickstart's model, and the parts they are made of."""

import json
import math
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from rayrl.config import (
    BottleneckConfig,
    EvaluatorConfig,
    LoraConfig,
    PolicyConfig,
    RewardModelConfig,
    UmlConfig,
)
from rayrl.data.blocks import BlockTable
from rayrl.engines.weight_folder import read_record
from rayrl.metrics.curves import read_metrics
from rayrl.models.multiview import MultiViewRewardModel
from rayrl.models.policy import load_policy
from rayrl.models.reward_model import RewardModel
from rayrl.records import Checkpoint
from rayrl.stages.fitting import stream_of
from rayrl.training import deepspeed_engine as zero
from rayrl.training.launch import fit
from rayrl.training.reward_model import (
    IDLE_PAIR,
    RewardModelJob,
    StepLosses,
    pair_batch,
    sequence_batch,
    train_reward_model,
    with_code_seeds,
)
from rayrl.training.views import Views, prompts_with_views, two_views, view_batches
from tests.training.test_fit import kill_a_worker_after

GOOD, BAD = 40, 41
NUM_PAIRS = 72  # in blocks of 24
TRAINING = {"epochs": 3, "batch_size": 12, "learning_rate": 1e-3, "micro_batch_tokens": 256}
UML = UmlConfig(batch_size=4, z_dim=8, hidden_dim=32)


def sequence(rng, marker):
    """A prompt of random tokens and a response that holds the marker somewhere."""
    tokens = rng.integers(50, 700, size=int(rng.integers(6, 16))).tolist()
    return [1, *tokens[:4], *tokens[4:5], marker, *tokens[5:], 2]


def pair_rows(num, seed, **columns):
    rng = np.random.default_rng(seed)
    return [
        {
            "chosen_id": f"{n}-0",
            "rejected_id": f"{n}-1",
            "chosen_token_ids": sequence(rng, GOOD),
            "rejected_token_ids": sequence(rng, BAD),
            **columns,
        }
        for n in range(num)
    ]


def write_blocks(folder, rows, size):
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    table = BlockTable(str(folder), len(blocks))
    for number, block in enumerate(blocks):
        table.write(number, pa.Table.from_pylist(block))
    return table


def sampled_row(n, num_responses=4):
    rng = np.random.default_rng([7, n])
    responses = [
        {"text": f"{n} says {i}", "token_ids": rng.integers(50, 700, 5 + i).tolist()} for i in range(num_responses)
    ]
    return {"prompt_id": f"p{n}", "prompt_token_ids": [1, 60 + n], "responses": responses}


def view_table(folder, num=7):
    rows = [sampled_row(n) for n in range(num)]
    rows.insert(2, sampled_row(100, num_responses=1))  # no two views: never drawn
    return write_blocks(folder, rows, 3)


def fit_model(folder, policy, training, views=None, pooling="last", dtype="float32", bottleneck=None):
    table = write_blocks(folder / "pairs", pair_rows(NUM_PAIRS, seed=0), 24)
    job = RewardModelJob(
        stage="reward_model",
        run_url=str(folder),
        checkpoint_url=f"{folder}/checkpoint",
        policy=PolicyConfig(path=policy.path),
        start=policy.checkpoint,
        training=training,
        pooling=pooling,
        dtype=dtype,
        seed=3,
        num_rows=NUM_PAIRS,
        bottleneck=bottleneck,
        views=views,
        held_out=write_blocks(folder / "held_out", pair_rows(13, seed=1), 5),
    )
    fit(train_reward_model, job, training, stream_of(table, 0), storage=f"{folder}/fit", on_gpu=False)
    return read_metrics(f"{folder}/metrics/reward_model.jsonl")


def exported(folder, pooling="last", dtype=torch.float32):
    """The model as it was written, read back by transformers."""
    model = RewardModel(load_policy(Checkpoint(path=f"{folder}/checkpoint", version="fitted"), dtype), pooling).eval()
    model.head.load_state_dict(load_file(f"{folder}/checkpoint/head/head.safetensors"))
    return model


def rewards(model, sequences):
    batch = sequence_batch(sequences)
    with torch.no_grad():
        return model(batch).tolist()


def accuracy(model, seed):
    rows = pair_rows(64, seed)
    chosen, rejected = (rewards(model, [row[f"{side}_token_ids"] for row in rows]) for side in ("chosen", "rejected"))
    return np.mean(np.array(chosen) > np.array(rejected))


@pytest.fixture(scope="module")
def with_uml(ray_cluster, tiny_policy, tmp_path_factory):
    """A fit with multi-view learning: its folder, its curve, its views."""
    folder = tmp_path_factory.mktemp("uml")
    views = Views(table=view_table(folder / "views"), uml=UML, batch_size=4, max_tokens=512)
    training = RewardModelConfig(**TRAINING, checkpoint_every=4)
    return folder, fit_model(folder, tiny_policy, training, views), views


def test_a_reward_model_learns_the_rule_and_ranks_unseen_pairs(with_uml, tiny_policy):
    folder, curve, _ = with_uml
    assert [row["step"] for row in curve] == list(range(1, 19))
    assert curve[0]["pair_loss"] == pytest.approx(math.log(2), abs=1e-6)  # the head starts at zero
    assert curve[0]["accuracy"] == 0.5
    assert np.mean([row["pair_loss"] for row in curve[-4:]]) < 0.5
    assert accuracy(RewardModel(tiny_policy.load(), "last"), seed=1) == 0
    assert accuracy(exported(folder), seed=1) > 0.5 + 4 * 0.5 / 8  # 64 pairs: four standard errors above chance


def test_the_branch_is_trained_and_not_exported(with_uml, tiny_policy):
    folder, curve, _ = with_uml
    assert all(math.isfinite(row["mi"]) and row["skl"] >= 0 for row in curve)
    assert all(row["loss"] != pytest.approx(row["pair_loss"], abs=1e-3) for row in curve)
    names = load_file(folder / "checkpoint" / "model.safetensors").keys()
    assert set(names) == set(tiny_policy.load().state_dict()) - {"lm_head.weight"}  # tied to the embedding
    assert load_file(folder / "checkpoint/head/head.safetensors").keys() == {"weight", "bias"}


def test_served_values_are_the_trainers(with_uml, last_embedders):
    folder, _, _ = with_uml
    checkpoint = Checkpoint(path=f"{folder}/checkpoint", version="uml")
    sequences = [row["chosen_token_ids"] for row in pair_rows(20, seed=2)]
    served = last_embedders.call("values", checkpoint, sequences)
    np.testing.assert_allclose(served, rewards(exported(folder), sequences), atol=1e-4)


@pytest.mark.slow
def test_a_killed_worker_resumes_with_the_same_pairs_and_views(with_uml, tiny_policy, tmp_path):
    folder, undisturbed, views = with_uml
    killer = kill_a_worker_after(f"{tmp_path}/metrics/reward_model.jsonl", 10)
    disturbed = fit_model(tmp_path, tiny_policy, RewardModelConfig(**TRAINING, checkpoint_every=4), views)
    assert len(killer.killed) == 1
    lines = (tmp_path / "metrics/reward_model.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines].count(1) == 1, "the restarted worker began again at step 1"
    for name in ("loss", "pair_loss", "skl"):
        assert [row[name] for row in disturbed] == pytest.approx([row[name] for row in undisturbed], abs=1e-3)
    ours, theirs = (load_file(f / "checkpoint" / "model.safetensors") for f in (tmp_path, folder))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=0)


@pytest.mark.slow
def test_zero3_on_two_workers_learns(ray_cluster, tiny_policy, tmp_path):
    views = Views(table=view_table(tmp_path / "views"), uml=UML, batch_size=4, max_tokens=512)
    training = RewardModelConfig(**TRAINING, num_workers=2, zero_stage=3, evaluate_every=6)
    curve = fit_model(tmp_path, tiny_policy, training, views)
    assert len(curve) == 3 * NUM_PAIRS / 12
    evaluated = {row["step"]: row["eval_loss"] for row in curve if "eval_loss" in row}
    assert list(evaluated) == [6, 12, 18]
    assert evaluated[18] < evaluated[6] < 0.7
    check_learnt(tmp_path, curve, "last", torch.float32, 1e-4)


@pytest.mark.slow
def test_a_scalar_evaluator_in_bfloat16_with_adapters_learns(ray_cluster, tiny_policy, tmp_path):
    """Bradley-Terry as the evaluator's loss, with its pooling; and the branch of another objective."""
    views = Views(
        table=view_table(tmp_path / "views"),
        uml=UML.model_copy(update={"objective": "infomax"}),
        batch_size=4,
        max_tokens=512,
    )
    training = EvaluatorConfig(
        type="scalar", loss="bradley_terry", zero_stage=2, lora=LoraConfig(rank=8, alpha=32), **TRAINING
    )
    curve = fit_model(tmp_path, tiny_policy, training, views, pooling="mean", dtype="bfloat16")
    check_learnt(tmp_path, curve, "mean", torch.bfloat16, 0.05)


def check_learnt(folder, curve, pooling, dtype, tolerance):
    assert np.mean([row["pair_loss"] for row in curve[-4:]]) < curve[0]["pair_loss"] - 0.05
    assert np.mean([row["accuracy"] for row in curve[-4:]]) > 0.7
    assert all(math.isfinite(row["mi"]) for row in curve)
    text = read_record(Path(folder) / "checkpoint")["text"]
    (value,) = rewards(exported(folder, pooling, dtype), [text["token_ids"]])
    assert value == pytest.approx(text["value"], abs=tolerance)
    assert value != 0


def test_a_bottleneck_learns_and_is_served_as_any_reward_model(ray_cluster, tiny_policy, last_embedders, tmp_path):
    training = RewardModelConfig(**TRAINING, evaluate_every=9)
    # Fewer nats than the default would leave: 18 steps are few for a head that starts from nothing.
    bottleneck = BottleneckConfig(beta=0.001, z_dim=8, learning_rate=1e-2)
    curve = fit_model(tmp_path, tiny_policy, training, bottleneck=bottleneck)
    assert curve[0]["pair_loss"] == pytest.approx(math.log(2) + 2 * 0.001 * curve[0]["divergence"], abs=1e-5)
    assert curve[0]["divergence"] > 0
    assert [row["step"] for row in curve if "eval_loss" in row] == [9, 18]
    assert accuracy(exported(tmp_path), seed=1) > 0.5 + 4 * 0.5 / 8
    text = read_record(tmp_path / "checkpoint")["text"]
    assert rewards(exported(tmp_path), [text["token_ids"]]) == pytest.approx([text["value"]], abs=1e-4)
    sequences = [row["chosen_token_ids"] for row in pair_rows(8, seed=2)]
    served = last_embedders.call("values", Checkpoint(path=f"{tmp_path}/checkpoint", version="code"), sequences)
    np.testing.assert_allclose(served, rewards(exported(tmp_path), sequences), atol=1e-4)


def test_codes_are_drawn_anew_in_every_step_and_the_same_when_it_is_done_again():
    batches = [pair_batch(pair_rows(2, seed=s)) for s in range(3)]
    first, again, next_step = (with_code_seeds(batches, name) for name in ("1", "1", "2"))
    seeds = [batch.code_seed for batch in first]
    assert seeds == [batch.code_seed for batch in again]
    assert len({*seeds, *(batch.code_seed for batch in next_step)}) == 6


def gradients(policy, rows):
    """Loss and gradients of one micro-batch; a head that is not zero, so that the backbone has some."""
    torch.manual_seed(0)
    model = MultiViewRewardModel(RewardModel(policy.load(), "last"), None)
    torch.nn.init.normal_(model.reward_model.head.weight)
    losses = StepLosses(model, pair_batch(rows))
    loss = losses.summed_loss(pair_batch(rows))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_pair_without_weight_has_no_gradient(tiny_policy):
    rows = pair_rows(4, seed=4)
    weighed = [row | {"weight": w} for row, w in zip(rows, (1.0, 0.0, 1.0, 0.0), strict=True)]
    loss, found = gradients(tiny_policy, weighed)
    expected_loss, expected = gradients(tiny_policy, rows[::2])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)
    _, none = gradients(tiny_policy, [row | {"weight": 0.0} for row in rows])
    assert all(not gradient.any() for gradient in none.values())


def test_what_is_watched_leaves_idle_batches_out(tiny_policy):
    model = RewardModel(tiny_policy.load(), "last")
    idle = pair_batch(pair_rows(1, seed=5))
    losses = StepLosses(model, idle)
    losses.summed_loss(idle)
    assert losses.statistics() == {}
    torch.nn.init.normal_(model.head.weight)
    rows = pair_rows(3, seed=6)
    losses.summed_loss(pair_batch(rows))
    losses.summed_loss(idle)
    chosen, rejected = (rewards(model, [r[f"{side}_token_ids"] for r in rows]) for side in ("chosen", "rejected"))
    margins = torch.tensor(chosen) - torch.tensor(rejected)
    watched = losses.statistics()
    assert watched["accuracy"].item() == pytest.approx((margins > 0).float().mean().item())
    assert watched["margin"].item() == pytest.approx(margins.mean().item(), abs=1e-4)


def drawn(views, skip, num, rank=0, num_ranks=1):
    endless = view_batches(views, 5, rank, num_ranks, skip=skip, num_steps=20)
    return [next(endless) for _ in range(num)]


def first_tokens(batch):
    """Which prompt every row of a batch belongs to."""
    return [next(token for token in row if token != 1) for row in token_rows(batch)]


def token_rows(batch):
    return [row.tolist() for row in batch.tokens.input_ids.split(batch.tokens.lengths)]


def test_views_are_pairs_of_one_prompt_and_different_prompts_per_batch(tmp_path):
    views = Views(table=view_table(tmp_path), uml=UML, batch_size=4, max_tokens=512)
    assert [row["prompt_id"] for row in prompts_with_views(views.table)] == [f"p{n}" for n in range(7)]
    for batch in drawn(views, 0, 10):
        prompts = first_tokens(batch)
        half = len(prompts) // 2
        assert prompts[:half] == prompts[half:]
        assert len(set(prompts)) == half > 1
        rows = token_rows(batch)
        assert all(one != other for one, other in zip(rows[:half], rows[half:], strict=True))
        assert half == 4  # the other 3 of an epoch's 7 prompts are left out
    seen = {prompt for batch in drawn(views, 0, 20) for prompt in first_tokens(batch)}
    assert seen == {60 + n for n in range(7)}


def test_the_weight_of_the_divergence_rises_over_the_training(tmp_path):
    uml = UML.model_copy(update={"skl_weight": 2.0, "skl_rise": (0.25, 0.75)})
    views = Views(table=view_table(tmp_path), uml=uml, batch_size=4, max_tokens=512)
    weights = [batch.skl_weight for batch in drawn(views, 0, 22)]  # of a training of 20 steps
    assert weights[:6] == pytest.approx([0.002] * 6)
    ratios = [after / before for before, after in pairwise(weights[5:16])]
    assert ratios == pytest.approx([1000**0.1] * 10)
    assert weights[15:] == [2.0] * 7


def test_views_go_on_where_they_were(tmp_path):
    views = Views(table=view_table(tmp_path), uml=UML, batch_size=4, max_tokens=512)
    whole, rest = drawn(views, 0, 9), drawn(views, 4, 5)
    for one, other in zip(whole[4:], rest, strict=True):
        assert one.seed == other.seed
        assert one.tokens.input_ids.tolist() == other.tokens.input_ids.tolist()
    assert len({batch.seed for batch in whole}) == 9


def test_ranks_share_the_prompts_and_no_batch_is_of_one_prompt(tmp_path):
    views = Views(table=view_table(tmp_path), uml=UML, batch_size=4, max_tokens=512)
    for whole, *shares in zip(drawn(views, 0, 6), *(drawn(views, 0, 6, rank, 2) for rank in range(2)), strict=True):
        assert sorted(prompt for part in shares for prompt in first_tokens(part)) == sorted(first_tokens(whole))
        assert all(len(part.tokens.lengths) == 4 for part in shares)
        assert sum(part.weight for part in shares) == pytest.approx(whole.weight) == pytest.approx(UML.weight)


@pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, where they are imported here
def test_the_objective_moves_where_two_responses_to_a_prompt_are_alike(process_group, tiny_policy, tmp_path):
    """With the defaults, and the reward model's small learning rate beside them. Without information it is -2 log 2."""
    rng, num_steps = np.random.default_rng(0), 150
    rows = []
    for n in range(64):
        words = [np.where(rng.random(8) < 0.6, 60 + n, rng.integers(200, 700, 8)).tolist() for _ in range(4)]
        responses = [{"text": str(said), "token_ids": said} for said in words]
        rows.append({"prompt_id": f"p{n}", "prompt_token_ids": [1, 5], "responses": responses})
    views = Views(table=write_blocks(tmp_path, rows, 64), uml=UmlConfig(), batch_size=16, max_tokens=64)
    torch.manual_seed(0)
    model = MultiViewRewardModel(RewardModel(tiny_policy.load(), "last"), views.uml)
    branch = zero.ParameterGroup(parameters=model.branch(), learning_rate=views.uml.learning_rate)
    engine = zero.start(model, RewardModelConfig(), torch.float32, num_steps, [branch])
    idle = pair_batch([IDLE_PAIR])
    losses = StepLosses(engine, idle)
    information = []
    for batch in islice(view_batches(views, 0, 0, 1, skip=0, num_steps=num_steps), num_steps):
        zero.train_step(engine, [batch], losses.summed_loss, 1, idle)
        seen = losses.statistics()
        information.append((seen["skl_weight"] * seen["skl"] - seen["view_loss"]).item())
    assert np.mean(information[-50:]) > -2 * math.log(2) + 0.02
    assert engine.get_lr() == pytest.approx([3e-7, 1e-4])  # a tenth, at the end of the schedule


def test_epochs_draw_other_views_and_long_ones_are_cut():
    row = sampled_row(0, num_responses=10)
    drawn_views = [two_views(row, 512, 0, epoch) for epoch in range(20)]
    assert drawn_views == [two_views(row, 512, 0, epoch) for epoch in range(20)]
    assert len({str(views) for views in drawn_views}) > 10
    assert all(first != second for first, second in drawn_views)
    assert all(len(view) == 5 for views in [two_views(row, 5, 0, 0)] for view in views)
    copies = {**row, "responses": [*row["responses"][:2], *[row["responses"][0]] * 8]}
    assert all(first != second for first, second in (two_views(copies, 512, 0, epoch) for epoch in range(20)))
