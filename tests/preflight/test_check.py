import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rayrl.config import RunConfig
from rayrl.errors import ConfigError, DataError, ResourceError, RunDirectoryError
from rayrl.preflight import check, find_cluster, render_plan
from rayrl.preflight.model import CPU_HEAD_DIMS
from rayrl.runs.run import open_run

TWO_CPUS = {"CPU": 2.0}
MODEL = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 1024}


def save_model(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL | changes))
    (folder / "model.safetensors").touch()
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # a word, a token
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return str(folder)


def save_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tree(tmp_path):
    """What the tests change."""
    return small_tree(tmp_path)


def small_tree(tmp_path):
    """A run of 12 prompts, 2 held out, 4 responses each."""
    return {
        "name": "t",
        "run_dir": str(tmp_path / "run"),
        "policy": {"path": save_model(tmp_path / "model")},
        "pool": {
            "path": save_rows(tmp_path / "pool.jsonl", [{"prompt": f"p {i}"} for i in range(12)]),
            "num_eval": 2,
        },
        "sft": {"enabled": False},
        "generate": {"k": 4, "max_tokens": 16},
        "select": {"budget": 10},
        "oracle": {"type": "scripted", "function": "json:dumps"},
        "evaluate": {"budget": 4},
    }


def changed(tree, **changes):
    """The tree with dotted settings changed, as a config."""
    tree = json.loads(json.dumps(tree))
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return RunConfig.model_validate(tree)


def refusal(error, config, cluster=TWO_CPUS, **options):
    """The one message of a refusal of exactly this class."""
    with pytest.raises(error) as caught:
        check(config, cluster=cluster, **options)
    assert type(caught.value) is error
    return str(caught.value)


def test_the_plan_counts_what_will_be_done_and_paid(tree):
    plan = check(changed(tree), cluster=TWO_CPUS)
    assert (plan.num_prompts, plan.num_eval_prompts, plan.num_responses) == (10, 2, 40)
    assert (plan.num_label_queries, plan.num_eval_queries, plan.num_pairs, plan.pairs_per_query) == (
        10,
        4,
        10,
        1.0,
    )
    assert [stage.name for stage in plan.stages] == (
        ["generate", "select", "query", "fit_evaluator", "pseudo_label", "dpo", "evaluate", "report"]
    )
    assert (plan.mode, plan.reference, plan.usd) == ("overlap", "generation", None)
    text = render_plan(plan)
    assert "10 label queries and 4 evaluation queries" in text
    assert "warning: 1.0 pairs per paid query, and nine is the aim: add prompts (90 give nine)" in text


def test_the_plan_shows_rounds_and_what_each_asks(tree):
    plan = check(changed(tree, rounds=3), cluster=TWO_CPUS)
    assert plan.label_queries == (4, 3, 3) and plan.num_label_queries == 10
    assert (plan.num_responses, plan.num_pairs, plan.num_eval_queries) == (120, 30, 4)
    text = render_plan(plan)
    assert "rounds   3, with 4 + 3 + 3 label queries; each has generate, select, query, fit_evaluator, " in text
    assert "\nrounds" not in render_plan(check(changed(tree), cluster=TWO_CPUS))
    whole = check(changed(tree, rounds=2, select__unit="prompt", select__budget=21), cluster=TWO_CPUS)
    assert whole.label_queries == (8, 12)


def test_a_round_cannot_ask_about_more_than_it_samples(tree):
    assert check(changed(tree, rounds=2, select__budget=80), cluster=TWO_CPUS).label_queries == (40, 40)
    message = refusal(ConfigError, changed(tree, rounds=2, select__budget=81))
    assert "at most the 80 responses (10 prompts x generate.k = 4 x rounds = 2), got 81" in message


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


def test_rounds_of_the_second_pipeline_judge_every_policy(tree, tmp_path):
    pairs = [{"prompt": p, "chosen": "good", "rejected": "bad"} for p in "pq"]
    oracle = {"type": "scripted", "function": "json:dumps", "compare_function": "json:loads"}
    rlp = tree | {"pipeline": "rlp", "rounds": 2, "oracle": oracle, "evaluate": {"budget": 100}}
    rlp |= {"generate": {"k": 2, "max_tokens": 16}, "refresh": {"n": 3, "spg": {"clustering": "embedding"}}}
    asked = check(changed(rlp, preferences={"source": "oracle"}), cluster={"CPU": 4.0})
    assert (asked.label_queries, asked.num_pairs) == ((4, 6), 5)
    assert (asked.num_eval_queries, asked.num_responses) == (5 * 2, 10 * (3 + 2) * 2)
    data = {"data": {"path": save_rows(tmp_path / "pairs.jsonl", pairs)}}
    given = check(changed(rlp, preferences=data), cluster={"CPU": 4.0})
    assert (given.label_queries, given.num_pairs, given.num_eval_queries) == ((), 2, 4 * 2)
    assert "rounds   2, with no label queries; each has synthesize, refresh, ppo_refreshed" in render_plan(given)
    proxy = check(changed(rlp, ppo__reward="evaluator"), cluster={"CPU": 4.0})
    assert (proxy.label_queries, proxy.num_eval_queries) == ((5, 5), 3 * 2)


def test_nine_pairs_per_query_bring_no_warning(tree):
    plan = check(changed(tree, select__budget=6, pseudo_label__pairing="margin"), cluster=TWO_CPUS)
    assert (plan.num_pairs, plan.pairs_per_query, plan.warnings) == (60, 10.0, ())


def test_controls_change_what_is_paid(tree):
    expert = check(changed(tree, labels="expert"), cluster=TWO_CPUS)
    assert (expert.num_label_queries, expert.mode) == (40, "alternate")
    assert any("pays for all 40 responses" in warning for warning in expert.warnings)
    direct = check(changed(tree, labels="direct", select__unit="prompt"), cluster=TWO_CPUS)
    assert (direct.num_label_queries, direct.num_pairs) == (8, 2)
    assert "fit_evaluator" not in [stage.name for stage in direct.stages]


def test_evaluation_that_cannot_judge_every_prompt_says_so(tree):
    plan = check(changed(tree, evaluate__budget=3), cluster=TWO_CPUS)
    assert plan.num_eval_queries == 2
    assert any("judges 1 of the 2 held-out prompts" in warning for warning in plan.warnings)


def test_prices_give_usd(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    (tmp_path / "rubric.txt").write_text("<prompt> {prompt} </prompt> <response> {response} </response>")
    oracle = {"type": "http", "base_url": "http://127.0.0.1:9", "model": "m", "api_key_env": "JUDGE_KEY"}
    oracle |= {"usd_per_1m_input": 0.0, "usd_per_1m_output": 1000.0, "max_tokens": 100, "budget_usd": 1.0}
    plan = check(changed(tree, oracle=oracle, rubric__template=str(tmp_path / "rubric.txt")), cluster=TWO_CPUS)
    assert plan.usd == pytest.approx(14 * 0.1)
    assert any("oracle.budget_usd stops them at 1.00" in warning for warning in plan.warnings)
    assert "secret" not in render_plan(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool__path": "gone.jsonl"}, "gone.jsonl does not exist"),
        (
            {"pool__prompt_column": "promt"},
            "no column promt; the columns there are prompt; did you mean prompt?",
        ),
        ({"seed_data": {"path": "gone.csv"}}, "gone.csv does not exist"),
        ({"evaluate__reference_answers": {"path": "gone.csv"}}, "gone.csv does not exist"),
        ({"oracle": {"type": "replay", "path": "gone.csv"}}, "gone.csv does not exist"),
    ],
)
def test_missing_files_and_columns_are_refused(tree, changes, message):
    assert message in refusal(DataError, changed(tree, **changes))


def test_empty_inputs_are_refused(tree, tmp_path):
    empty = save_rows(tmp_path / "empty.jsonl", [])
    blank = save_rows(tmp_path / "blank.jsonl", [{"prompt": " "}])
    assert "is empty" in refusal(DataError, changed(tree, pool__path=empty))
    assert "no prompt that is not empty (1 rows)" in refusal(DataError, changed(tree, pool__path=blank))
    seed = {"path": save_rows(tmp_path / "s.jsonl", [{"prompt": "a", "response": "b", "score": 1}])}
    seed |= {"score_column": "score", "min_score": 2}
    assert "1 score below seed_data.min_score" in refusal(DataError, changed(tree, seed_data=seed))


def test_budgets_the_pool_cannot_fill_are_refused(tree, tmp_path):
    message = refusal(ConfigError, changed(tree, select__budget=41))
    assert "select.budget must be at most the 40 responses (10 prompts x generate.k = 4), got 41" in message
    check(changed(tree, select__budget=40), cluster=TWO_CPUS)
    message = refusal(ConfigError, changed(tree, pool__num_eval=12))
    assert "pool.num_eval must be below the number of prompts in the pool, 12, got 12" in message
    seed = {"path": save_rows(tmp_path / "s.jsonl", [{"prompt": f"{i}", "response": "b"} for i in range(5)])}
    message = refusal(ConfigError, changed(tree, seed_data=seed, generate__source="seed"))
    assert "select.budget must be at most the 5 responses of the seed data, got 10" in message


def test_policies_that_are_no_models_are_refused(tree, tmp_path):
    assert "no such folder" in refusal(ConfigError, changed(tree, policy__path="/nowhere/model"))
    (tmp_path / "bare").mkdir()
    message = refusal(ConfigError, changed(tree, policy__path=str(tmp_path / "bare")))
    assert "policy.path must be a model folder with a config.json" in message
    folder = save_model(tmp_path / "pickled")
    os.rename(f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin")
    assert "must hold weights as *.safetensors" in refusal(ConfigError, changed(tree, policy__path=folder))


def test_a_hub_model_that_is_not_here_is_unknown_to_the_plan(tree, monkeypatch):
    import huggingface_hub.constants

    config = changed(tree, policy__path="someone/a-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    plan = check(config, cluster=TWO_CPUS)
    assert plan.disk_bytes is None
    assert any("prompt lengths are not checked" in warning for warning in plan.warnings)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "not to be had from the hub" in refusal(ConfigError, config)


def test_a_head_dim_only_gpus_have_is_refused_without_one(tree, tmp_path):
    config = changed(tree, policy__path=save_model(tmp_path / "small", num_attention_heads=8))
    assert "head_dim must be one of 32, 64, 80" in refusal(ConfigError, config)
    check(config, cluster={"CPU": 8.0, "GPU": 2.0})


def test_head_dims_are_those_of_the_installed_vllm():
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vllm is not installed")
    source = Path(spec.submodule_search_locations[0], "v1", "attention", "backends", "cpu_attn.py").read_text()
    found = re.search(r"def get_supported_head_sizes.*?return \[([\d, ]+)\]", source, re.DOTALL)
    assert found and tuple(map(int, found[1].split(","))) == CPU_HEAD_DIMS


def test_prompts_that_fill_the_context_are_refused(tree, tmp_path):
    rows = [{"prompt": "w " * n + str(n)} for n in (5, 6, 7, 20, 31, 32, 40, 50)]
    config = changed(
        tree, pool__path=save_rows(tmp_path / "long.jsonl", rows), policy__max_model_len=32, select__budget=4
    )
    message = refusal(ConfigError, changed(config.model_dump(), evaluator__type="scalar"))
    assert "shorter than the context of 32 tokens, but 4 of 8 are not; the longest has 51" in message
    save_rows(tmp_path / "long.jsonl", rows[:4])
    plan = check(changed(config.model_dump(), evaluator__type="scalar"), cluster=TWO_CPUS)
    assert any("pool: 1 prompts (the longest has 21 tokens) leave less than" in w for w in plan.warnings)
    assert "rubric.template must leave room in the context of 32" in refusal(ConfigError, config)
    message = refusal(ConfigError, changed(tree, policy__max_model_len=2000))
    assert "policy.max_model_len must be at most the model's context 1024, got 2000" in message


def test_judges_that_cannot_be_asked_are_refused(tree, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with socket.socket() as taken:  # bound and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        oracle = {"type": "http", "base_url": f"http://127.0.0.1:{taken.getsockname()[1]}/v1", "model": "m"}
        config = changed(tree, oracle=oracle | {"api_key_env": "JUDGE_KEY"})
        assert "JUDGE_KEY" in refusal(ConfigError, config)
        monkeypatch.setenv("JUDGE_KEY", "secret")
        check(config, cluster=TWO_CPUS)  # a plan touches no network
        message = refusal(ConfigError, config, contact_oracle=True)
    assert "cannot be reached" in message and "secret" not in message
    scripted = {"type": "scripted", "function": "no_such_module:judge"}
    assert "no module no_such_module" in refusal(ConfigError, changed(tree, oracle=scripted))
    message = refusal(ConfigError, changed(tree, oracle__compare_function="no_such_module:compare"))
    assert message.startswith("oracle.compare_function must be importable")


def test_a_full_disk_is_refused(tree):
    os.truncate(Path(tree["policy"]["path"], "model.safetensors"), 2**42)  # sparse: 4 TiB that take no room
    assert "GiB at least (weights and optimizer), and its disk has" in refusal(ResourceError, changed(tree))


def test_a_run_directory_of_another_config_is_refused(tree):
    open_run(changed(tree))
    check(changed(tree), cluster=TWO_CPUS)
    message = refusal(RunDirectoryError, changed(tree, select__budget=11, seed=7))
    assert "seed (0 there, 7 now), select.budget (10 there, 11 now)" in message


def test_run_directories_that_cannot_be_used_are_refused(tree, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be" in refusal(RunDirectoryError, changed(tree, run_dir=str(tmp_path / "file" / "run")))
    assert "reuse must be another run's folder" in refusal(RunDirectoryError, changed(tree, reuse=str(tmp_path)))
    message = refusal(ConfigError, changed(tree, run_dir="nosuch://bucket/run"))
    assert "run_dir must be a path or an fsspec URL" in message


def test_a_relative_run_directory_is_refused_in_a_submitted_job(tree, tmp_path, monkeypatch):
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    monkeypatch.chdir(tmp_path)
    check(changed(tree, run_dir="runs/x"), cluster=TWO_CPUS)  # not submitted: it is relative to the user's folder
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    for relative in ("runs/x", "./runs/x", "file://runs/x", "~/runs/x"):
        message = refusal(ConfigError, changed(tree, run_dir=relative))
        assert message.startswith("run_dir must be an absolute path inside a Ray job") and f"got {relative};" in message
        assert "name a folder that every node sees" in message
    assert refusal(ConfigError, changed(tree, reuse="runs/y")).startswith("reuse must be an absolute path")
    for accepted in (str(tmp_path / "run"), f"file://{tmp_path}/run", "memory://runs/x"):
        check(changed(tree, run_dir=accepted), cluster=TWO_CPUS)


def test_a_check_writes_nothing(tree, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    check(changed(tree), cluster=TWO_CPUS)
    assert sorted(tmp_path.rglob("*")) == before


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
            r"stage generate \(5 engine.* needs GPU: 5, .* lower generators.max_replicas",
        ),
        (
            {"generators__num_replicas": 2, "generators__cpus_per_replica": 2.0},
            {"CPU": 4.0},
            "stage generate .* needs CPU: 4 and 1 free for Ray Data",
        ),
        (
            {"pseudo_label__mode": "overlap", "policy__dtype": "float32", "dpo__num_workers": 2},
            {"CPU": 9.0, "GPU": 3.0},
            'stage dpo .*beside 1 engine.* needs GPU: 4, .*pseudo_label.mode = "alternate"',
        ),
        (
            {"pseudo_label__mode": "overlap", "policy__dtype": "float32", "evaluator__num_workers": 2},
            {"CPU": 9.0, "GPU": 3.0},
            "stage fit_evaluator .*beside 1 engine.* needs GPU: 4, .* lower evaluator.num_workers or generators",
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
    assert "stage synthesize (3 entailment model(s), beside 1 engine(s) and 1 engine(s)) needs GPU: 5" in message
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
    assert "at most 1 or whole, got 1.5" in refusal(ConfigError, config, {"CPU": 9.0, "GPU": 8.0})


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


def test_resources_of_this_machine(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    (here,) = find_cluster().nodes
    assert (here["CPU"], here["GPU"]) == (float(os.cpu_count() or 1), 2.0)
    assert 2**28 < here["memory"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_cluster().has("GPU") == 0.0


def test_a_plan_loads_nothing_heavy(tree):
    program = (
        "import sys; from rayrl.config import RunConfig; from rayrl.preflight import check, render_plan\n"
        "print(render_plan(check(RunConfig.model_validate_json(sys.argv[1]))), file=sys.stderr)\n"
        "heavy = ('torch', 'ray', 'vllm', 'transformers', 'datasets', 'openai')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    config = changed(tree).model_dump_json()
    command = [sys.executable, "-c", program, config]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr[-2000:]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_without_its_package_is_refused(tree, name):
    config = changed(tree, **{f"tracking__{name}": {}})
    if importlib.util.find_spec(name) is None:
        assert refusal(ConfigError, config) == (
            f"tracking.{name} needs the package {name}, which is not installed here; "
            f'pip install "rayrl[{name}]", or leave the table out'
        )
    else:
        check(config, cluster=TWO_CPUS)
