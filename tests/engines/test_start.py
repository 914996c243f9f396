"""Arguments of vLLM's engines, and the folders that they load."""

import asyncio

import pytest
from huggingface_hub import constants

from rayrl.config import EngineConfig
from rayrl.engines.generator import Generator, Sampling
from rayrl.engines.start import CPU_BATCHED_TOKENS, EngineSpec, engine_arguments, environment, revision_of
from rayrl.engines.weight_folder import is_hub_id, weights_folder
from rayrl.records import Checkpoint

HUB = Checkpoint(path="some/model", version="v", revision="pinned")


def spec(checkpoint=HUB, *, on_gpu=False, max_model_len=None, **config):
    return EngineSpec(
        checkpoint=checkpoint,
        config=EngineConfig(**config),
        dtype="float32",
        max_model_len=max_model_len,
        trust_remote_code=False,
        on_gpu=on_gpu,
    )


def test_a_revision_holds_for_weights_and_tokenizer():
    arguments = engine_arguments(spec(), "fleet")
    assert (arguments["model"], arguments["served_model_name"]) == ("some/model", "fleet")
    assert (arguments["revision"], arguments["tokenizer_revision"]) == ("pinned", "pinned")
    # The benchmark's engine, which reads a policy by other arguments otherwise, is given these.
    assert revision_of(HUB).items() <= arguments.items()
    newest = engine_arguments(spec(Checkpoint(path="some/model", version="v")), "")
    assert not {"revision", "tokenizer_revision"} & newest.keys()
    assert newest["served_model_name"] is None


def test_a_cpu_engine_takes_a_whole_context_in_one_batch():
    assert engine_arguments(spec(max_model_len=512), "")["max_num_batched_tokens"] == CPU_BATCHED_TOKENS
    long = engine_arguments(spec(max_model_len=20_000), "")
    assert (long["max_num_batched_tokens"], long["enable_chunked_prefill"]) == (20_000, False)
    gpu = engine_arguments(spec(on_gpu=True, tensor_parallel_size=2), "")
    assert "max_num_batched_tokens" not in gpu and gpu["distributed_executor_backend"] == "mp"


def test_the_configs_own_arguments_come_last():
    arguments = engine_arguments(spec(engine_args={"seed": 7, "dtype": "half"}), "")
    assert (arguments["seed"], arguments["dtype"]) == (7, "half")


def test_threads_are_set_on_cpus_only():
    assert environment(EngineConfig(threads=3), on_gpu=False)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in environment(EngineConfig(threads=3), on_gpu=True)


def test_a_process_on_cpus_sees_no_gpu():
    assert environment(EngineConfig(), on_gpu=False)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in environment(EngineConfig(), on_gpu=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with two revisions of one model."""
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("pinned", "b" * 40)):
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots"


def test_a_swap_loads_the_pinned_or_else_the_newest_revision_of_a_hub_id(hub):
    assert weights_folder(HUB) == str(hub / ("b" * 40))
    assert weights_folder(Checkpoint(path="some/model", version="v")) == str(hub / ("a" * 40))


def test_a_folder_has_no_revision(tmp_path):
    assert weights_folder(Checkpoint(path=str(tmp_path), version="v", revision="pinned")) == str(tmp_path)
    assert [is_hub_id(path) for path in ("some/model", str(tmp_path), "s3://bucket/model")] == [True, False, False]


class Asked(Exception):
    """Carries the parameters of a request that is not made."""


class Asking(Generator):
    """A replica without an engine."""

    version = "v"

    def __init__(self, end_of_turn):
        self._end_of_turn = end_of_turn

    async def _finish(self, token_ids, params):
        raise Asked(params)


def test_generation_stops_at_the_end_of_a_turn_besides_the_ends_that_the_model_lists():
    with pytest.raises(Asked) as asked:
        asyncio.run(Asking(9)._sample([1, 2], 0, Sampling(temperature=1.0, max_tokens=8), 0))
    (params,) = asked.value.args
    assert params.stop_token_ids == [9]
    params.update_from_generation_config({"eos_token_id": [2, 5]}, 2)
    assert params.all_stop_token_ids == {2, 5, 9}
