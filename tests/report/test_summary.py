"""The facts of a run, whatever it has reached, and what its reader is warned of."""

import asyncio
import contextlib
import json
import math
from dataclasses import replace

import fsspec
import pytest

from rayrl.algorithms.selection import STRATEGIES
from rayrl.errors import DataError, RunDirectoryError
from rayrl.oracles.ledger import Ledger
from rayrl.oracles.protocol import Verdict
from rayrl.report.facts import PaidQueries
from rayrl.report.page import render_json
from rayrl.report.recorded_run import read_run
from rayrl.report.summary import summarize_run
from rayrl.runs.run import read_manifest
from rayrl.runs.stage_metrics import LedgerCounts, ReferenceEvaluation, ReferencesEvaluation
from rayrl.runs.stage_table import (
    AUDIT_PAIRS,
    DPO,
    EVALUATE,
    FIT_EVALUATOR,
    FIT_REWARD_MODEL,
    GENERATE,
    PPO,
    PPO_REFRESHED,
    PSEUDO_LABEL,
    SELECT,
    SFT,
    SYNTHESIZE,
    TRACK_REWARDS,
    stages_of,
)
from tests.report.made_up_runs import (
    PROXY_DPO,
    RLP,
    edit_config,
    edit_metrics,
    estimate,
    evaluator_metrics,
    judgement,
    merged,
    policy_evaluation,
    rlp_metrics,
    spent,
    write_config,
    write_manifest,
)

ONE_SEED = "One seed: standard errors are over prompts, and another seed's PPO can differ by more."


def metrics_of(run_dir, stage):
    manifest = read_manifest(str(run_dir), stage)
    assert manifest is not None
    return manifest.metrics


def edit_policy(run_dir, name, **changes):
    """Change what was measured of one policy."""
    policies = metrics_of(run_dir, EVALUATE).policies
    edit_metrics(run_dir, EVALUATE, policies=policies | {name: replace(policies[name], **changes)})


def edit_agreement(run_dir, reward, policy, **changes):
    """Change how one reward agrees with the oracle on one policy's answers."""
    rewards = metrics_of(run_dir, EVALUATE).rewards
    edited = rewards[reward] | {policy: replace(rewards[reward][policy], **changes)}
    edit_metrics(run_dir, EVALUATE, rewards=rewards | {reward: edited})


def edit_label_queries(run_dir, **counts):
    """Change what the evaluation, the last stage, has counted of the label queries."""
    ledger = metrics_of(run_dir, EVALUATE).ledger
    edit_metrics(run_dir, EVALUATE, ledger=ledger | {"label": spent(128, budget=128, **counts)})


def edit_validation(run_dir, **changes):
    """Change what r is worth on held-out pairs."""
    edit_metrics(
        run_dir, FIT_REWARD_MODEL, validation=replace(metrics_of(run_dir, FIT_REWARD_MODEL).validation, **changes)
    )


def caveats(run_dir):
    return summarize_run(str(run_dir)).caveats


def test_a_good_run_has_no_caveats(run_dir):
    facts = summarize_run(str(run_dir))
    assert facts.caveats == []
    assert facts.paid.pairs_per_query == pytest.approx(1163 / 128)
    assert [stage.state for stage in facts.stages] == ["done"] * 9
    assert next((item.num, item.seconds) for item in facts.startup if item.what == "engine:generate") == (
        2,
        pytest.approx(34.2),
    )
    assert [(policy.name, policy.title) for policy in facts.policies] == [("m1", "M1"), ("m2", "M2")]
    assert facts.gain == estimate(0.45, 0.11)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda run: edit_policy(run, "m2", difference=estimate(0.1, 0.08)), "not above two standard errors"),
        (lambda run: edit_policy(run, "m2", difference=estimate(0.5, None)), "no standard error"),
        (
            lambda run: edit_policy(run, "m2", length_controlled_win_rate=estimate(0.52, 0.05)),
            "length may explain it",
        ),
        (lambda run: edit_policy(run, "m2", kl=estimate(40.0, 1.0)), "KL to M1 is large"),
        (lambda run: edit_policy(run, "m2", distinct2=0.2), "distinct-2 went from 0.412"),
        (lambda run: edit_policy(run, "m2", self_bleu=0.5), "self-BLEU"),
        (lambda run: edit_policy(run, "m2", length=90.0), "Responses got longer"),
        (lambda run: edit_policy(run, "m2", length=20.0), "Responses got shorter"),
        (lambda run: edit_policy(run, "m2", perplexity=50.0), "M1 finds M2's text unlikely"),
        (
            lambda run: edit_agreement(run, "evaluator", "m2", spearman=estimate(0.1, 0.1)),
            "on the new policy's responses",
        ),
        (
            lambda run: edit_agreement(run, "evaluator", "m2", accuracy=estimate(0.55, 0.1)),
            "The evaluator cannot be shown to tell answers of M2, trained on it, from M1's",
        ),
        (
            lambda run: edit_metrics(run, FIT_EVALUATOR, validation=evaluator_metrics(estimate(0.2, 0.2)).validation),
            "on held-out judgements",
        ),
        (
            lambda run: edit_label_queries(run, abstained=60),
            "no label to 60 of 128 label queries; 60 were paid",
        ),
        (lambda run: edit_label_queries(run, lost=3), "3 of 128"),
        (lambda run: edit_metrics(run, PSEUDO_LABEL, num_pairs=500), "Only 3.9 preference pairs"),
        (
            lambda run: edit_metrics(run, PSEUDO_LABEL, num_abstained=128, num_too_long=120),
            "120 of 4800 responses exceed the evaluator's context, so that they have no score",
        ),
        (lambda run: edit_metrics(run, GENERATE, num_empty=2000), "2000 of 6943 sampled responses are empty"),
        (lambda run: edit_metrics(run, GENERATE, truncated_share=0.9), "90% of the responses"),
    ],
)
def test_each_thing_that_looks_wrong_is_said(run_dir, edit, expected):
    edit(run_dir)
    (caveat,) = caveats(run_dir)
    assert expected in caveat


def test_synthetic_pairs_that_were_not_accepted_are_missed_by_dpo(run_dir):
    edit_config(run_dir, pseudo_label={"synthetic": True})
    synthesized = rlp_metrics()[SYNTHESIZE]
    write_manifest(run_dir, SYNTHESIZE, replace(synthesized, num_pairs=0, acceptance_rate=0.0))
    assert caveats(run_dir) == ["No synthetic pair was accepted: DPO learnt from the scored pairs alone."]


def test_the_ledger_itself_knows_best(run_dir):
    with contextlib.closing(Ledger(str(run_dir / "ledger.sqlite"), {"label": 128, "evaluate": 128})) as ledger:
        for i, (purpose, score, billed) in enumerate(
            [("label", 3.0, True), ("label", None, True), ("label", None, False), ("evaluate", 1.0, True)]
        ):
            reserved = ledger.reserve(judgement(str(i), purpose), 0.01)
            ledger.commit(reserved, Verdict(score=score, rationale="unclear", billed=billed, cost_usd=0.01))
        ledger.reserve(judgement("open"), 0.01)
        ledger.flush()
        paid = summarize_run(str(run_dir)).paid  # while its owner has it open
    states = {"scored": 1, "abstained": 1, "refunded": 1, "reserved": 1}
    counts = LedgerCounts.from_states(states, budget=128, cost_usd=0.03, abstentions={"unclear": 1})
    assert (paid.label.spent, paid.label.in_flight, paid.label.refunded) == (2, 1, 1)
    assert paid.label == PaidQueries(**(vars(counts) | {"cost_usd": pytest.approx(0.03)}))
    assert (paid.evaluate.budget, paid.evaluate.spent, paid.evaluate.cost_usd) == (128, 1, 0.01)


def test_a_remote_runs_ledger_is_read_as_of_its_last_upload(run_dir):
    memory = fsspec.filesystem("memory")
    memory.put(str(run_dir), "/test_summary", recursive=True)
    with contextlib.closing(Ledger("memory://test_summary/ledger.sqlite", {"label": 128})) as ledger:
        reserved = ledger.reserve(judgement("y"), 0.01)
        ledger.commit(reserved, Verdict(score=3.0, rationale="", billed=True, cost_usd=0.01))
        asyncio.run(ledger.sync())
        paid = summarize_run("memory://test_summary").paid.label
    memory.rm("/test_summary", recursive=True)
    assert (paid.spent, paid.scored, paid.cost_usd) == (1, 1, 0.01)


def test_a_damaged_ledger_leaves_the_manifests_counts(run_dir, caplog):
    (run_dir / "ledger.sqlite").write_bytes(b"no database" * 100)
    assert summarize_run(str(run_dir)).paid.label.spent == 128
    assert "cannot be read" in caplog.text


def test_the_evaluations_ledger_is_the_latest_count(run_dir):
    edit_metrics(run_dir, EVALUATE, ledger={"evaluate": spent(126, budget=128, lost=2)})
    assert summarize_run(str(run_dir)).paid.evaluate.spent == 126


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": "shuffled"}, "the floor"),
        ({"labels": "expert"}, "the ceiling"),
        ({"labels": "direct", "select": {"unit": "prompt"}}, "the paid judgements alone"),
        ({"select": {"strategy": "random"}}, "random selection"),
        ({"generate": {"source": "seed"}}, "off-policy"),
    ],
)
def test_controls_are_named(run_dir, changes, expected):
    edit_config(run_dir, **changes)
    (control,) = summarize_run(str(run_dir)).controls
    assert expected in control


def test_any_strategy_but_the_methods_own_is_a_control(run_dir, monkeypatch):
    assert summarize_run(str(run_dir)).controls == []
    monkeypatch.setitem(STRATEGIES, "evenly_spaced", STRATEGIES["random"])
    edit_config(run_dir, select={"strategy": "evenly_spaced"})
    assert summarize_run(str(run_dir)).controls == ["evenly spaced selection"]


def test_a_run_that_just_began(tmp_path):
    write_config(tmp_path, merged(PROXY_DPO, {"select": {"budget": 8}}))
    table = tmp_path / "stages" / GENERATE.name / "table"
    table.mkdir(parents=True)
    (table / "part-00000.parquet").touch()
    facts = summarize_run(str(tmp_path))
    states = {stage.stage: (stage.state, stage.summary) for stage in facts.stages}
    assert states[SFT.name] == ("not run", None)
    assert states[GENERATE.name] == ("started", "1 blocks done")
    assert facts.paid.label == PaidQueries(budget=8)
    assert facts.gain is None
    assert [policy.title for policy in facts.policies] == ["M1", "M2"]


def test_not_a_number_becomes_null(run_dir):
    edit_metrics(run_dir, DPO, final_loss=math.nan)
    edit_policy(run_dir, "m2", difference=estimate(0.5, None))
    content = render_json(summarize_run(str(run_dir)))
    assert content["metrics"][DPO.name]["final_loss"] is None
    assert content["gain"] == {"mean": 0.5, "standard_error": None, "num": 64}
    json.dumps(content, allow_nan=False)


def test_a_folder_without_a_run_is_refused(tmp_path, run_dir):
    with pytest.raises(RunDirectoryError, match="must be the folder of a run"):
        summarize_run(str(tmp_path / "nowhere"))
    (run_dir / "config.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"must be the folder of a run \(with config.json in it\)"):
        summarize_run(str(run_dir))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"name": "old"}', "policy: Field required"),
        (json.dumps(PROXY_DPO | {"run_dir": "x", "speed": 3}), "speed: Extra inputs are not permitted"),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path, content, reason):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"config\.json must be the resolved config of a run") as refused:
        summarize_run(str(tmp_path))
    assert reason in str(refused.value)


def test_a_damaged_manifest_is_named(run_dir):
    (run_dir / "stages" / SFT.name / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"stages/sft/manifest\.json must be the manifest of a finished stage"):
        summarize_run(str(run_dir))


def test_damaged_timings_are_named(run_dir):
    (run_dir / "timings.json").write_text("[")
    with pytest.raises(DataError, match=r"timings\.json must be JSON"):
        summarize_run(str(run_dir))


@pytest.fixture
def good(rlp_run_dir):
    """A run of the second pipeline with nothing wrong."""
    edit_policy(rlp_run_dir, "ppo", length_controlled_win_rate=estimate(0.6, 0.04))
    return rlp_run_dir


def test_a_good_run_is_one_seed_all_the_same(good):
    facts = summarize_run(str(good))
    assert facts.caveats == [ONE_SEED]
    assert facts.gain == policy_evaluation(2.89, 0.79, 5.9).difference
    assert [stage.stage for stage in facts.stages] == [stage.name for stage in rlp_metrics()]
    assert facts.seconds == 435.0


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda run: edit_metrics(run, EVALUATE, num_judged=40), "Only 40 prompts were judged"),
        (
            lambda run: edit_agreement(run, "r", "ppo", accuracy=estimate(0.53, 0.05)),
            "r cannot be shown to tell",
        ),
        (
            lambda run: edit_agreement(run, "refreshed", "rlp", accuracy=estimate(0.5, 0.05)),
            "The refreshed reward cannot",
        ),
        (lambda run: edit_validation(run, accuracy=estimate(0.55, 0.05)), "no better than chance"),
        (lambda run: edit_validation(run, length_correlation=estimate(-0.8, 0.05)), "r goes by length: rank"),
        (lambda run: edit_validation(run, accuracy=estimate(0.95, 0.01)), "0.950 -> 0.740"),
        (
            lambda run: edit_metrics(
                run,
                EVALUATE,
                references=ReferencesEvaluation(
                    by="random",
                    num_prompts=20,
                    policies={
                        name: ReferenceEvaluation(win_rate=estimate(0.5, 0.1), num_abstained=num)
                        for name, num in (("m1", 2), ("rlp", 3))
                    },
                ),
            ),
            "did not rank 3 of 20 answers of RLP and the references",
        ),
        (
            lambda run: edit_metrics(
                run, EVALUATE, references=ReferencesEvaluation(by="random", num_prompts=0, policies={})
            ),
            "No judged prompt has a reference answer",
        ),
        (lambda run: edit_metrics(run, SYNTHESIZE, num_pairs=0), "No synthetic pair was accepted"),
        (
            lambda run: edit_metrics(run, SYNTHESIZE, num_pairs=0, embedding_acceptance_rate=0.4),
            "would accept 40.0%",
        ),
        (lambda run: edit_metrics(run, GENERATE, num_empty=700), "700 of 1659 sampled responses are empty"),
    ],
)
def test_each_thing_that_looks_wrong_in_the_second_pipeline_is_said(good, edit, expected):
    edit(good)
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
            "The reward of RLP rose from 0.112 to 1.52, but the oracle's score did not (-0.200 \u00b1 0.080 over M1)",
        ),
        ("rlp", {"length_controlled_win_rate": None}, "The win rate of RLP is not significant"),
        ("rlp", {"self_bleu": 0.6}, "self-BLEU"),
        ("rlp", {"perplexity": 20.0}, "M1 finds RLP's text unlikely"),
    ],
)
def test_each_policy_is_looked_at(good, name, changes, expected):
    edit_policy(good, name, **changes)
    (caveat, _) = caveats(good)
    assert expected in caveat


def test_an_ensembles_calibration_is_its_members(good):
    fitted = metrics_of(good, FIT_REWARD_MODEL)
    (member,) = fitted.members
    members = [
        replace(member, validation=replace(member.validation, calibration_error=error)) for error in (0.1, 0.2, None)
    ]
    combined = replace(fitted.validation, calibration_error=0.9)
    edit_metrics(good, FIT_REWARD_MODEL, members=members, validation=combined)
    r, refreshed = summarize_run(str(good)).rewards
    assert (r.model.num_members, r.model.calibration_error) == (3, pytest.approx(0.15))
    assert (refreshed.model.num_members, refreshed.model.calibration_error) == (1, 0.081)


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
def test_controls_of_the_refresh_are_named(rlp_run_dir, refresh, expected):
    edit_config(rlp_run_dir, refresh=refresh)
    (control,) = summarize_run(str(rlp_run_dir)).controls
    assert expected in control


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"reward_model": {"num_members": 4, "objective": "worst_case"}},
            ["ensemble of 4 reward models, worst case"],
        ),
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
    assert summarize_run(str(rlp_run_dir)).controls == expected


def test_without_a_refresh_the_second_ppo_answers_to_the_old_reward_model(good):
    edit_config(good, refresh={"method": "none"})
    edit_agreement(good, "r", "rlp", accuracy=estimate(0.5, 0.05))
    (caveat, _) = caveats(good)
    assert caveat.startswith("r cannot be shown to tell answers of second PPO")


def test_a_run_that_ends_at_plain_ppo_is_for_it(good):
    evaluated = metrics_of(good, EVALUATE)
    two = {name: evaluated.policies[name] for name in ("m1", "ppo")}
    edit_metrics(good, EVALUATE, policies=two, rewards={"r": {"ppo": evaluated.rewards["r"]["ppo"]}}, references=None)
    facts = summarize_run(str(good))
    assert (facts.aligned, facts.aligned_title, facts.gain) == ("ppo", "plain PPO", two["ppo"].difference)


def test_stages_follow_the_config(tmp_path):
    def stages(**changes):
        write_config(tmp_path, merged(RLP, changes))
        return [stage.stage for stage in summarize_run(str(tmp_path)).stages]

    undiagnosed = {"diagnosis_budget": 0}
    full = stages(evaluate=undiagnosed)
    assert GENERATE.name in full and SYNTHESIZE.name in full and "importance" not in full and SELECT.name in full
    file = {"source": "data", "data": {"path": "pairs.jsonl"}}
    assert GENERATE.name not in stages(preferences=file)
    last = [PPO.name, PPO_REFRESHED.name, EVALUATE.name]
    assert stages(refresh={"method": "none"}, evaluate=undiagnosed)[-3:] == last
    assert "importance" in stages(refresh={"method": "ocrm"})
    assert {TRACK_REWARDS.name, AUDIT_PAIRS.name} <= set(stages()) and TRACK_REWARDS.name not in full
    assert AUDIT_PAIRS.name not in stages(refresh={"method": "uml"})
    (tmp_path / "stages" / FIT_REWARD_MODEL.member(0).name).mkdir(parents=True)
    states = {stage.stage: stage.state for stage in summarize_run(str(tmp_path)).stages}
    assert (states[FIT_REWARD_MODEL.name], states[PPO.name]) == ("started", "not run")


def test_both_pipelines_have_one_schema(run_dir, rlp_run_dir):
    def shape(value):
        return set(value) if isinstance(value, dict) else type(value)

    first, second = (render_json(summarize_run(str(folder))) for folder in (run_dir, rlp_run_dir))
    assert first.keys() == second.keys()
    for name in ("paid", "compute", "gain"):
        assert shape(first[name]) == shape(second[name])
    for name in ("policies", "rewards", "stages", "samples"):
        assert shape(first[name][0]) == shape(second[name][0])
    assert first["policies"][0]["name"] == second["policies"][0]["name"] == "m1"


@pytest.mark.parametrize("name", ["run_dir", "rlp_run_dir"])
def test_a_made_up_run_has_the_stages_that_its_config_has(request, name):
    run = read_run(str(request.getfixturevalue(name)))
    assert list(run.manifests) == stages_of(run.config)
    assert all(manifest is not None for manifest in run.manifests.values())


def test_the_facts_are_found_by_name(good):
    facts = summarize_run(str(good))
    assert facts.policy("rlp").title == "RLP" and facts.policy("m2") is None
    assert facts.reward("r").agreement["ppo"].accuracy == estimate(0.66, 0.05, 94) and facts.reward("x") is None
