"""The facts of a run of the second pipeline, and what its reader is warned of."""

import json

import pytest

from rayrl.report.rlp_summary import rlp_facts
from rayrl.report.stages import STAGES
from rayrl.report.summary import gain, summarize_run
from tests.report.manifests import edit_metrics, estimate
from tests.report.rlp_run import policy_row, rlp_metrics

ONE_SEED = "One seed: standard errors are over prompts, and another seed's PPO can differ by more."


def edit_policies(run_dir, **changes):
    """Change rows of the evaluation, by policy."""
    policies = rlp_metrics()["evaluate"]["policies"]
    policies["ppo"]["length_controlled_win_rate"] = estimate(0.6, 0.04)
    edit_metrics(run_dir, "evaluate", policies={name: row | changes.get(name, {}) for name, row in policies.items()})


def edit_config(run_dir, **changes):
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | changes))


def caveats(run_dir):
    return summarize_run(str(run_dir))["caveats"]


@pytest.fixture
def good(rlp_run_dir):
    """A run with nothing wrong."""
    edit_policies(rlp_run_dir)
    return rlp_run_dir


def test_a_good_run_is_one_seed_all_the_same(good):
    facts = summarize_run(str(good))
    assert facts["caveats"] == [ONE_SEED]
    assert gain(facts) == facts["rlp"]["gain"] == policy_row(2.89, 0.79, 5.9)["difference"]
    assert [s["stage"] for s in facts["stages"]] == [
        name for name in STAGES["rlp"] if name not in ("importance", "query", "fit_evaluator")
    ]
    assert facts["seconds"] == 431.0  # without the selection, which the preferences contain


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        ("evaluate", {"num_judged": 40}, "Only 40 prompts were judged"),
        ("evaluate", {"reward_accuracy": {"r": {"ppo": estimate(0.53, 0.05)}}}, "r cannot be shown to tell"),
        ("evaluate", {"reward_accuracy": {"refreshed": {"rlp": estimate(0.5, 0.05)}}}, "The refreshed reward cannot"),
        ("fit_reward_model", {"validation": {"accuracy": estimate(0.55, 0.05)}}, "no better than chance"),
        ("fit_reward_model", {"validation": {"length_correlation": estimate(-0.8, 0.05)}}, "r goes by length: rank"),
        ("fit_reward_model", {"validation": {"accuracy": estimate(0.95, 0.01)}}, "0.950 -> 0.740"),
        (
            "evaluate",
            {"references": {"num_prompts": 20, "policies": {"m1": {"num_abstained": 2}, "rlp": {"num_abstained": 3}}}},
            "did not rank 3 of 20 answers of rlp and the references",
        ),
        ("evaluate", {"references": {"num_prompts": 0, "policies": {}}}, "No judged prompt has a reference answer"),
        ("synthesize", {"num_pairs": 0}, "No synthetic pair was accepted"),
        ("synthesize", {"num_pairs": 0, "embedding_acceptance_rate": 0.4}, "would accept 40%"),
        ("generate", {"num_empty": 700}, "700 of 958 responses are empty"),
    ],
)
def test_each_thing_that_looks_wrong_is_said(good, stage, changes, expected):
    edit_metrics(good, stage, **changes)
    caveat, last = caveats(good)
    assert (expected in caveat or expected in last) and ONE_SEED in (caveat, last)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("rlp", {"kl": estimate(30.0, 1.0)}, "KL of RLP to M1 is large"),
        ("rlp", {"length": 90.0}, "Responses got longer: mean tokens went from 46.8 under M1 to 90 under RLP"),
        ("rlp", {"difference": estimate(0.1, 0.08)}, "The gain of RLP (+0.100 \u00b1 0.080) is not above"),
        (
            "rlp",
            {"difference": estimate(-0.2, 0.08)},
            "The reward of RLP rose from 0.112 to 1.52, but the expert's score did not (-0.200 \u00b1 0.080 over M1)",
        ),
        ("rlp", {"length_controlled_win_rate": None}, "The win rate of RLP is not significant"),
        ("rlp", {"self_bleu": 0.6}, "self-BLEU"),
        ("rlp", {"perplexity": 20.0}, "M1 finds RLP's text unlikely"),
    ],
)
def test_each_policy_is_looked_at(good, name, changes, expected):
    edit_policies(good, **{name: changes})
    (caveat, _) = caveats(good)
    assert expected in caveat


def test_an_ensembles_calibration_is_its_members():
    metrics = {stage: {} for stage in STAGES["rlp"]}
    members = [{"calibration_error": 0.1}, {"calibration_error": 0.2}, {"calibration_error": None}]
    metrics["fit_reward_model"] = {"members": members, "validation": {"calibration_error": 0.9}}
    models = rlp_facts({}, metrics, [], None)["reward_models"]
    assert models["r"]["calibration_error"] == pytest.approx(0.15)
    assert models["refreshed"] == {}


@pytest.mark.parametrize(
    ("refresh", "expected"),
    [
        ({"method": "none"}, "a second PPO on the old reward model"),
        ({"method": "self_judged"}, "RLAIF"),
        ({"method": "reward_pairs"}, "paired with the worst"),
        ({"method": "spg", "spg": {"gamma": 0.0}}, "Select-All"),
        ({"method": "uml", "uml": {"objective": "infomax"}}, "infomax"),
    ],
)
def test_controls_are_named(rlp_run_dir, refresh, expected):
    edit_config(rlp_run_dir, refresh=refresh)
    (control,) = summarize_run(str(rlp_run_dir))["control"]
    assert expected in control


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reward_model": {"num_members": 4, "objective": "worst_case"}}, ["ensemble of 4 reward models, worst case"]),
        ({"ppo": {"reward": "function", "function": "a:b"}}, ["PPO on the function a:b, no reward model"]),
        (
            {"ppo": {"reward": "evaluator"}, "labels": "shuffled"},
            [
                "PPO on an evaluator of actively selected labels, no reward model",
                "shuffled labels: the floor",
                "random selection",
            ],
        ),
        ({}, []),
    ],
)
def test_other_rewards_and_ensembles_are_named(rlp_run_dir, changes, expected):
    edit_config(rlp_run_dir, **changes)
    assert summarize_run(str(rlp_run_dir))["control"] == expected


def test_without_a_refresh_the_second_ppo_answers_to_the_old_reward_model(good):
    edit_config(good, refresh={"method": "none"})
    edit_metrics(good, "evaluate", reward_accuracy={"r": {"rlp": estimate(0.5, 0.05)}})
    (caveat, _) = caveats(good)
    assert caveat.startswith("r cannot be shown to tell answers of second PPO")


def test_stages_follow_the_config(tmp_path):
    def stages(**config):
        (tmp_path / "config.json").write_text(json.dumps({"pipeline": "rlp"} | config))
        return [stage["stage"] for stage in summarize_run(str(tmp_path))["stages"]]

    full = stages()
    assert "generate" in full and "synthesize" in full and "importance" not in full and "select" not in full
    assert "generate" not in stages(preferences={"source": "data"})
    assert stages(refresh={"method": "none"})[-3:] == ["ppo", "ppo_refreshed", "evaluate"]
    assert "importance" in stages(refresh={"method": "ocrm"})
    diagnosed = stages(evaluate={"diagnosis_budget": 100})
    assert {"track_rewards", "audit_pairs"} <= set(diagnosed) and "track_rewards" not in full
    assert "audit_pairs" not in stages(evaluate={"diagnosis_budget": 100}, refresh={"method": "uml"})
    (tmp_path / "stages" / "fit_reward_model-0").mkdir(parents=True)
    states = {s["stage"]: s["state"] for s in summarize_run(str(tmp_path))["stages"]}
    assert (states["fit_reward_model"], states["ppo"]) == ("started", "not run")
