"""The job of a PPO as its stage makes it, its rollouts' abstentions, and what the manifest says of them."""

from rayrl.config import PpoConfig, load_config
from rayrl.engines.generator import Continuation, Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.records import Checkpoint
from rayrl.runs.stage_metrics import FitMetrics
from rayrl.stages.policy.ppo import summarise, transport
from rayrl.training.rollout import sample


def test_every_rank_of_a_replica_is_in_the_trainers_group():
    ranks = ["generators.tensor_parallel_size=2", "generators.pipeline_parallel_size=3"]
    config = load_config("jobs/configs/rlp_quickstart.toml", [*ranks, 'ppo.weight_transfer="nccl"'])
    sent = transport(config)
    assert sent is not None and sent.ranks_per_replica == 6


class Words(Fleet):
    """A fleet of one that answers every prompt with one token."""

    concurrency = 1

    def call(self, method, checkpoint, prompts, seeds, sampling, **_):
        said = Continuation(
            text="word",
            token_ids=[7],
            logprob=-1.0,
            token_logprobs=[-1.0],
            finish_reason="stop",
            versions=["m1"],
            candidates=[],
        )
        return [[said] for _ in prompts]


class Slow:
    """A reward that is in time for the first response only, and finds the last one too long."""

    def score(self, items, reasons=None):
        reasons |= {1: "timed_out", 2: "too_long"}
        return [1.0, None, None]


def test_a_rollout_keeps_the_reasons_of_its_abstentions():
    prompts = [{"id": f"p{n}", "text": "?", "token_ids": [1, n]} for n in range(3)]
    m1, sampling = Checkpoint(path="m1", version="m1"), Sampling(temperature=1.0, max_tokens=4)
    rollout = sample(Words("words", None), m1, prompts, sampling, Slow(), step=0, seed="0")  # type: ignore[arg-type]
    assert (rollout.rewards, rollout.reasons) == ([1.0, None, None], {1: "timed_out", 2: "too_long"})


def test_the_manifest_counts_abstentions_by_their_reasons():
    times = dict.fromkeys(["seconds", "generate_s", "reward_s", "train_s", "sync_s"], 1.0)
    counts = {"num_responses": 10, "num_abstained": 6, "num_too_long": 1, "num_timed_out": 4}
    curve = [
        {"step": 0},
        *({"step": n, "reward": 1.0, "kl": 0.1, "sampler_difference": 0.0} | times | counts for n in (1, 2)),
    ]
    fitted = FitMetrics(num_steps=2, first_loss=1.0, final_loss=1.0, fit_s=2.0)
    found = summarise(curve, fitted, PpoConfig())
    assert (found.num_responses, found.num_abstained, found.num_too_long, found.num_timed_out) == (20, 12, 2, 8)
