"""A Python function as the oracle: what it returns is a score on the scale, or an abstention."""

import asyncio
import threading

import pytest

from rayrl.config import RubricConfig, ScriptedOracleConfig
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.build import build_oracle

RUBRIC = load_rubric(RubricConfig())
FUNCTIONS = """
import threading
import numpy as np

release = threading.Event()

def length(prompt, response): return min(5, len(response)), f"{len(response)} characters"
def bare(prompt, response): return 2.5
def array_number(prompt, response): return np.float32(1.5), "numpy"
async def later(prompt, response): return 4, prompt
def silent(prompt, response): return None
def unsure(prompt, response): return None, "too short to say"
def too_high(prompt, response): return 5.01
def nan(prompt, response): return float("nan"), "x"
def word(prompt, response): return "five", "x"
def truth(prompt, response): return True
def nothing(prompt, response): return ()
def broken(prompt, response): raise KeyError("no such model")
def raises_timeout(prompt, response): raise TimeoutError("upstream")
def hangs(prompt, response): release.wait(30); return 3
async def hangs_later(prompt, response):
    import asyncio
    await asyncio.sleep(30)
not_a_function = 3
"""


@pytest.fixture(scope="module", autouse=True)
def module_in_working_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripted")
    (folder / "oracle_functions.py").write_text(FUNCTIONS)
    (folder / "oracle_broken.py").write_text(
        "import a_module_that_is_not_there\n\n\ndef judge(prompt, response):\n    return 0"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def ask(function, **settings):
    oracle = build_oracle(ScriptedOracleConfig(function=f"oracle_functions:{function}", **settings), RUBRIC)
    return asyncio.run(oracle.judge("prompt", "abc"))


@pytest.mark.parametrize(
    ("function", "score", "rationale"),
    [("length", 3.0, "3 characters"), ("bare", 2.5, ""), ("array_number", 1.5, "numpy"), ("later", 4.0, "prompt")],
)
def test_scores(function, score, rationale):
    verdict = ask(function)
    assert (verdict.score, verdict.rationale, type(verdict.score)) == (score, rationale, float)


@pytest.mark.parametrize("function", ["silent", "unsure", "too_high", "nan", "word", "truth", "nothing"])
def test_anything_but_a_score_on_the_scale_abstains_and_counts(function):
    verdict = ask(function)
    assert verdict.score is None and verdict.billed and verdict.rationale


def test_a_reason_to_abstain_is_kept():
    assert ask("unsure").rationale == "too short to say"


@pytest.mark.parametrize(("function", "text"), [("broken", "no such model"), ("raises_timeout", "upstream")])
def test_an_exception_abstains_with_its_text_and_is_refunded(function, text):
    verdict = ask(function)
    assert verdict.score is None and not verdict.billed and text in verdict.rationale


@pytest.mark.parametrize("function", ["hangs", "hangs_later"])
def test_a_function_that_hangs_abstains_and_counts(function):
    import oracle_functions

    oracle_functions.release = threading.Event()
    oracle = build_oracle(ScriptedOracleConfig(function=f"oracle_functions:{function}", timeout_s=0.1), RUBRIC)

    async def run():
        verdict = await oracle.judge("p", "r")
        oracle_functions.release.set()
        return verdict

    verdict = asyncio.run(run())
    assert verdict.score is None and verdict.billed and "0.1 s" in verdict.rationale


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("nowhere_to_be_found:judge", "nowhere_to_be_found"),
        ("oracle_functions:missing", "no function missing"),
        ("oracle_functions:not_a_function", "no function not_a_function"),
        ("oracle_broken:judge", "a_module_that_is_not_there"),
    ],
)
def test_an_unusable_function_is_refused(function, text):
    with pytest.raises(ConfigError, match=text) as caught:
        build_oracle(ScriptedOracleConfig(function=function), RUBRIC)
    assert str(caught.value).startswith("oracle.function")
