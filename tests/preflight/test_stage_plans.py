"""Stages of the plan, what each reserves, and whether fleets stay up beside trainings."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rayrl.algorithms.selection import STRATEGIES, Selection, Strategy
from rayrl.config import load_config
from rayrl.errors import ConfigError, ResourceError
from rayrl.preflight import Cluster, check
from rayrl.preflight.stage_plans import plan_stages
from rayrl.runs import stage_table
from rayrl.runs.stage_table import GENERATORS, Stage, policy_embedders, stages_of
from tests.preflight.trees import (
    EVALUATOR,
    FUNCTION,
    PAIRS,
    TWO_CPUS,
    changed,
    pairs_of,
    plan_of,
    refusal,
    save_model,
)

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.toml"))
LARGE = Cluster(nodes=({"CPU": 512.0, "GPU": 512.0},) * 8)
FILE_OF_PAIRS = {"preferences": {"source": "data", "data": {"path": "pairs.jsonl"}}}


def expected(config):
    return [stage.name for stage, number in stages_of(config) if number == 1]


def planned(config, cluster=LARGE):
    return {stage.name: stage for stage in plan_stages(config, cluster).stages}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_stages_of_our_own_configs_are_those_of_the_table(path):
    config = load_config(str(path), [])
    stages = planned(config)
    assert list(stages) == expected(config)
    assert all(stage.what != name for name, stage in stages.items()), "each has a text"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rounds": 2},
        {"labels": "expert"},
        {"labels": "direct", "select__unit": "prompt"},
        {"labels": "shuffled"},
        {"pseudo_label__synthetic": True},
        {"seed_data": {"path": "seed.jsonl"}, "generate__source": "seed", "sft__enabled": True},
    ],
    ids=str,
)
def test_the_stages_of_proxy_dpo_are_those_of_the_table(tree, changes):
    config = changed(tree, **changes)
    assert list(planned(config)) == expected(config)


@pytest.mark.parametrize("method", ["spg", "uml", "reward_pairs", "self_judged", "ocrm", "none"])
@pytest.mark.parametrize("changes", [{}, FILE_OF_PAIRS, {"evaluate__diagnosis_budget": 36}], ids=str)
def test_the_stages_of_rlp_are_those_of_the_table(rlp_tree, method, changes):
    config = changed(rlp_tree, refresh__method=method, **changes)
    stages = planned(config)
    assert list(stages) == expected(config)
    assert all(stage.what != name for name, stage in stages.items())


@pytest.mark.parametrize(
    "changes", [FUNCTION, EVALUATOR, EVALUATOR | {"rounds": 3, "evaluator__type": "scalar"}], ids=str
)
def test_the_stages_of_ppo_on_other_rewards_are_those_of_the_table(rlp_tree, changes):
    config = changed(rlp_tree, **changes)
    assert list(planned(config)) == expected(config)


def test_a_stage_that_the_table_gains_is_planned_by_itself(tree, monkeypatch):
    added = Stage(
        name="added",
        metrics=stage_table.DPO.metrics,
        occurs=lambda config, number: config.pipeline == "proxy_dpo",
        training=lambda config: replace(stage_table.DPO.training(config), section="added"),
        fleets=lambda config: (GENERATORS, policy_embedders("last")),
    )
    monkeypatch.setattr(stage_table, "STAGES", (*stage_table.STAGES[:-1], added, stage_table.STAGES[-1]))
    config = changed(tree, pseudo_label__mode="alternate", embedders__num_replicas=3)
    stages = planned(config)
    assert list(stages)[-2:] == ["added", "evaluate"]
    assert (stages["added"].what, stages["added"].num_gpus, stages["added"].num_cpus) == ("added", 1, 1)
    message = refusal(ResourceError, changed(tree, generators__num_replicas=1, dpo__num_workers=4), {"CPU": 4.0})
    assert message.startswith("stage dpo"), "in the order of the table"
    beside = planned(changed(tree, pseudo_label__mode="overlap", policy__dtype="float32", embedders__num_replicas=2))
    assert beside["added"].num_gpus == 1 + 1 + 2
    assert beside["evaluate"].num_gpus == 1 + 2 + 2, "its fleets stay up"


@pytest.mark.parametrize(("reads_vectors", "num_gpus"), [(True, 3), (False, 0)])
def test_a_strategy_that_is_added_is_planned_by_what_it_reads(tree, monkeypatch, reads_vectors, num_gpus):
    def first(pool, num_selected, knowledge):
        return Selection(ids=np.sort(pool)[:num_selected].tolist(), radii=[])

    monkeypatch.setitem(STRATEGIES, "first", Strategy(choose=first, reads_vectors=reads_vectors))
    config = changed(tree, select__strategy="first", embedders__num_replicas=3, pseudo_label__mode="alternate")
    select = planned(config)["select"]
    assert select.what.startswith("first") and select.num_gpus == num_gpus
    assert ("prompt_response" in select.what) == reads_vectors
    rlp = changed(tree, pipeline="rlp", ppo__reward="evaluator", select__strategy="first", embedders__num_replicas=3)
    assert planned(rlp)["select"].num_gpus == (1 + 3 if reads_vectors else 0)
    assert planned(rlp)["fit_evaluator"].num_gpus == 1 + 1, "what only selects has ended"


def test_a_selection_by_the_last_rounds_evaluator_is_planned_with_the_generators_that_serve_it(tree):
    by_evaluator = {"rounds": 2, "select__strategy": "entropy", "pseudo_label__mode": "alternate"}
    alone = planned(changed(tree, **by_evaluator, select__first_batch="random", generators__num_replicas=2))["select"]
    assert (alone.what, alone.num_gpus) == ("entropy, the first round by random", 2)
    both = changed(tree, **by_evaluator, select__first_batch="k_center", embedders__num_replicas=3)
    assert planned(both)["select"].num_gpus == 3, "in turn: the larger one of generators and embedders"


def test_fleets_of_mode_overlap_stay_up_and_those_of_alternate_do_not(tree):
    tree["policy"]["dtype"] = "float32"
    overlap, alternate = (planned(changed(tree, pseudo_label__mode=mode)) for mode in ("overlap", "alternate"))
    gpus = {name: (stage.num_gpus, alternate[name].num_gpus) for name, stage in overlap.items()}
    assert gpus == {
        "pool": (0, 0),
        "generate": (1, 1),
        "select": (2, 1),
        "query": (0, 0),
        "fit_evaluator": (3, 1),
        "pseudo_label": (2, 1),
        "dpo": (3, 1),
        "evaluate": (2, 1),
    }
    scalar = planned(changed(tree, pseudo_label__mode="alternate", evaluator__type="scalar", embedders__num_replicas=4))
    assert (scalar["fit_evaluator"].num_gpus, scalar["evaluate"].num_gpus) == (1, 4), "the larger of its two fleets"


def test_an_ensemble_is_one_row_and_a_ready_made_reward_model_is_only_served(rlp_tree):
    ensemble = planned(changed(rlp_tree, reward_model__num_members=3))["fit_reward_model"]
    assert (ensemble.num_gpus, ensemble.what) == (1 + 1, "Bradley-Terry from M1, 3 members, mean")
    ready = planned(changed(rlp_tree, reward_model__path="r", embedders__num_replicas=2))["fit_reward_model"]
    assert (ready.num_gpus, ready.num_cpus, ready.what) == (1 + 2, 0, "a ready-made reward model")


def test_synthetic_pairs_are_a_stage_of_the_plan(tree):
    entailing = changed(tree, pseudo_label__synthetic=True, refresh__spg__entailment_model="/nowhere/nli")
    assert "refresh.spg.entailment_model must be a model folder" in refusal(ConfigError, entailing)
    synthetic = changed(tree, pseudo_label__synthetic=True, refresh__spg={"clustering": "embedding", "gamma": 0.4})
    plan = check(synthetic, cluster=TWO_CPUS)
    names = [stage.name for stage in plan.stages]
    assert names.index("fit_evaluator") < names.index("synthesize") < names.index("pseudo_label")
    (stage,) = (stage for stage in plan.stages if stage.name == "synthesize")
    assert "embedding" in stage.what and "gamma 0.4" in stage.what
    assert plan.mode == "overlap"


@pytest.mark.parametrize(
    ("changes", "cluster", "message"),
    [
        (
            {"dpo__num_workers": 2},
            {"CPU": 2.0},
            r"stage dpo \(2 worker.*needs CPU: 2 and 1 free for Ray Data.* has 2;",
        ),
        (
            {"evaluator__num_workers": 4},
            {"CPU": 9.0, "GPU": 2.0},
            "fit_evaluator .* needs GPU: 4, .* has 2; lower eval",
        ),
        (
            {"generators__num_replicas": 3},
            {"CPU": 9.0, "GPU": 2.0},
            "generate .* GPU: 3.*lower generators.num_replicas",
        ),
        (
            {"generators__num_replicas": 3, "generators__gpus_per_replica": 0.6},
            {"CPU": 9.0, "GPU": 2.0},
            "stage generate .* needs GPU: 3",
        ),
        (
            {"generators__max_replicas": 5},
            {"CPU": 9.0, "GPU": 4.0},
            r"stage generate \(5 generator.* needs GPU: 5, .* lower generators.max_replicas",
        ),
        (
            {"generators__num_replicas": 2, "generators__cpus_per_replica": 2.0},
            {"CPU": 4.0},
            "stage generate .* needs CPU: 4 and 1 free for Ray Data",
        ),
        (
            {"pseudo_label__mode": "overlap", "policy__dtype": "float32", "dpo__num_workers": 2},
            {"CPU": 9.0, "GPU": 3.0},
            'stage dpo .*beside 1 generator.* needs GPU: 4, .*pseudo_label.mode = "alternate"',
        ),
        (
            {"pseudo_label__mode": "overlap", "policy__dtype": "float32", "evaluator__num_workers": 2},
            {"CPU": 9.0, "GPU": 3.0},
            "stage fit_evaluator .*beside 1 generator.* needs GPU: 4, .* lower evaluator.num_workers or generators",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(tree, changes, cluster, message):
    assert re.search(message, refusal(ResourceError, changed(tree, **changes), cluster))


def test_entailment_replicas_are_counted_where_they_run(tree, tmp_path):
    labels = {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}
    tree |= {"refresh": {"spg": {"entailment_model": save_model(tmp_path / "nli", id2label=labels), "num_replicas": 3}}}
    tree |= {"pseudo_label": {"synthetic": True}}
    tree["policy"]["dtype"] = "float32"
    two, four, five = ({"CPU": 9.0, "GPU": float(num)} for num in (2, 4, 5))
    message = refusal(ResourceError, changed(tree), two)
    assert "stage synthesize (3 entailment model(s)) needs GPU: 3, and the cluster has 2; lower refresh.spg" in message
    assert check(changed(tree), cluster=four).mode == "alternate", "alone they have room"
    message = refusal(ResourceError, changed(tree, pseudo_label__mode="overlap"), four)
    assert "stage synthesize (3 entailment model(s), beside 1 generator(s) and 1 embedder(s)) needs GPU: 5" in message
    assert check(changed(tree), cluster=five).mode == "overlap"
    for fewer in ({"num_replicas": 2}, {"clustering": "embedding"}):
        spg = changed(tree, **{f"refresh__spg__{name}": value for name, value in fewer.items()})
        assert check(spg, cluster=four).mode == "overlap"


def test_every_model_that_embeds_has_a_fleet_of_its_own(tree, tmp_path):
    tree |= {"pseudo_label": {"synthetic": True}, "refresh": {"spg": {"clustering": "embedding"}}}
    tree["policy"]["dtype"] = "float32"
    three, four = ({"CPU": 9.0, "GPU": float(num)} for num in (3, 4))
    assert check(changed(tree), cluster=three).mode == "overlap", "one fleet selects and clusters"
    other = changed(tree, refresh__spg__embedder=save_model(tmp_path / "sentences"))
    assert check(other, cluster=three).mode == "alternate"
    assert check(other, cluster=four).mode == "overlap"


def test_gpu_settings_ray_cannot_give_are_refused(tree):
    config = changed(tree, generators__gpus_per_replica=0.75, generators__tensor_parallel_size=2)
    assert "at most 1 or whole, got 1.5; change one of the three" in refusal(
        ConfigError, config, {"CPU": 9.0, "GPU": 8.0}
    )


def test_the_mode_follows_the_cluster_and_the_reference(tree):
    one, three = {"CPU": 9.0, "GPU": 1.0}, {"CPU": 9.0, "GPU": 3.0}
    float32 = changed(tree, policy__dtype="float32")
    assert check(float32, cluster=three).mode == "overlap"
    assert check(float32, cluster=one).mode == "alternate"
    bfloat16 = check(changed(tree), cluster=three)  # "auto" is bfloat16 on a GPU
    assert (bfloat16.mode, bfloat16.reference) == ("alternate", "pass")
    assert check(changed(tree, dpo__reference="pass"), cluster=TWO_CPUS).mode == "alternate"
    message = refusal(ConfigError, changed(tree, pseudo_label__mode="overlap", dpo__reference="pass"))
    assert 'pseudo_label.mode must be "auto" or "alternate"' in message


@pytest.mark.parametrize(
    ("changes", "fits", "num_gpus", "message"),
    [
        # one generator and one trainer of r, while M1's responses are compared; a file of pairs needs no generator
        (
            {"reward_model__num_workers": 3, "refresh__method": "none"},
            {"preferences__source": "data"},
            3,
            "stage fit_reward_model .*3 worker.*beside 1 gener.* needs GPU: 4, .* lower reward_model.num_workers or",
        ),
        (
            {"reward_model__num_workers": 2},
            {"refresh__method": "none"},
            3,
            r"stage refit_reward_model .*beside 1 generator\(s\) and 1 embedder\(s\)\) needs GPU: 4",
        ),
        (
            {"refresh__spg__num_replicas": 2, "select__pooling": "last"},
            {"refresh__spg__clustering": "embedding"},
            3,
            r"stage synthesize \(2 entailment model\(s\), beside .* needs GPU: 4, .* lower refresh.spg.num_replicas or",
        ),
        # embeddings that pool otherwise than the reward model does have a fleet of their own
        (
            {"refresh__spg__clustering": "embedding", "embedders__num_replicas": 2},
            {"select__pooling": "last"},
            4,
            "stage synthesize .* needs GPU: 5",
        ),
        # and they are what is tried where entailment accepts nothing
        ({"embedders__num_replicas": 2}, {"select__pooling": "last"}, 4, "stage synthesize .* needs GPU: 5"),
        (
            {"ppo__num_workers": 2},
            FUNCTION,
            3,
            r"stage ppo \(2 worker.* needs GPU: 4, .* lower ppo.num_workers or generators.num_replicas or embedders",
        ),
        (
            EVALUATOR | {"evaluator__type": "scalar", "ppo__num_workers": 2},
            {"evaluator__type": "generative"},
            3,
            "GPU: 4",
        ),
        # in a later round the replicas that reward are up from the first one on
        (
            {"reward_model__num_workers": 2, "refresh__method": "none", "rounds": 2},
            {"rounds": 1},
            3,
            r"stage fit_reward_model .*beside 1 generator\(s\) and 1 embedder\(s\)\) needs GPU: 4",
        ),
        (
            {"select__strategy": "k_center", "embedders__num_replicas": 2, "rounds": 2},
            {"rounds": 1, "select__pooling": "last"},
            4,
            "stage select .* needs GPU: 5",
        ),
        (
            EVALUATOR | {"evaluator__type": "scalar", "evaluator__num_workers": 2, "rounds": 2},
            {"rounds": 1},
            3,
            "stage fit_evaluator .* needs GPU: 4",
        ),
        (EVALUATOR | {"evaluator__num_workers": 3}, {"evaluator__num_workers": 2}, 3, "fit_evaluator .* needs GPU: 4"),
        (
            EVALUATOR | {"select__strategy": "k_center", "embedders__num_replicas": 3},
            {"select__strategy": "random"},
            3,
            "stage select .* needs GPU: 4",
        ),
    ],
)
def test_a_stage_without_room_beside_the_fleets_is_refused(rlp_tree, tmp_path, changes, fits, num_gpus, message):
    cluster = {"CPU": 9.0, "GPU": float(num_gpus)}
    rlp_tree["preferences"] = pairs_of(tmp_path, PAIRS) | {"source": "oracle"}
    found = refusal(ResourceError, changed(rlp_tree, **changes), cluster)
    assert re.search(message, found), found
    plan_of(rlp_tree, cluster, **changes | fits)


def test_the_reference_of_a_quantised_policy_is_read_by_the_trainer(tree):
    dpo = {"policy__dtype": "float32", "dpo__lora": {"quantization": "nf4"}, "pseudo_label__mode": "alternate"}
    assert plan_stages(changed(tree, **dpo), LARGE).reference == "pass"
    refused = refusal(ConfigError, changed(tree, **dpo | {"pseudo_label__mode": "overlap"}))
    assert "dpo.lora.quantization" in refused
