"""The check as a whole: it writes nothing, loads nothing heavy, and contacts the oracle only if it is told to."""

import json
import os
import socket
import subprocess
import sys

import pytest

from rayrl.config import RubricConfig, RunConfig
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import evaluator_prompt, load_rubric
from rayrl.preflight import check
from tests.preflight.trees import EVALUATOR, FUNCTION, TWO_CPUS, changed, plan_of, refusal


def test_a_check_writes_nothing(tree, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    check(changed(tree), cluster=TWO_CPUS)
    assert sorted(tmp_path.rglob("*")) == before


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


def test_a_plan_of_rlp_loads_nothing_heavy(rlp_tree):
    program = (
        "import sys; from rayrl.config import RunConfig; from rayrl.preflight import check, render_plan\n"
        "render_plan(check(RunConfig.model_validate_json(sys.argv[1])))\n"
        "heavy = ('torch', 'ray', 'vllm', 'transformers', 'datasets', 'openai')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", program, json.dumps(RunConfig.model_validate(rlp_tree).model_dump(mode="json"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr[-2000:]


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
    assert "there is no no_such_module.py, and no package no_such_module; run from the folder" in refusal(
        ConfigError, changed(tree, oracle=scripted)
    )
    message = refusal(ConfigError, changed(tree, oracle__compare_function="no_such_module:compare"))
    assert message.startswith('oracle.compare_function must be "module:function", importable')


@pytest.mark.parametrize("function", ["builtins:len", "math:dist", "os:getpid"])
def test_a_function_without_text_is_refused_before_work_starts(rlp_tree, function):
    config = changed(rlp_tree, **FUNCTION | {"ppo__function": function})
    plan_of(rlp_tree, **FUNCTION | {"ppo__function": function})  # a plan does not import the user's code
    message = refusal(ConfigError, config, contact_oracle=True)
    assert "ppo.function must be written in Python" in message and f'got "{function}"' in message
    check(changed(rlp_tree, **FUNCTION), cluster=TWO_CPUS, contact_oracle=True)
    message = refusal(
        ConfigError, changed(rlp_tree, **FUNCTION | {"ppo__function": "json:nothing"}), contact_oracle=True
    )
    assert "json/__init__.py has no function nothing" in message


def test_a_rubric_that_fills_the_context_is_refused_where_a_model_reads_it(rlp_tree):
    small = {"policy__max_model_len": 32, "select__budget": 4}
    message = refusal(ConfigError, changed(rlp_tree, **small, refresh__method="self_judged"))
    assert "must leave room in the context of 32 tokens" in message and "set another refresh.method" in message
    assert 'set evaluator.type = "scalar"' in refusal(ConfigError, changed(rlp_tree, **small, **EVALUATOR))
    for reads_nothing in (
        {},
        {"evaluator__type": "scalar", **EVALUATOR},
        FUNCTION | {"refresh__method": "self_judged"},
    ):
        plan_of(rlp_tree, **small, **reads_nothing)
    num_tokens = len(evaluator_prompt(load_rubric(RubricConfig()), "", "", "score_first").split())
    plan = plan_of(rlp_tree, policy__max_model_len=num_tokens + 10, refresh__method="self_judged")
    (warning,) = [warning for warning in plan.warnings if "judge" in warning]
    assert "up to 12 of 12 prompts" in warning and "or set another refresh.method" in warning
