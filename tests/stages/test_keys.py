"""A stage's key names everything that decides its outcome, and nothing else: other work is not taken for it."""

import json

import pytest

from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.records import Checkpoint
from rayrl.runs.stage_table import PPO, SAMPLES
from rayrl.stages.artifacts import Pool, QuerySet, Responses
from rayrl.stages.evaluation.audit_pairs import audit_pairs
from rayrl.stages.evaluation.evaluate import evaluate
from rayrl.stages.evaluation.track_rewards import track_rewards
from rayrl.stages.labelling.comparisons import compare
from rayrl.stages.labelling.query import query
from rayrl.stages.sampling.generate import generate
from rayrl.stages.selection.select import select
from rayrl.stages.synthesis.synthesize import synthesize_preferences
from tests.fakes import FinishedRun

M1, M2 = Checkpoint(path="m1", version="m1"), Checkpoint(path="m2", version="m2")
TABLE = BlockTable("nowhere", 1)
POOL = Pool(key="pool", train=TABLE, held_out=TABLE, num_prompts=8, num_eval=2)
RESPONSES = Responses(key="y", table=TABLE, num_prompts=8, num_responses=16)
QUERY_SET = QuerySet(key="q", table=TABLE)

STAGES = {
    "generate": lambda run: generate(run, None, M1, POOL),
    "samples": lambda run: generate(run, None, M1, POOL, stage=SAMPLES),
    "query": lambda run: query(run, None, QUERY_SET),
    "select": lambda run: select(run, None, M1, RESPONSES),
    "evaluate": lambda run: evaluate(run, None, None, POOL, {"m1": M1, "ppo": M2}, {}),
    "track_rewards": lambda run: track_rewards(run, None, None, {PPO: M2}, {}),
    "audit_pairs": lambda run: audit_pairs(run, None),
    "preferences": lambda run: compare(run, None, RESPONSES, QUERY_SET),
    "synthesize": lambda run: synthesize_preferences(run, None, M1, None, RESPONSES),
}


def key_of(folder, stage, *, share=None, **changes):
    """The key of a stage in a run with some settings changed; `share` is the round's part of the budget."""
    tree = {
        "name": "t",
        "run_dir": str(folder),
        "pipeline": "rlp",
        "policy": {"path": "model"},
        "pool": {"path": "pool.jsonl"},
        "sft": {"enabled": False},
        "select": {"budget": 8},
        "oracle": {"type": "scripted", "function": "a:b"},
        "preferences": {"source": "oracle"},
        "evaluate": {"diagnosis_budget": 100},
    }
    for dotted, value in changes.items():
        *sections, name = dotted.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    run = FinishedRun(config=RunConfig.model_validate(json.loads(json.dumps(tree))), url=str(folder), share=share)
    STAGES[stage](run)
    return run.keys[stage]


@pytest.mark.parametrize("stage", ["query", "select", "evaluate", "track_rewards", "audit_pairs"])
def test_a_rubric_is_its_text_wherever_it_lies(tmp_path, stage):
    keys = []
    for name, text in (("a", "{prompt} {response}"), ("b", "{prompt} {response}"), ("c", "{response} {prompt}")):
        (tmp_path / name).write_text(text)
        keys.append(key_of(tmp_path, stage, rubric__template=str(tmp_path / name)))
    assert keys[0] == keys[1] != keys[2]


def test_comparisons_are_named_by_their_own_rubric(tmp_path):
    keys = [key_of(tmp_path, "preferences")]
    for name, text in (
        ("a", "{prompt} {first} {second}"),
        ("b", "{prompt} {first} {second}"),
        ("c", "{first} or {second}? {prompt}"),
    ):
        (tmp_path / name).write_text(text)
        keys.append(key_of(tmp_path, "preferences", rubric__pairwise_template=str(tmp_path / name)))
    assert keys[1] == keys[2] and len(set(keys)) == 3


def test_an_evaluation_is_named_by_the_wording_of_its_comparisons_if_it_has_any(tmp_path):
    stage = "evaluate"
    (tmp_path / "mine").write_text("{prompt} {first} {second}")
    mine = {"rubric__pairwise_template": str(tmp_path / "mine")}
    references = {"evaluate__reference_answers": {"path": "answers.jsonl"}}
    compares = {"oracle__compare_function": "a:c"}
    assert key_of(tmp_path, stage, **references, **compares) != key_of(
        tmp_path, stage, **references, **compares, **mine
    )
    for without in ({}, references, compares):
        assert key_of(tmp_path, stage, **without) == key_of(tmp_path, stage, **without, **mine)


@pytest.mark.parametrize("stage", ["query", "evaluate", "track_rewards", "audit_pairs", "preferences"])
def test_another_oracle_is_other_work(tmp_path, stage):
    assert key_of(tmp_path, stage) != key_of(tmp_path, stage, oracle__function="a:c")


def test_a_longer_run_selects_as_the_shorter_one_whose_labels_it_reuses(tmp_path):
    shorter = key_of(tmp_path, "select", select__budget=4)
    assert key_of(tmp_path, "select", share=4, select__budget=8, rounds=2) == shorter
    assert key_of(tmp_path, "select", select__budget=8) != shorter
    assert key_of(tmp_path, "select", select__budget=4, select__strategy="random") != shorter


def test_answers_depend_on_how_they_are_sampled(tmp_path):
    stage = "evaluate"
    base = key_of(tmp_path, stage)
    assert base != key_of(tmp_path, stage, generate__max_tokens=7)
    assert base != key_of(tmp_path, stage, generate__top_p=0.5)
    assert base != key_of(tmp_path, stage, evaluate__temperature=0.1)
    assert base == key_of(tmp_path, stage, generate__k=9) == key_of(tmp_path, stage, generate__temperature=0.1)


def test_synthetic_pairs_depend_on_what_makes_them(tmp_path):
    def changed(method, **changes):
        before = key_of(tmp_path, "synthesize", refresh__method=method)
        return before != key_of(tmp_path, "synthesize", refresh__method=method, **changes)

    assert changed("spg", select__pooling="last") and changed("spg", refresh__spg__gamma=0.7)
    assert not changed("self_judged", select__pooling="last") and not changed("spg", evaluator__num_samples=7)
    assert changed("self_judged", evaluator__num_samples=7)
    assert changed("self_judged", evaluator__max_rationale_tokens=7)
    assert not changed("reward_pairs", evaluator__num_samples=7)


OPERATION = {
    "oracle__timeout_s": 7.0,
    "oracle__max_retries": 9,
    "oracle__requests_per_minute": 60,
    "oracle__max_concurrency": 3,
    "oracle__max_unreadable": 2,
    "oracle__ledger": "elsewhere.sqlite",
    "generators__num_replicas": 3,
    "select__num_shards": 4,
    "ppo__num_workers": 2,
    "reward_model__micro_batch_tokens": 64,
    "refresh__spg__num_replicas": 2,
    "name": "other",
}
"""Settings of how a run is carried out, with other values than in `key_of`."""


@pytest.mark.parametrize("stage", STAGES)
def test_the_operation_of_a_run_is_in_no_key(tmp_path, stage):
    key = key_of(tmp_path, stage)
    assert {setting: key_of(tmp_path, stage, **{setting: value}) for setting, value in OPERATION.items()} == (
        dict.fromkeys(OPERATION, key)
    )


@pytest.mark.parametrize(
    ("stage", "fleet", "settings"),
    [
        ("generate", "generators", {}),
        ("samples", "generators", {"refresh__method": "uml"}),
        ("evaluate", "generators", {}),
        ("evaluate", "embedders", {}),  # they serve the rewards that are measured
        ("track_rewards", "embedders", {}),
        ("select", "embedders", {}),
        ("synthesize", "embedders", {"refresh__method": "spg"}),
    ],
)
def test_the_arguments_of_engines_are_in_the_key_of_what_they_make(tmp_path, stage, fleet, settings):
    def key(engine_args):
        return key_of(tmp_path, stage, **settings, **{f"{fleet}__engine_args": engine_args})

    keys = [key_of(tmp_path, stage, **settings), key({"quantization": "fp8"}), key({"quantization": "awq"})]
    assert len(set(keys)) == 3
    assert key({}) == keys[0]
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("stage", "fleet", "settings"),
    [
        ("generate", "embedders", {}),
        ("select", "generators", {}),
        ("select", "embedders", {"select__strategy": "random"}),
        ("query", "generators", {}),
    ],
)
def test_the_arguments_of_other_engines_are_not(tmp_path, stage, fleet, settings):
    changed = {f"{fleet}__engine_args": {"quantization": "fp8"}}
    assert key_of(tmp_path, stage, **settings) == key_of(tmp_path, stage, **settings, **changed)


@pytest.mark.parametrize("stage", ["query", "evaluate", "preferences"])
def test_the_judge_is_in_the_key(tmp_path, stage):
    http = {"type": "http", "base_url": "http://a/v1", "model": "a"}
    key = key_of(tmp_path, stage, oracle=http)
    others = [{"model": "b"}, {"temperature": 0.5}, {"extra_body": {"top_k": 1}}, {"answer": "json"}]
    keys = [key_of(tmp_path, stage, oracle=http | other) for other in others]
    assert len({key, *keys}) == 1 + len(others)
    prices = {"usd_per_1m_input": 1.0, "usd_per_1m_output": 1.0}
    same = [{"base_url": "http://b/v1"}, {"api_key_env": "none"}, {"max_tokens": 9}, prices]
    assert {key_of(tmp_path, stage, oracle=http | other) for other in same} == {key}


def test_the_order_of_a_dictionary_is_in_no_key(tmp_path):
    http = {"type": "http", "base_url": "http://a/v1", "model": "a"}
    one = http | {"extra_body": {"top_k": 1, "nested": {"x": 1, "y": [{"b": 1, "a": 2}]}}}
    other = http | {"extra_body": {"nested": {"y": [{"a": 2, "b": 1}], "x": 1}, "top_k": 1}}
    assert key_of(tmp_path, "query", oracle=one) == key_of(tmp_path, "query", oracle=other)
