from pathlib import Path

import pytest
from pydantic import ValidationError

from rayrl.config import HttpOracleConfig, RunConfig, ScriptedOracleConfig, TrainingConfig, load_config
from rayrl.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.toml"))
SMALL = """
name = "small"
run_dir = "/runs/small"
policy.path = "model"
pool.path = "pool.jsonl"
sft.enabled = false
select.budget = 8

[oracle]
type = "scripted"
function = "judges:length"
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path):
    assert load_config(path).name


def test_a_small_file_gets_the_defaults(small):
    config = load_config(small)
    assert (config.select.budget, config.select.strategy, config.generate.k) == (8, "k_center", 4)
    assert isinstance(config.oracle, ScriptedOracleConfig)
    assert (config.sft.learning_rate, config.dpo.learning_rate) == (2e-5, 1e-6)


def test_a_config_is_frozen_and_survives_json(small):
    config = load_config(small)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.buget=4", "select.buget: unknown key; did you mean budget?"),
        ("selekt.budget=4", "selekt: unknown key; did you mean select?"),
        ("oracle.functoin=1", "functoin: unknown key; did you mean function?"),
        ("evaluate.lm_eval.task=[]", "evaluate.lm_eval.task: unknown key; did you mean tasks?"),
        ("dpo.lora={rnk = 4}", "dpo.lora.rnk: unknown key; did you mean rank?"),
        ("select.xyzzyx=4", "select.xyzzyx: unknown key; leave it out"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(small, override, message):
    lines = [line.strip() for line in refusal(small, override).splitlines()]
    assert any(line.endswith(message) for line in lines), lines


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.budget=-1", "select.budget: must be the number of label queries that you pay for, at least 1 (0 only"),
        ("select.budget=0", "select.budget must be at least 1: the oracle's answers"),
        ("select.budget=many", "got 'many'"),
        ("select.strategy=best", 'select.strategy: must be one of "k_center", "random", "random_by_prompt"'),
        (
            "select.strategy=uncertainty",
            'select: batches must be 2 or more, and first_batch set, for strategy = "uncer',
        ),
        ("select.stop_at=0.9", "select.stop_at must be left out where there is one batch"),
        ("labels=routed", 'select.batches must be 2 or more with labels = "routed", got 1'),
        ("select.strategy=delta_ucb", "select: batches must be 2 or more, and first_batch set"),
        ("select.strategy=pair_d_optimal", "select.strategy must choose responses where the oracle judges each one"),
        ("select.batches=9", "select.batches must be at most select.budget (8), got 9"),
        ("select.first_batch=random", "select: first_batch must be left out where there is one batch"),
        ("select.stop_at=1", "select.stop_at: must be below 1, got 1"),
        ("pseudo_label.pairing=x", 'pseudo_label.pairing: must be one of "best_worst", "margin", got "x"'),
        ("refresh.spg.clustering=x", '"strict", "kuhn2023", "farquhar2024", "embedding", got "x"'),
        ("generate.top_p=1.5", "generate.top_p: must be at most 1, got 1.5"),
        ("name=a/b", 'name: must be letters, digits, ".", "_" and "-"'),
        ("oracle.type=human", "oracle.type: must be one of"),
        ("oracle.function=judge", 'must be "module:function"'),
        ("labels=none", "labels: "),
        ("sft.cpu_offload=true", "sft.cpu_offload: must be false with zero_stage = 0, got true"),
        ("sft.patience=2", "sft.patience: must be left out without evaluate_every, got 2: it counts evaluations"),
        ("ppo.patience=2", "ppo.patience: unknown key"),
        (
            "dpo.deepspeed.gradient_clipping=0.5",
            "dpo.deepspeed: must leave gradient_clipping to max_grad_norm, got 0.5",
        ),
        (
            "dpo.deepspeed.zero_optimization.stage=2",
            "dpo.deepspeed: must leave zero_optimization.stage to zero_stage, got 2; remove it, and set zero_stage",
        ),
        ("dpo.lora.dropout=0.1", "dpo.lora: must have dropout = 0 here, got 0.1"),
        ("ppo.lora.dropout=0.1", "ppo.lora: must have dropout = 0 here, got 0.1"),
        ("sft.adam_betas=[0.9, 1.0]", "sft.adam_betas: must be two numbers from 0 to below 1, got [0.9, 1.0]"),
    ],
)
def test_wrong_values_are_refused_with_rule_and_value(small, override, message):
    assert message in refusal(small, override)


HTTP_JUDGE = ['oracle={type="http", base_url="http://h/v1", model="m"}']
KEY = "sk-abcdefghij"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (f'oracle.extra_headers="Authorization: Bearer {KEY}"', "oracle.extra_headers"),
        (f'oracle.extra_headers.Authorization=["{KEY}"]', "oracle.extra_headers.Authorization"),
        ('oracle.extra_headers.Authorization=["abcdefghij"]', "oracle.extra_headers.Authorization"),
        (f'oracle.api_key_env=["{KEY}"]', "oracle.api_key_env"),
        ('oracle.api_key_env=["abcdefghij"]', "oracle.api_key_env"),
        ('oracle.extra_query="key=abcdefghij"', "oracle.extra_query"),
        ('oracle.extra_body="key: abcdefghij"', "oracle.extra_body"),
        ('oracle.base_url=["http://h/abcdefghij"]', "oracle.base_url"),
        ('oracle.failover={base_url="http://h/v1", extra_headers={api-key="abcdefghij"}}', "oracle.failover"),
        (f'oracle.failover=["{KEY}"]', "oracle.failover"),
        (f'oracle.model=["{KEY}"]', "oracle.model"),
        (f'oracle.temperature="{KEY}"', "temperature"),
        (f'oracle.temperature=["{KEY}"]', "temperature"),
        (f"oracle.model.api_key_env={KEY}", "model is a value"),
        (f"oracle.api_key_env {KEY}", "section.key=value"),
    ],
)
def test_what_may_be_a_key_is_not_shown(small, override, field):
    message = refusal(small, *HTTP_JUDGE, override)
    assert field in message and "not shown" in message
    assert "abcdefghij" not in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["generate.k=1"],
            'generate.k is too small for pseudo_label.pairing = "best_worst", which makes no pair of 1 responses',
        ),
        (
            ["generate.k=1", "pseudo_label.pairing=margin"],
            'pseudo_label.pairing = "margin", which makes no pair of 1 responses',
        ),
        (["sft.enabled=true"], "seed_data is missing"),
        (['generate.source="seed"'], "seed_data is missing"),
        (
            ["sft.enabled=true", 'sft.turns="all"', 'seed_data={path="x"}'],
            'sft.turns must be "last" for seed data without',
        ),
        (['labels="direct"'], 'labels = "direct" pairs only paid responses, so select.unit must be "prompt"'),
        (['evaluator={type="scalar", loss="bradley_terry"}'], 'evaluator.loss = "bradley_terry" needs pairs'),
        (['select.unit="prompt"', "select.budget=3"], "select.budget must be at least generate.k (4)"),
        (['seed_data={path="x", min_score=3}'], "score_column and min_score go together"),
        (["rubric.min_score=5"], "rubric.min_score must be below rubric.max_score, got 5 and 5"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(small, overrides, message):
    assert message in refusal(small, *overrides)


RLP = ['pipeline="rlp"', 'preferences.source="oracle"', "rounds=2"]
DATA = ['pipeline="rlp"', 'preferences={data={path="x"}}', "rounds=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=0"], "rounds: must be above 0, got 0"),
        (["rounds=2", "labels=expert"], 'rounds must be 1 when labels is "expert", got 2'),
        (["rounds=2", "labels=direct", 'select.unit="prompt"'], 'rounds must be 1 when labels is "direct", got 2'),
        (["rounds=9"], "select.budget must be at least 9, so that each of 9 rounds can ask, got 8"),
        (["rounds=3", 'select.unit="prompt"'], "select.budget must be at least 12, so that each of 3 rounds can ask"),
        ([*RLP, "rounds=5"], "select.budget must be at least 10, so that each of 5 rounds can ask, got 8"),
        ([*RLP, "refresh.method=ocrm"], 'rounds must be 1 when refresh.method is "ocrm" and preferences.source is "or'),
        ([*RLP, "reward_model.path=x"], "rounds must be 1 with a ready-made reward_model.path"),
        ([*DATA, "refresh.method=none"], 'rounds must be 1 when refresh.method is "none" and preferences.source is "d'),
        ([*DATA, 'ppo={reward="function", function="a:b"}'], 'rounds must be 1 when ppo.reward is "function"'),
        ([*DATA, "pseudo_label.synthetic=true"], 'pseudo_label.synthetic must be false when pipeline is "rlp"'),
        (["pseudo_label.synthetic=true", "labels=expert"], 'synthetic must be false when labels is "expert"'),
        (["pseudo_label.synthetic=true", "refresh.method=uml"], 'refresh.method must be "spg" when pseudo_label'),
    ],
)
def test_what_rounds_and_synthetic_pairs_exclude_is_refused(small, overrides, message):
    assert message in refusal(small, *overrides)


ENTROPY = ["select.strategy=entropy", "select.first_batch=random", "rounds=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["select.strategy=entropy", "rounds=2"], 'first_batch must be set for strategy = "entropy", which reads the'),
        ([*ENTROPY, "select.first_batch=uncertainty", "select.batches=2"], "first_batch must be a strategy that needs"),
        ([*ENTROPY, "select.first_batch=entropy"], "first_batch must be a strategy that needs no answers"),
        ([*ENTROPY, 'select.unit="prompt"'], 'unit must be "response" for strategy = "entropy"'),
        ([*ENTROPY, "rounds=1"], 'rounds must be 2 or more with select.strategy = "entropy", got 1'),
        ([*ENTROPY, "evaluator.type=scalar"], 'evaluator.type must be "generative" with select.strategy = "entropy"'),
        ([*ENTROPY, "evaluator.type=head"], 'evaluator.type must be "generative" with select.strategy = "entropy"'),
        ([*ENTROPY, "labels=routed", "select.batches=2"], "select.strategy must read no evaluator where none is"),
        ([*ENTROPY, "rounds=1", "labels=expert"], "select.strategy must read no evaluator where none is fitted"),
        ([*ENTROPY, *RLP], "select.strategy must read no evaluator where none is fitted before the labels are chosen"),
    ],
)
def test_entropy_needs_a_generative_evaluator_of_an_earlier_round(small, overrides, message):
    assert message in refusal(small, *overrides)


@pytest.mark.parametrize("overrides", [[], ["select.batches=2"], ['pipeline="rlp"', "ppo.reward=evaluator"]])
def test_entropy_is_accepted_with_one_batch_or_more(small, overrides):
    config = load_config(small, [*ENTROPY, *overrides])
    assert config.select.reads_evaluator and not config.embeds_pool


@pytest.mark.parametrize(
    "overrides",
    [
        ["rounds=8"],
        ["rounds=2", "labels=shuffled", "pseudo_label.synthetic=true"],
        [*RLP, "rounds=4"],
        [*RLP, "refresh.method=none"],
        [*DATA, "rounds=20", "select.budget=0"],
        ['pipeline="rlp"', "ppo.reward=evaluator", "rounds=8"],
    ],
)
def test_rounds_that_can_ask_are_accepted(small, overrides):
    assert load_config(small, overrides).rounds > 1


@pytest.mark.parametrize("overrides", [[], ["pseudo_label.synthetic=true", "ppo.weight_transfer=nccl"]])
def test_every_setting_is_in_the_dump_whatever_its_value(small, overrides):
    config = load_config(small, overrides)
    dumped = config.model_dump(mode="json")
    assert dumped["pseudo_label"]["synthetic"] is bool(overrides)
    assert dumped["ppo"]["weight_transfer"] == ("nccl" if overrides else "auto")
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_a_dollar_budget_needs_prices(small):
    http = 'oracle={type="http", base_url="http://x", model="m"%s}'
    assert "budget_usd needs usd_per_1m_input" in refusal(small, http % ", budget_usd=1.0")
    assert "go together: set both or neither" in refusal(small, http % ", usd_per_1m_input=1.0")
    prices = ", budget_usd=1, usd_per_1m_input=0.5, usd_per_1m_output=1.5"
    assert isinstance(load_config(small, [http % prices]).oracle, HttpOracleConfig)


HTTP, REPLAY = 'oracle={type="http", base_url="http://x", model="m"}', "oracle={type='replay', path='j'%s}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "scores"),
        (["oracle.compare_function=judges:better"], "random"),
        (["oracle.compare_function=judges:better", "evaluate.reference_answers.order=both"], "both"),
        (["oracle.compare_function=judges:better", "oracle.flip_probability=0.25"], "scores"),
        ([HTTP], "random"),
        ([HTTP, "rubric.template=mine"], "scores"),
        ([HTTP, "rubric.template=mine", "rubric.pairwise_template=mine-too"], "random"),
        ([REPLAY % ""], "scores"),
        ([REPLAY % ", comparisons_path='c'"], "random"),
    ],
)
def test_answers_compete_with_references_by_comparisons_where_the_oracle_compares(small, overrides, expected):
    assert load_config(small, ["evaluate.reference_answers.path=a.jsonl", *overrides]).competes_by == expected
    without = [item for item in overrides if "reference_answers" not in item]
    assert load_config(small, without).competes_by is None


def test_every_mistake_is_told_at_once(small):
    message = refusal(small, "select.budget=-1", "generate.k=-1", "nonsense=1")
    assert all(field in message for field in ("select.budget", "generate.k", "nonsense"))


def test_missing_settings_are_named(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    message = refusal(tmp_path / "empty.toml")
    assert all(f"{field}: required, and missing" in message for field in ("name", "policy", "pool", "oracle"))


def test_overrides_are_toml_values_or_bare_words(small):
    overrides = ["dpo.beta=0.2", "policy.path=other/model", 'generate.stop=["a", "b"]', "dpo.lora.rank=4"]
    config = load_config(small, overrides)
    assert (config.dpo.beta, config.policy.path, config.generate.stop) == (0.2, "other/model", ["a", "b"])
    assert config.dpo.lora is not None and config.dpo.lora.rank == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.beta", "must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("name.first=x", "name is a value, not a section"),
    ],
)
def test_malformed_overrides_are_refused(small, override, message):
    assert message in refusal(small, override)


def test_files_that_are_no_config_are_refused(tmp_path):
    assert "; jobs/configs/ holds examples" in refusal(tmp_path / "gone.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    assert "is not valid TOML" in refusal(tmp_path / "broken.toml")


def test_trackers_are_asked_for_by_their_table(small):
    assert load_config(small).tracking.wandb is None
    assert load_config(small, ["tracking.wandb.project=mine"]).tracking.wandb.mode == "offline"
    assert "tracking.wandb.mode: must be one of 'offline' or 'online', got 'disabled'" in refusal(
        small, "tracking.wandb.mode=disabled"
    )
    assert "tracking.wandb.api_key: unknown key" in refusal(small, "tracking.wandb.api_key=secret")
    assert "did you mean tracking_uri?" in refusal(small, "tracking.mlflow.tracking_url=x")


def test_a_fleet_has_one_size_or_three(small):
    fixed = load_config(small, ["generators.num_replicas=3"]).generators
    assert (fixed.least, fixed.most) == (3, 3)
    scaling = load_config(small, ["generators.max_replicas=8"]).generators
    assert (scaling.least, scaling.num_replicas, scaling.most) == (1, 1, 8)
    message = r"generators: min_replicas, num_replicas and max_replicas must not decrease .* got \d, \d and \d"
    for refused in (["generators.min_replicas=2"], ["generators.num_replicas=4", "generators.max_replicas=3"]):
        with pytest.raises(ConfigError, match=message):
            load_config(small, refused)


def test_a_replica_takes_a_gpu_per_rank(small):
    ranks = ["generators.tensor_parallel_size=4", "generators.pipeline_parallel_size=2"]
    generators = load_config(small, ranks).generators
    assert (generators.num_ranks, generators.num_gpus) == (8, 8)


@pytest.mark.parametrize(("kind", "fleet"), [("generative", "generators"), ("scalar", "embedders")])
def test_an_evaluator_names_the_engines_that_serve_it(small, kind, fleet):
    config = load_config(small, ['pipeline="rlp"', "ppo.reward=evaluator", f"evaluator.type={kind}"])
    assert config.evaluator.served_by == fleet
    assert config.rewards_by_embedders == (fleet == "embedders")


def test_a_mistake_in_an_oracle_is_named_as_it_was_written(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(
        'name = "t"\nrun_dir = "r"\npolicy = {path = "m"}\npool = {path = "p"}\nsft = {enabled = false}\n'
        'select = {budget = 4}\n[oracle]\ntype = "panel"\n'
        '[[oracle.judges]]\ntype = "http"\nbase_url = "http://a/v1"\nmodell = "a"\n'
        '[[oracle.judges]]\ntype = "scripted"\nfunction = "a:b"\ntimeout_s = -1\n'
    )
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    message = str(refused.value)
    assert "oracle.judges[0].modell: unknown key; did you mean model?" in message
    assert "oracle.judges[0].model: required" in message
    assert "oracle.judges[1].timeout_s: must be above 0, got -1" in message


def test_two_forms_of_answers_are_refused_before_the_run(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(
        'name = "t"\nrun_dir = "r"\npolicy = {path = "m"}\npool = {path = "p"}\nsft = {enabled = false}\n'
        'select = {budget = 4}\nrubric = {template = "t.txt", pattern = "([0-9])"}\n'
        '[oracle]\ntype = "http"\nbase_url = "http://a/v1"\nmodel = "a"\nanswer = "json"\n'
    )
    with pytest.raises(ConfigError, match="leave one of them out"):
        load_config(path)


ORACLE_TYPES = '"http", "scripted", "replay", "sheet", "label_studio", "panel"'


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        (
            'base_url = "http://a/v1"',
            f"oracle.type: required, and missing; it is one of {ORACLE_TYPES}",
        ),
        ('type = "htpp"', f"oracle.type: must be one of {ORACLE_TYPES}, got 'htpp'"),
        (
            'type = "panel"\njudges = [{model = "a"}]',
            'oracle.judges[0].type: required, and missing; it is one of "http"',
        ),
    ],
)
def test_the_types_of_an_oracle_are_named(tmp_path, oracle, message):
    path = tmp_path / "t.toml"
    path.write_text(
        'name = "t"\nrun_dir = "r"\npolicy = {path = "m"}\npool = {path = "p"}\nsft = {enabled = false}\n'
        f"select = {{budget = 4}}\n[oracle]\n{oracle}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert message in str(refused.value)


def test_gradients_are_checkpointed_from_a_billion_parameters_unless_the_setting_says_otherwise():
    sizes = (10**9 - 1, 10**9)
    assert [TrainingConfig().checkpoints_gradients(size) for size in sizes] == [False, True]
    for always in (False, True):
        training = TrainingConfig(gradient_checkpointing=always)
        assert [training.checkpoints_gradients(size) for size in sizes] == [always, always]


def test_settings_of_deepspeed_are_passed_through(small):
    override = "sft.deepspeed={zero_optimization={reduce_bucket_size=1000}, communication_data_type='fp32'}"
    passed = {"zero_optimization": {"reduce_bucket_size": 1000}, "communication_data_type": "fp32"}
    assert load_config(small, [override]).sft.deepspeed == passed
