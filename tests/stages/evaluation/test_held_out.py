"""Answers to the held-out prompts, and samples of the policy itself."""

from dataclasses import replace

import pyarrow as pa
import pytest

from rayrl.config import load_config
from rayrl.data.blocks import BlockTable
from rayrl.engines.generator import Continuation
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Pool
from rayrl.stages.evaluation.held_out import answers_of, own_samples

M1, M2 = Checkpoint(path="m1", version="m1"), Checkpoint(path="m2", version="m2")
EOS = 2


class Quiet:
    """A fleet whose policy says nothing at temperatures below 1, and one word otherwise."""

    concurrency = 1

    def generators(self, checkpoint):
        return self

    def call(self, method, checkpoint, prompts, seeds, sampling):
        assert (method, checkpoint, sampling.max_tokens) == ("generate", M2, 48)
        says = sampling.temperature == 1.0 and sampling.top_p == 1.0
        said = Continuation(
            text="word" if says else "",
            token_ids=[7, EOS] if says else [EOS],
            logprob=-2.0 if says else -1.0,
            token_logprobs=[],
            finish_reason="stop",
            versions=["m2"],
            candidates=[],
        )
        return [[said] for _ in prompts]


@pytest.mark.parametrize(("temperature", "is_own"), [(1.0, True), (0.5, False)])
def test_the_kls_samples_are_the_policys_own_and_the_answers_where_those_are(
    ray_cluster, tmp_path, temperature, is_own
):
    overrides = [f"run_dir={tmp_path}", f"evaluate.temperature={temperature}"]
    run = Run(config=load_config("jobs/configs/quickstart.toml", overrides), url=str(tmp_path))
    held_out = BlockTable(str(tmp_path / "held_out"), 1)
    held_out.write(0, pa.Table.from_pylist([{"id": "p", "text": "?", "token_ids": [1, 5]}]))
    pool = Pool(key="pool", train=held_out, held_out=held_out, num_prompts=1, num_eval=1)
    services = Quiet()
    answers = answers_of(run, services, M1, M2, pool, "m2")  # type: ignore[arg-type]
    own = own_samples(run, services, M1, M2, pool, "m2", answers)  # type: ignore[arg-type]
    (sample,) = own
    assert (sample.text, sample.token_ids, sample.logprob) == ("word", [7, EOS], -2.0)
    assert (own is answers) == is_own
    if not is_own:
        # Saying nothing is a choice of the policy's, with a probability.
        assert answers == [replace(sample, text="", token_ids=[EOS], logprob=-1.0)]
