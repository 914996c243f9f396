"""Studies that are refused before any work: field, rule, value, remedy."""

import fsspec
import pytest

from rayrl.errors import ConfigError, DataError
from rayrl.study.config import load_study, run_config
from rayrl.study.label_configs import asking_config
from tests.study.made_up import write_pool, write_rows, write_study


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    write_pool(folder)
    return folder


def refusal(folder, *overrides, study=""):
    with pytest.raises(ConfigError) as refused:
        load_study(write_study(folder, study=study), list(overrides))
    return str(refused.value).replace(": must", " must")


def planned(folder, *overrides, study="", oracle=None):
    from rayrl.study.label_study import plan_labels

    return plan_labels(load_study(write_study(folder, study=study, oracle=oracle), list(overrides)))


@pytest.mark.parametrize("name", ["labels", "graded", "pandalm", "prometheus", "proxy_dpo", "rlp", "overoptimisation"])
def test_the_shipped_studies_are_loaded(name):
    study = load_study(f"jobs/configs/studies/{name}.toml")
    config = asking_config(study, study.points()[0]) if study.kind == "labels" else run_config(study)
    assert config.name and study.baseline in study.arms


def test_a_study_is_loaded(pool):
    study = load_study(write_study(pool), ["seeds=[3,4,5]", "grid.select.batches=[1,4]"])
    assert (study.arms, study.seeds, study.measured[0]) == (["random", "k_center"], [3, 4, 5], "pair_accuracy")
    assert study.points() == [(("select.batches", 1),), (("select.batches", 4),)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('strategies=["randomm"]', 'strategies must be of "'),
        ("strategys=[]", "strategys: unknown key; did you mean strategies?"),
        ("strategies=[]", "strategies is empty: name what is compared"),
        ('strategies=["random", "entropy"]', "must be of those that read no evaluator of an earlier round where kind"),
        ("baseline=uncertainty", 'baseline must be one of "random", "k_center", got "uncertainty"'),
        ('rows=["other"]', 'rows must be of "random", "k_center", got "other"'),
        ('rows=["k_center"]', 'baseline must be one of "k_center", got "random"'),
        ("budgets=[20,10]", "budgets must be whole numbers above 0, ascending, each once, got [20, 10]"),
        ("budgets=[]", "budgets is empty"),
        (
            "seeds=[0]",
            "seeds must be two or more where intervals are asked for, got [0]; add one, or set intervals = false",
        ),
        ("seeds=[1,1]", "seeds must name each once, got 1 twice"),
        (
            "grid.dpo.beta=[0.1,0.2]",
            'select.num_heads where kind is "labels" and the pool has vectors, which cells read',
        ),
        ("grid.select.seed_centers=[false,true]", "which cells read, got select.seed_centers"),
        ("grid.select=[{candidate_batch=1},{candidate_batch=2}]", "which cells read, got select.candidate_batch"),
        ('grid.select.text=["prompt","judge_prompt"]', "which cells read, got select.text"),
        (
            'grid.select.first_batch=["random","k_center"]',
            "grid must not hold select.first_batch where no strategy reads",
        ),
        ("grid.select.budget=[10,20]", "grid must not hold select.budget; write its values into budgets"),
        ("grid.select.strategy=[random,margin]", "must have a list of two values or more"),
        ('grid.select.strategy=["random","margin"]', "must not hold select.strategy; write its values into strategies"),
        ("set.run_dir=here", "set must not hold run_dir, which the study decides for its pools"),
        ("grid.select.batches=[1]", "grid must have a list of two values or more for each setting, got select.batches"),
        ('variants.direct.set.labels="direct"', 'variants must be empty where kind is "labels", got direct'),
        ("resources.max_cells=0", "resources.max_cells must be above 0, got 0"),
        ("evaluator=other", "evaluator must be one of 'head' or 'scalar', got 'other'"),
        (
            "evaluator=scalar",
            "vectors must be left out: M1 is trained, on the tokens of its own pool, where evaluator is",
        ),
        ("set.select.budget=10", 'set must not hold select.budget where kind is "labels", whose cells do not read it'),
        ('set.select={strategy="margin"}', "set must not hold select.strategy where kind is"),
        ('measures=["agreement"]', 'where kind is "labels" and strategies ask for scores, got "agreement"'),
        (
            'strategies=["random","pair_bald"]',
            'got "random", which asks about responses, and "pair_bald", which asks about pairs; leave out those of one',
        ),
    ],
)
def test_a_setting_that_breaks_a_rule_is_named(pool, override, message):
    assert message in refusal(pool, override)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ('kind = "runs"\nresources.max_cells = 2', 'resources.max_cells must be 1 where kind is "runs", got 2'),
        ('kind = "runs"\nset.oracle.ledger = "mine.sqlite"', "set must not hold oracle.ledger"),
        ('kind = "runs"\nset.select.budget = 8', "set must not hold select.budget, which budgets decides"),
        ('kind = "runs"\ngrid.seed = [0, 1]', "grid must not hold seed"),
        ('kind = "runs"\ngrid.oracle = [{ledger = "a"}, {ledger = "b"}]', "grid must not hold oracle.ledger"),
        (
            'kind = "runs"\ngrid.select.budget = [10, 20]',
            "grid must not hold select.budget; write its values into budg",
        ),
        ('kind = "runs"\ngrid.select.strategy = ["random", "margin"]', "write its values into strategies"),
        ('kind = "runs"\nvariants.a.set.oracle.ledger = "mine.sqlite"', "variants.a.set must not hold oracle.ledger"),
        ('kind = "runs"\nvariants.a.set.oracle = {ledger = "mine"}', "variants.a.set must not hold oracle.ledger"),
        ('kind = "runs"\nvariants.a.set.seed = 3', "variants.a.set must not hold seed, which the study decides"),
        ('kind = "runs"\nvariants.a.set.run_dir = "here"', "variants.a.set must not hold run_dir"),
        ('kind = "runs"\nvariants.a.set.name = "mine"', "variants.a.set must not hold name"),
        (
            'kind = "runs"\nvariants.a.set.select.budget = 8',
            "variants.a.set must not hold select.budget, which budgets",
        ),
        (
            'kind = "runs"\nvariants.a.set.dpo.beta = 0.3\ngrid.dpo.beta = [0.1, 0.2]',
            "variants.a.set must not hold dpo.beta, of which the grid has the values",
        ),
        ('kind = "runs"\nvariants.a.reuse = "b"', 'that is run, "random", "k_center", "a", got "b"; correct it, or'),
        (
            'kind = "runs"\nvariants.a.reuse = "b"\nvariants.b.reuse = "c"\nvariants.c.reuse = "a"',
            "variants.a.reuse must not come round, got a -> b -> c -> a; leave one out",
        ),
        ('kind = "runs"\nmeasures = ["agreement_nonsense"]', 'got "agreement_nonsense"; correct it'),
        ('kind = "runs"\nmeasures = ["kl", "gain"]', "measures must begin with gain, score or win_rate"),
        ('kind = "runs"\nmeasures = ["agreement_r_held_out"]', 'got "agreement_r_held_out": the first one is tested'),
        ('kind = "runs"\nvariants.random.title = "same"', "variants must not have the name of a strategy"),
        ('kind = "runs"\ntruth.path = "t.jsonl"', "must be left out where kind is"),
    ],
)
def test_a_study_of_runs_that_breaks_a_rule_is_named(pool, study, message):
    assert message in refusal(pool, *study.split("\n"))


def test_a_setting_of_the_base_config_that_does_not_exist_is_named(pool):
    with pytest.raises(ConfigError, match=r"select\.batchess: unknown key; did you mean batches\?"):
        planned(pool, "set.select.batchess=2")


@pytest.mark.parametrize("overrides", [("seed_centers=true",), ("batches=8", "stop_at=0.9")], ids=str)
def test_a_setting_that_no_cell_of_labels_reads_is_refused(pool, overrides):
    with pytest.raises(ConfigError, match=r'select\.(seed_centers|stop_at) must be left out where kind is "labels"'):
        planned(pool, *(f"set.select.{each}" for each in overrides))


def test_a_row_that_is_not_run_breaks_no_rule():
    study = load_study("jobs/configs/studies/rlp.toml", ['rows=["ppo","ensemble-worst-case","ensemble-mean"]'])
    assert load_study("jobs/configs/studies/rlp.toml", ['rows=["ppo","spg"]']).arms == ["spg", "ppo"]
    assert study.arms[1:] == ["ensemble-mean", "ensemble-worst-case"]
    grid = ('rows=["ppo","spg"]', "grid.refresh.spg.gamma=[0.0,0.5]")  # which another row, "select-all", sets
    assert len(load_study("jobs/configs/studies/rlp.toml", grid).points()) == 2


def test_remote_vectors_are_known_by_what_they_hold(pool):
    remote = fsspec.filesystem("memory")
    keys = []
    for num_lines in (None, -1):
        rows = (pool / "vectors.jsonl").read_text().splitlines()[:num_lines]
        remote.pipe_file("/study/vectors.jsonl", "\n".join(rows).encode())
        keys.append(planned(pool, 'vectors.path="memory://study/vectors.jsonl"').jobs[0].pool)
    assert keys[0] != keys[1]


def test_a_budget_beyond_the_pool_is_refused(pool):
    with pytest.raises(DataError, match=r"budgets must be at most the number of responses .*, 112 .*, got 113"):
        planned(pool, "budgets=[113]")


def test_a_strategy_that_needs_labels_first_is_refused_without_a_first_batch(pool):
    with pytest.raises(ConfigError, match=r"uncertainty.*first_batch"):
        planned(pool, 'strategies=["random","uncertainty"]')
    batches = ("set.select.first_batch=random", "set.select.batches=2")
    by_arm = {job.cell.arm: job for job in planned(pool, 'strategies=["random","uncertainty"]', *batches).jobs}
    assert (by_arm["uncertainty"].first, by_arm["uncertainty"].num_batches) == ("random", 2)
    # Each strategy chooses in batches, as a run would; the first batch's is theirs alone that need it.
    assert (by_arm["random"].first, by_arm["random"].num_batches) == (None, 2)
    assert (by_arm["everything"].first, by_arm["everything"].num_batches) == (None, 1)


def test_an_unknown_score_column_is_refused(pool):
    with pytest.raises(DataError, match=r"score column|points"):
        planned(pool, "set.oracle.score_column=points")


def test_a_study_that_may_pay_for_more_than_it_may_is_refused(pool):
    with pytest.raises(ConfigError, match="max_queries must cover the study, which may ask for 160 labels"):
        planned(pool, "max_queries=100")
    # Without the ceiling: two splits of 48 responses, and 2 x 2 x (10 + 20) labels.
    assert planned(pool, "ceiling=false", "budgets=[1,2]").num_queries == 2 * 48 + 2 * 2 * 3
    assert planned(pool, "ceiling=false", "budgets=[1,2]", "split=study").num_queries == 48 + 2 * 2 * 3


def test_vectors_of_two_widths_are_refused(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "r", "vector": [1.0] * (3 if i else 2)} for i in range(2)]
    write_rows(tmp_path / "vectors.jsonl", rows)
    write_rows(tmp_path / "judgements.jsonl", [{"prompt": "p0", "response": "r", "score": 1.0}])
    with pytest.raises(DataError, match=r"row 2.*vectors of one width in all rows, 2 in the first, got 3"):
        planned(tmp_path)


def test_a_base_config_for_comparisons_is_refused(pool):
    with pytest.raises(ConfigError, match="base must be a config whose oracle judges single responses"):
        planned(pool, "set.select.unit=prompt")


def test_a_truth_of_another_kind_is_refused(pool):
    with pytest.raises(ConfigError, match=r"truth\.path is missing: the evaluator is compared with judgements"):
        planned(pool, f"truth.comparisons_path='{pool}/judgements.jsonl'")
    with pytest.raises(DataError, match=r"truth\.path.*points"):
        planned(pool, f"truth.path='{pool}/judgements.jsonl'", "truth.score_column=points")


def test_the_truth_is_in_the_name_of_a_cell_and_pays_for_no_held_out_response(pool):
    truth = f"truth.path='{pool}/judgements.jsonl'"
    assert {job.key for job in planned(pool).jobs}.isdisjoint({job.key for job in planned(pool, truth).jobs})
    assert planned(pool, truth, "ceiling=false", "budgets=[1,2]").num_queries == 2 * 2 * 3
