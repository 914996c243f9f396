"""Fleets of a run: their names and specifications, which of them start early, and their end."""

import pytest

from rayrl.config import RunConfig
from rayrl.errors import FleetError, StageTimeout
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services, fleet_name
from rayrl.records import Checkpoint
from rayrl.runs.stage_table import EVALUATE, GENERATE, GENERATORS, SELECT, FleetUse, policy_embedders

M1 = Checkpoint(path="m1", version="v1")
MEAN = policy_embedders("mean")


def config(select=(), **tables):
    return RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": "nowhere",
            "policy": {"path": "model", "max_model_len": 64},
            "pool": {"path": "pool.jsonl"},
            "sft": {"enabled": False},
            "select": {"budget": 8} | dict(select),
            "oracle": {"type": "scripted", "function": "json:dumps"},
        }
        | tables
    )


class Noted:
    """As much of a run as services read: which stages are finished; and what they record."""

    def __init__(self, config=None, finished=()):
        self.config, self.finished, self.noted = config, finished, []

    def manifest(self, stage):
        return "a manifest" if stage in self.finished else None

    def record_time(self, name, seconds):
        self.noted.append((name, seconds))


class Starting(Services):
    """Notes the fleets that it is to start."""

    def __init__(self, run, mode="overlap"):
        super().__init__(run, mode=mode, reference="generation", on_gpu=False)
        self.started = []

    def fleet(self, use, checkpoint):
        assert checkpoint is M1
        self.started.append(use)


def warmed(config, finished=(), mode="overlap"):
    services = Starting(Noted(config, finished), mode)
    services.warm(M1)
    return services.started


def test_the_engines_of_a_new_run_start_side_by_side():
    assert warmed(config()) == [GENERATORS, MEAN]
    assert warmed(config(select={"pooling": "last"})) == [GENERATORS, policy_embedders("last")]


def test_only_what_unfinished_stages_ask_is_started_early():
    assert warmed(config(), [GENERATE]) == [GENERATORS, MEAN], "the evaluation asks the generators"
    assert warmed(config(), [GENERATE, SELECT]) == [GENERATORS]
    assert warmed(config(), [GENERATE, EVALUATE]) == [MEAN]
    assert warmed(config(), [GENERATE, SELECT, EVALUATE]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"select": {"strategy": "random"}},
        {"select": {"embedder": "some/sentence-model"}},
        {"labels": "expert"},
    ],
)
def test_no_embedder_of_m1_is_started_where_the_selection_asks_none(changes):
    assert warmed(config(**changes)) == [GENERATORS]


def test_nothing_starts_early_where_fleets_take_turns():
    assert warmed(config(), mode="alternate") == []


def test_fleets_have_the_names_of_the_guides():
    sentences = FleetUse(role="embedders", model="some/sentence-model", pooling="mean")
    names = [fleet_name(use, M1) for use in (GENERATORS, MEAN, sentences)]
    assert names == ["generators", "embedders-mean", "sentences-v1-mean"]


def test_engines_are_specified_by_the_configs_table_of_their_role():
    services = Starting(Noted(config(generators={"threads": 2}, embedders={"threads": 3})))
    generator, embedder = services._spec(GENERATORS, M1), services._spec(MEAN, M1)
    assert (generator.config.threads, generator.pooling, generator.max_model_len) == (2, None, 64)
    assert (embedder.config.threads, embedder.pooling, embedder.max_model_len) == (3, "mean", 64)
    assert (generator.checkpoint, generator.dtype, generator.on_gpu) == (M1, "float32", False)
    sentences = services._spec(FleetUse(role="embedders", model="other", pooling="mean"), M1)
    assert sentences.max_model_len is None, "the policy's context is not a sentence model's"


def test_only_the_policy_that_ppo_trains_is_sent_from_memory():
    by_nccl = {"reward": "function", "function": "json:dumps", "weight_transfer": "nccl"}
    services = Starting(Noted(config(pipeline="rlp", ppo=by_nccl)))
    assert services._spec(GENERATORS, M1).weight_transfer == "nccl"
    assert services._spec(MEAN, M1).weight_transfer is None
    assert Starting(Noted(config(ppo=by_nccl)))._spec(GENERATORS, M1).weight_transfer is None


class Ending(Fleet):
    """Reports what is given, or raises it."""

    def __init__(self, name, report):
        super().__init__(name, None)
        self.report, self.is_stopped = report, False

    def hold_ready(self):
        return []

    def statuses(self, leases, timeout_s=0.0):
        if isinstance(self.report, Exception):
            raise self.report
        return self.report

    def wait_ready(self, timeout_s=0.0):
        raise AssertionError("a run that is over waits for no replica")

    def stop(self):
        self.is_stopped = True


@pytest.mark.parametrize("error", [FleetError("its router is gone"), StageTimeout("no report")])
def test_what_a_fleet_does_not_report_at_the_end_fails_no_run(error):
    services = Starting(Noted(config()))
    fleets = {"a": Ending("a", error), "b": Ending("b", [{"swaps_s": [1.0, 2.0]}, {"swaps_s": []}])}
    services._fleets, services._timed = dict(fleets), {"a", "b"}
    services.release()
    assert all(fleet.is_stopped for fleet in fleets.values()) and not services._fleets
    assert services.run.noted == [("swap:b", 1.0), ("swap:b", 2.0)]
