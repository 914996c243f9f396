"""Command lines as people write them: each ends in a plan, or in one message with the field, the rule and the remedy.

Each case is a sample of a kind of mistake. Exit code 2 is a refusal; 0 is a plan, with a warning where it needs one.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
import s3fs
from safetensors.numpy import load_file, save_file

from rayrl.cli import main as rayrl
from rayrl.config import load_config
from rayrl.pipelines.command_line import main as job
from tests.judge_server import JudgeServer, Reply

ROOT = Path(__file__).parents[1]
QUICKSTART = "jobs/configs/quickstart.toml"
MODEL = ROOT / "jobs" / "quickstart" / "model"
NEVER = ("Traceback", "oracle.http.", "oracle.scripted.", "oracle.replay.", "instance of", "should match pattern")
"""What no message says: words of Python and pydantic, and names that no config has."""
SCREEN = 60
"""Lines that a plan may take."""


@dataclass(frozen=True)
class Case:
    """One command line and its end."""

    title: str
    arguments: list[str] | Callable[["Folder"], list[str]]
    """After the config of the quickstart; or a function that prepares files and gives all arguments."""
    says: list[str]
    code: int = 2
    says_not: list[str] = field(default_factory=list)
    plan: bool = True
    name: str | None = "proxy_dpo"


class Folder:
    """A folder for a case's files, and what ends with the case."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, ends: ExitStack):
        self.path, self.patch, self.ends = path, patch, ends

    def write(self, name: str, content: str | bytes) -> str:
        file = self.path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(file)

    def config(self, content: str | bytes = b"", *, prefix: bytes = b"", encoding: str = "utf-8") -> str:
        """The quickstart's config with something in front of it, in another encoding."""
        text = (ROOT / QUICKSTART).read_text()
        before = content.encode(encoding) if isinstance(content, str) else content
        return self.write("mine.toml", prefix + before + text.encode(encoding))

    def judge(self, *changes: str, server: JudgeServer | None = None) -> list[str]:
        """Arguments of a run whose judge is an HTTP endpoint, by default one that nobody serves."""
        url = "http://127.0.0.1:9/v1" if server is None else server.url
        table = f'oracle={{type="http", base_url="{url}", model="m"}}'
        return [QUICKSTART, table, f"run_dir={self.path}/run", *changes]

    def server(self, models: Reply) -> JudgeServer:
        server = self.ends.enter_context(JudgeServer())
        server.models = models
        return server

    def model(self, change: Callable[[Path], object], *more: str) -> list[str]:
        """Arguments of a run of the quickstart's model, after a change of its files."""
        copy = self.path / "model"
        shutil.copytree(MODEL, copy)
        change(copy)
        return [QUICKSTART, f"policy.path={copy}", *more]

    def run_dir(self, *changes: str) -> Path:
        """A run that has begun with the quickstart's config and some changes."""
        run = self.path / "run"
        run.mkdir()
        config = load_config(ROOT / QUICKSTART, [f"run_dir={run}", *changes])
        (run / "config.json").write_text(config.model_dump_json())
        (run / "identity.json").write_text('{"id": "0"}')
        return run


def edit_json(name: str, **settings: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


def encrypt(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(255, -1, -1)) * 4000)


def point(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def lose_a_shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {name: second if "layers.2" in name else first for name in weights}
    save_file({name: weight for name, weight in weights.items() if index[name] == first}, folder / first)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def leave_an_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def broken_module(folder: Folder) -> list[str]:
    folder.write("badmod.py", "def judge(:\n    return 1\n")
    config = folder.write("mine.toml", absolute_quickstart())
    folder.patch.chdir(folder.path)
    return [config, "oracle.function=badmod:judge"]


def absolute_quickstart() -> str:
    return (ROOT / QUICKSTART).read_text().replace('"jobs/', f'"{ROOT}/jobs/')


def from_another_folder(folder: Folder) -> list[str]:
    folder.patch.chdir(folder.path)
    return [str(ROOT / QUICKSTART)]


def with_gpus(folder: Folder) -> list[str]:
    if not version("torch").endswith("+cpu"):
        pytest.skip("torch here is a build for GPUs")
    folder.patch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    return [QUICKSTART, "device=auto"]


def dangling(folder: Folder) -> list[str]:
    (folder.path / "prompts.jsonl").symlink_to("/nowhere/prompts.jsonl")
    return [QUICKSTART, f"pool.path={folder.path}/prompts.jsonl"]


def damaged_run(folder: Folder) -> list[str]:
    run = folder.run_dir()
    (run / "config.json").write_text("{half a file")
    return [QUICKSTART, f"run_dir={run}"]


def other_run(folder: Folder) -> list[str]:
    return [QUICKSTART, f"run_dir={folder.run_dir('dpo.beta=0.3', 'generate.k=6', 'seed=4')}"]


OFFLINE = ["HF_HUB_OFFLINE=1", "correct the path, or download it once"]
SAME = '{"prompt": "Tell me about the sea."}\n' * 500
OPEN = 'prompt\n"a"\n"b\nc\n'
LIST = Reply(body='{"object": "list", "data": [{"id": "gpt-4.1"}, {"id": "gpt-4.1-mini"}]}')
PRICES = ["oracle.usd_per_1m_input=2", "oracle.usd_per_1m_output=8"]

CASES = [
    Case("an unknown type of oracle", ["oracle.type=openai"], ['oracle.type: must be one of "http", "scripted"']),
    Case("a negative budget", ["select.budget=-1"], ["select.budget: must be the number", "at least 1", "got -1"]),
    Case("one response", ["generate.k=1", "pseudo_label.pairing=margin"], ["generate.k is too small", "raise it"]),
    Case("equal responses", ["generate.temperature=0"], ["generate.temperature must be above 0", "no pair", "0.7"]),
    Case("equal responses by top_k", ["generate.top_k=1"], ["generate.top_k not 1"]),
    Case("an absurd learning rate", ["dpo.learning_rate=10.0"], ["dpo.learning_rate: must be at most 0.1, got 10"]),
    Case("an infinite beta", ["dpo.beta=inf"], ["dpo.beta: must be a finite number, got inf"]),
    Case("nan", ["generate.top_p=nan"], ["generate.top_p: must be a finite number, got nan"]),
    Case("nan for another library", ["dpo.deepspeed.x=nan"], ["dpo: deepspeed must hold finite numbers only"]),
    Case("a boolean for a number", ["rounds=true"], ["rounds: must be a whole number, got true"]),
    Case("a boolean in a list", ["dpo.adam_betas=[true, 0.9]"], ["dpo.adam_betas[0]: must be a number, got true"]),
    Case("a name with a space", ['name="my run"'], ["name: must be letters, digits", 'write "my-run"']),
    Case("an empty name", ['name=""'], ["name: must be letters, digits", "got ''"]),
    Case("an empty folder", ['run_dir=""'], ["run_dir: must be the path or URL of a folder", "got ''"]),
    Case("nothing held out", ["pool.num_eval=0"], ["warning: pool.num_eval = 0 holds no prompt out"], 0),
    Case("an evaluation of no prompt", ["evaluate.budget=1"], ["warning: evaluate.budget = 1 judges 0 of the 100"], 0),
    Case("a batch of more than all", ["dpo.batch_size=100000"], ["warning: dpo: batch_size = 100,000 is more than"], 0),
    Case("more engines than CPUs", ["generators.threads=999"], ["warning: generators: 999 compute threads"], 0),
    Case("ranks that do not divide", ["generators.tensor_parallel_size=3"], ["divide the policy's 4 attention heads"]),
    Case("an argument of no engine", ["generators.engine_args.quantisation=1"], ["did you mean quantization?"]),
    Case("an unknown argument", ["generators.engine_args.no_such_option=1"], ["vLLM has no argument no_such_option"]),
    Case("adapters of no layer", ['dpo.lora.target_modules=["nose"]'], ["got nose; its linear layers are down_proj,"]),
    Case("a switch for a table", ["dpo.lora=true"], ["dpo.lora: must be a table", "dpo.lora.rank = 16"]),
    Case("the other pipeline", ["pipeline=rlp"], ['got "rlp"; run jobs/rlp.py, or `rayrl run`'], says_not=["[pref"]),
    Case("a folder for a config", lambda _: ["jobs/configs"], ["must be a TOML file, got the folder jobs/configs"]),
    Case("a binary for a config", lambda _: [f"{MODEL}/model.safetensors"], ["holds binary data"]),
    Case("a config with a BOM", lambda f: [f.config(prefix=b"\xef\xbb\xbf")], ["run      quickstart"], 0),
    Case(
        "a config in Latin-1",
        lambda f: [f.config("# für mich\n", encoding="latin-1")],
        ["must be in UTF-8, and line 1 has the byte 0xfc", "iconv -f LATIN1"],
    ),
    Case(
        "a config in UTF-16",
        lambda f: [f.config(prefix=b"\xff\xfe", encoding="utf-16-le")],
        ["must be in UTF-8, got UTF-16, as Windows' PowerShell writes", "iconv -f UTF-16"],
    ),
    Case("no TOML", lambda f: [f.write("a.toml", "name = my run\n")], ["is not valid TOML", "text stands in quotes"]),
    Case("a folder named as a config", lambda f: [str(f.path)], ["must be a TOML file, got the folder"]),
    Case("no config", lambda _: ["gone.toml"], ["config file gone.toml does not exist here", "jobs/configs/"]),
    Case("no prompts", ["pool.path=nowhere.jsonl"], ["pool.path: nowhere.jsonl does not exist in ", "correct"]),
    Case("empty prompts", lambda f: [QUICKSTART, f"pool.path={f.write('p.jsonl', '')}"], ["pool.path: ", "is empty"]),
    Case(
        "a quotation mark that never closes",
        lambda f: [QUICKSTART, f"pool.path={f.write('p.csv', OPEN)}"],
        ["pool.path: ", "line 3", "quotation mark"],
    ),
    Case(
        "equal prompts",
        lambda f: [QUICKSTART, f"pool.path={f.write('p.jsonl', SAME)}"],
        ["pool.num_eval must be below", "499 of 500 rows repeat another's", "got 100"],
    ),
    Case("a limit below num_eval", ["pool.limit=10"], ["pool.num_eval must be below", "pool.limit = 10 reads no more"]),
    Case("a split of a file", ["pool.split=nosuch"], ["pool.split must be left out for a file", 'got "nosuch"']),
    Case("a model of the hub, offline", ["policy.path=meta-llama/Llama-2-7b-hf"], OFFLINE, plan=False),
    Case("the plan of one", ["policy.path=no-such-org/no-model"], OFFLINE, says_not=["local_files_only"]),
    Case("a mistyped folder", ["policy.path=mymodel"], [*OFFLINE, "there is no such folder in "]),
    Case("encrypted weights", lambda f: f.model(encrypt), ["its header cannot be read: it is damaged or encrypted"]),
    Case("half a download", lambda f: f.model(cut), ["is cut off: it has 1,000,000 bytes of 2,611,712"]),
    Case("a pointer for weights", lambda f: f.model(point), ["is a pointer of Git LFS", "git lfs pull"]),
    Case("no tokenizer", lambda f: f.model(lose_the_tokenizer), ["policy.path must hold the model's tokenizer"]),
    Case(
        "a damaged config.json of the model",
        lambda f: f.model(lambda model: (model / "config.json").write_text("{broken")),
        ["model/config.json must be JSON, and is not", "damaged"],
    ),
    Case(
        "an encoder",
        lambda f: f.model(edit_json("config.json", architectures=["BertForMaskedLM"], model_type="bert")),
        ["must be a causal language model", "is BertForMaskedLM; take one"],
    ),
    Case(
        "quantised weights",
        lambda f: f.model(edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4})),
        ["are quantised (gptq); take the model that it was made from"],
    ),
    Case("an adapter", lambda f: f.model(leave_an_adapter), ["is an adapter for meta-llama/Llama-2-7b-hf; merge them"]),
    Case("a missing shard", lambda f: f.model(lose_a_shard), ["model-00002-of-00002.safetensors of", "is missing"]),
    Case("GPUs without their torch", with_gpus, ["torch is a build for CPUs", 'set device = "cpu"'], plan=False),
    Case("a plan asks no judge", lambda f: f.judge(), ["oracle   m at http://127.0.0.1:9/v1; this plan has not"], 0),
    Case(
        "an address without its scheme",
        lambda f: f.judge("oracle.base_url=api.openai.com/v1"),
        ["oracle.base_url must be an http or https address such as http://host:8000/v1, got 'api.openai.com/v1'"],
    ),
    Case(
        "a model that the judge has not",
        lambda f: f.judge("oracle.model=gpt-4.1-typo", server=f.server(LIST)),
        ["oracle.model", "gpt-4.1-typo", "gpt-4.1-mini"],
        plan=False,
    ),
    Case(
        "a negative price",
        lambda f: f.judge("oracle.usd_per_1m_input=-1", "oracle.usd_per_1m_output=8"),
        ["oracle.usd_per_1m_input: must be at least 0, got -1"],
    ),
    Case("one price", lambda f: f.judge("oracle.usd_per_1m_input=2"), ["oracle: usd_per_1m_input and", "set both"]),
    Case("a budget without prices", lambda f: f.judge("oracle.budget_usd=20"), ["oracle: budget_usd needs"]),
    Case("no budget", lambda f: f.judge("oracle.budget_usd=0", *PRICES), ["oracle.budget_usd: must be above 0, got 0"]),
    Case("a tiny budget", lambda f: f.judge("oracle.budget_usd=0.000001", *PRICES), ["the queries may cost"], 0),
    Case(
        "prices of nothing",
        lambda f: f.judge("oracle.budget_usd=1", "oracle.usd_per_1m_input=0", "oracle.usd_per_1m_output=0"),
        ["oracle: budget_usd limits nothing"],
    ),
    Case("no module", ["oracle.function=jobs.oracles.nothere:judge"], ["no module nothere in jobs.oracles"]),
    Case("no function", ["oracle.function=jobs.oracles.quickstart:judje"], ["did you mean jobs.oracles.quickstart:ju"]),
    Case(
        "a dot for the colon",
        ["oracle.function=jobs.oracles.quickstart.judge"],
        ['oracle.function: must be "module:function"', 'write "jobs.oracles.quickstart:judge"'],
    ),
    Case("a broken module", broken_module, ["oracle.function: ", "badmod.py, line 1: invalid syntax"], plan=False),
    Case("the plan of a broken module", broken_module, ["badmod.py, line 1: invalid syntax: def judge(:"]),
    Case(
        "a setting of another oracle",
        ["oracle.type=replay", "oracle.path=nowhere.csv"],
        ['oracle.function: is a setting of type "scripted", and this is type "replay"; leave it out'],
        says_not=["did you mean function"],
    ),
    Case("a tracker that is missing", ["tracking.wandb.project=x"], ["pip install wandb, or leave the table out"]),
    Case("a folder that takes no files", ["run_dir=/proc/rayrl/x"], ["run_dir must be a folder that can be written"]),
    Case(
        "the folder of another run",
        other_run,
        ["belongs to another config; these settings differ: dpo.beta (0.3 there, 0.1 now)", "Set them back"],
        says_not=["delete", "'queue_s'"],
    ),
    Case("a damaged run", damaged_run, ["config.json must be the resolved config of a run", "damaged"]),
    Case("a line break in a folder", ["run_dir=runs/a\nb"], ["run_dir: must be the path", "without line breaks"]),
    Case("spaces around =", ["select.budget = 50"], ["paid     50 label queries"], 0),
    Case("spaces around = without quotes", ["select.budget", "=", "50"], ["must be one argument", "'section.key = va"]),
    Case("a number for a table", ["select=5"], ["select: must be a table of settings, got 5; write a table [select]"]),
    Case("two settings in one", ["name='a'\nselect=1"], ["override name must be one value", "an argument of its own"]),
    Case("a mistyped flag", ["--paln"], ["there is no flag --paln; did you mean --plan?"], plan=False),
    Case("a flag of other programs", ["--dry-run"], ["there is no flag --dry-run; did you mean --plan?"], plan=False),
    Case("a flag before the config", lambda _: ["--plan", QUICKSTART], ["run      quickstart"], 0, plan=False),
    Case("help after the config", ["--help"], ["usage: python jobs/proxy_dpo.py CONFIG.toml"], 0, plan=False),
    Case("two configs", ["jobs/configs/stories.toml"], ["one config is run at a time"]),
    Case("another folder", from_another_folder, ["rubric.template: jobs/quickstart/judge.txt does not exist in"]),
    Case("a shipped config without its files", lambda _: ["jobs/configs/llama_8gpu.toml"], ["seed_data.path: "]),
    Case("another one", lambda _: ["jobs/configs/rlp_alpacafarm.toml"], ["pool.path: "], name="rlp"),
    Case("a link to nowhere", dangling, ["prompts.jsonl is a link to /nowhere/prompts.jsonl, which does not exist"]),
    Case("a home directory", ["run_dir=~/x"], [f"-> {Path.home()}/x"], 0),
    Case("nan is a name", ["name=nan"], ["run      nan -> "], 0),
    Case("inf is a name", ["name=inf"], ["run      inf -> "], 0),
    Case("true is a name", ["name=true"], ["run      true -> "], 0),
    Case("1e5 is a name", ["name=1e5"], ["run      1e5 -> "], 0),
    Case("a date is a name", ["name=2024-01-01"], ["run      2024-01-01 -> "], 0),
    Case("several mistakes", ["rounds=0", "dpo.beta=-1", "x=1"], ["rounds: ", "dpo.beta: ", "x: unknown key"]),
]


@pytest.fixture(autouse=True)
def at_home(monkeypatch, tmp_path_factory):
    """The root of the project, without the runs that have been there."""
    home = tmp_path_factory.mktemp("home")
    (home / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_command_line_ends_as_it_should(case, tmp_path, monkeypatch, capsys):
    def no_ray():
        raise AssertionError("it is to be refused before Ray starts")

    monkeypatch.setattr("rayrl.fleets.connection.connect", no_ray)
    with ExitStack() as ends:
        given = case.arguments
        given = [QUICKSTART, *given] if isinstance(given, list) else given(Folder(tmp_path, monkeypatch, ends))
        code = job(case.name, [*given, "--plan"] if case.plan else given, "about")
    out, err = capsys.readouterr()
    assert code == case.code, err
    said = out if code == 0 else err
    for words in case.says:
        assert words in said
    for words in (*NEVER, *case.says_not):
        assert words not in said
    assert len(said.splitlines()) <= (SCREEN if code == 0 else len(case.says) + 8), "one screen"
    assert (err if code == 0 else out) == ""


def test_a_plan_is_json_on_demand(capsys):
    assert job("proxy_dpo", [QUICKSTART, "--json", "--plan"], "about") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["name"] == printed["plan"]["name"] == "quickstart"
    assert "num_replicas" in printed["plan"]["operation"]["generators"]
    assert job("proxy_dpo", [QUICKSTART, "--json"], "about") == 2
    assert "add it, or leave --json out" in capsys.readouterr().err


def ended(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        rayrl(list(arguments))
    out, err = capsys.readouterr()
    return stopped.value.code, out + err


def test_rayrl_plans_and_runs_like_the_jobs(capsys):
    code, said = ended(capsys, "run", QUICKSTART, "select.budget=50", "--plan")
    assert code == 0 and "paid     50 label queries" in said
    assert ended(capsys, "plan", "select.budget=50", QUICKSTART) == (code, said)
    assert ended(capsys, "plan", "jobs/configs/rlp_quickstart.toml")[0] == 0
    code, said = ended(capsys, "run", QUICKSTART, "--paln")
    assert code == 2 and "did you mean --plan?" in said
    code, said = ended(capsys, "plan", "--json", QUICKSTART)
    assert code == 0 and json.loads(said)["plan"]["pipeline"] == "proxy_dpo"
    assert ended(capsys, "--version") == (0, "rayrl 0.1.0\n")
    assert "--install-completion" in ended(capsys, "--help")[1]


def test_an_address_without_a_chat_endpoint_ends_before_any_work(ray_cluster, tmp_path, capsys):
    """A server may lack a list of models; that it has no chat either shows at the free test question."""
    with JudgeServer(lambda index, question: Reply(status=404, text="no such page")) as server:
        server.models = Reply(status=404, text="no such page")
        table = f'oracle={{type="http", base_url="{server.root}", model="m"}}'
        code = job("proxy_dpo", [QUICKSTART, table, f"run_dir={tmp_path}/run", "name=no-chat"], "about")
    err = capsys.readouterr().err
    assert code == 2 and "there is no chat endpoint" in err and "oracle.base_url" in err and "/v1" in err
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize("command", ["scale", "stop"])
def test_a_dead_cluster_is_said(command):
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", "rayrl.cli", command, "mine"], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "RAY_ADDRESS must name a running cluster, got 127.0.0.1:1" in done.stderr


def test_a_bucket_without_keys_is_said(monkeypatch, tmp_path, capsys):
    s3fs.S3FileSystem.clear_instance_cache()  # other tests have had keys in this process
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for command in ("status", "report", "ledger", "runs"):
        code, said = ended(capsys, command, "s3://no-such-bucket-zzz/run")
        assert code == 2 and "got s3://no-such-bucket-zzz/run: Unable to locate credentials; check" in said
        assert "Traceback" not in said


def run_script(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "jobs" / "proxy_dpo.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_users_module_is_found_before_ours(tmp_path):
    """jobs/ is on no import path: `oracles`, and `rehearsal`, are free names for a user's own modules."""
    (tmp_path / "mine.toml").write_text(absolute_quickstart())
    (tmp_path / "oracles.py").write_text("def mine(prompt, response):\n    return 3\n")
    planned = run_script(tmp_path, "mine.toml", "oracle.function=oracles:mine", "--plan")
    assert planned.returncode == 0, planned.stderr
    refused = run_script(tmp_path, "mine.toml", "oracle.function=rehearsal:judge", "--plan")
    assert refused.returncode == 2 and "there is no rehearsal.py, and no package rehearsal" in refused.stderr


def test_a_plan_from_the_outside_imports_nothing_heavy(tmp_path):
    heavy = ("torch", "ray", "vllm", "transformers", "deepspeed", "datasets", "pandas", "scipy")
    program = (
        "import sys; from rayrl.pipelines.command_line import main\n"
        f"code = main('proxy_dpo', ['{QUICKSTART}', '--plan'], '')\n"
        f"print(code, [module for module in {heavy} if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
