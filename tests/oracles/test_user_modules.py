"""Modules of the user's: the working directory goes first, and a plan reads them without importing them."""

import sys

import pytest

from rayrl.errors import ConfigError
from rayrl.oracles.scripted import load_function
from rayrl.oracles.user_modules import check_function, find_module


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, and another folder that is first on the import path."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(elsewhere))
    before = set(sys.modules)
    yield here, elsewhere
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(check, path):
    with pytest.raises(ConfigError) as refused:
        check(path, "oracle.function")
    return str(refused.value)


def test_the_working_directory_goes_first(here):
    mine, others = (folder / "twice_there.py" for folder in here)
    mine.write_text("from its_helper import answer\n\n\ndef judge(p, r):\n    return answer()\n")
    (here[0] / "its_helper.py").write_text("def answer():\n    return 'mine'\n")
    others.write_text("def judge(p, r):\n    return 'another'\n")
    found = find_module("twice_there")
    assert found is not None and found.file == mine
    assert load_function("twice_there:judge", "oracle.function")("p", "r") == "mine"
    assert str(here[0]) != sys.path[0], "only for the import"


def test_a_name_that_is_loaded_from_elsewhere_is_refused(here):
    import json

    (here[0] / "json.py").write_text("def judge(p, r):\n    return 1\n")
    message = refusal(load_function, "json:judge")
    assert f"{here[0]}/json.py: {json.__file__} is loaded under that name already; rename yours" in message


def test_a_module_of_a_package_is_found_and_a_missing_one_is_named(here):
    package = here[0] / "mine" / "judges"
    package.mkdir(parents=True)
    (package / "strict.py").write_text("def judge(p, r):\n    return 1\n")
    check_function("mine.judges.strict:judge", "oracle.function")
    assert load_function("mine.judges.strict:judge", "oracle.function")("p", "r") == 1
    assert "there is no module lenient in mine.judges; correct the name" in refusal(
        check_function, "mine.judges.lenient:judge"
    )
    assert "there is no yours.py, and no package yours" in refusal(check_function, "yours.judges:judge")


@pytest.mark.parametrize(
    "text",
    [
        "async def judge(p, r): ...",
        "judge = lambda p, r: 1",
        "from json import loads as judge",
        "import json as judge",
        "try:\n    from nowhere import judge\nexcept ImportError:\n    def judge(p, r): ...",
        "if True:\n    class judge: ...",
        "judge: object = print",
        "first, judge = 1, print",
        "from json import *",
        "def __getattr__(name): ...",
        "globals()['judge'] = print",
        "with open('x') as judge: ...",
        "# -*- coding: latin-1 -*-\n# \xfc\ndef judge(p, r): ...",
    ],
)
def test_what_a_module_names_is_read_off_its_text(here, text):
    encoding = "latin-1" if "latin-1" in text else "utf-8"
    (here[0] / "named.py").write_bytes(text.encode(encoding))
    check_function("named:judge", "oracle.function")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def judge(p, r):\n    return 1 +\n", "broken.py, line 2: invalid syntax: return 1 +; mend it"),
        ("def judge(p, r):\nreturn 1\n", "broken.py, line 2: expected an indented block"),
        ("def jugde(p, r): ...", "has no function judge, got"),
        ("def f():\n    judge = 1", "has no function judge, got"),
        ("judge\0", "broken.py"),
    ],
)
def test_what_cannot_be_called_is_named_without_an_import(here, text, message):
    (here[0] / "broken.py").write_text(text)
    assert message in refusal(check_function, "broken:judge")
    assert "broken" not in sys.modules


def test_what_an_import_raises_is_told_without_our_own_frames(here):
    (here[0] / "asks_too_early.py").write_text("def judge(p, r): ...\n\n\nraise RuntimeError('no key')\n")
    message = refusal(load_function, "asks_too_early:judge")
    assert "whose import raised" in message and "RuntimeError: no key" in message
    assert "asks_too_early.py" in message and "scripted.py" not in message
    (here[0] / "imports_broken.py").write_text("import broken_helper\n\n\ndef judge(p, r): ...\n")
    (here[0] / "broken_helper.py").write_text("def answer(:\n")
    assert "broken_helper.py, line 1: invalid syntax" in refusal(load_function, "imports_broken:judge")
