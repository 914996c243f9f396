"""People in a real Label Studio: tasks pushed and pulled, a person in a real browser, and the run that takes it up."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import sync_playwright

from rayrl.config import LabelStudioOracleConfig, RubricConfig
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.people.label_studio import LabelStudioDesk
from rayrl.records import Comparison, Judgement, content_id
from tests.dashboard.watched import CHROMIUMS, ROOT, tool
from tests.oracles.people.test_sheet import answers_of
from tests.people.label_studio_server import label_studio

pytestmark = [pytest.mark.people, pytest.mark.timeout(1800)]

RUBRIC = load_rubric(RubricConfig())
NUM_LABELLED = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with label_studio(tmp_path_factory.mktemp("label-studio")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABEL_STUDIO_API_KEY", server.token)
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=tool(*CHROMIUMS), args=["--no-sandbox"])
        yield browser
        browser.close()


def desk(server, project, rubric=RUBRIC, **settings):
    return LabelStudioDesk(LabelStudioOracleConfig(url=server.url, project=project, **settings), rubric)


def questions(num):
    return [
        Judgement(
            key=content_id("question", str(n)),
            prompt_id=f"p{n}",
            response_id=f"p{n}-0",
            prompt=f"What is {n}?\n<b>now</b>",
            response=f"It is {n}. $response",
        )
        for n in range(num)
    ]


def pairs(num):
    return [
        Comparison(
            key=content_id("pair", str(n)), prompt_id=f"p{n}", first_id="a", second_id="b",
            prompt=f"What is {n}?", first="one", second="two",
        )
        for n in range(num)
    ]  # fmt: skip


def call(server, path, content=None):
    body = None if content is None else json.dumps(content).encode()
    headers = {"Authorization": f"Token {server.token}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(server.url + path, body, headers), timeout=60) as answer:
        return json.load(answer)


def answer(server, desk, kind, number, *parts, **more):
    """Answer the task of one question, as the page would."""
    project = int(desk.place(kind).split("/")[-2])
    tasks = call(server, f"/api/tasks?project={project}&page_size=1000&fields=all")["tasks"]
    key = (questions if kind == "judgements" else pairs)(number + 1)[number].key
    (task,) = [each for each in tasks if each["data"]["key"] == key]
    about = "response" if kind == "judgements" else "first"
    result = [{"from_name": name, "to_name": about, "type": of, "value": value} for name, of, value in parts]
    return call(server, f"/api/tasks/{task['id']}/annotations", {"result": result, **more})


def choice(value):
    return "answer", "choices", {"choices": [value]}


def reasons(text):
    return "reasons", "textarea", {"text": [text]}


def test_500_tasks_are_pushed_once_and_pulled(server):
    sheet = desk(server, "five hundred")
    sheet.check()
    assert sheet.collect("judgements") == {}
    assert sheet.place("judgements").startswith(server.url)
    for _ in range(2):
        sheet.post(questions(500))
    answer(server, sheet, "judgements", 7, choice("4"), reasons("It is right."), lead_time=12.5)
    answer(server, sheet, "judgements", 8, choice("cannot say"))
    sheet.post(questions(501))
    assert len(sheet.collect("judgements")) == 501
    found = answers_of(sheet)
    assert list(found) == [questions(9)[7].key, questions(9)[8].key]
    ((said,), (unsaid,)) = found.values()
    assert (said.annotator, said.score, said.rationale, said.seconds) == (server.email, 4.0, "It is right.", 12.5)
    assert unsaid.score is None
    project = int(sheet.place("judgements").split("/")[-2])
    assert call(server, f"/api/projects/{project}")["task_number"] == 501


def test_comparisons_lie_in_a_project_of_their_own(server):
    sheet = desk(server, "compared")
    sheet.post(pairs(2))
    answer(server, sheet, "comparisons", 1, choice("second"))
    ((said,),) = answers_of(sheet, "comparisons").values()
    assert said.score == 0.0 and sheet.collect("judgements") == {}


def test_marks_in_a_rubric_are_no_marks_of_the_interface(server):
    template = (
        'Judge the user\'s "request" <1 & 2>.\n<prompt>\n{prompt}\n</prompt>\n<response>\n{response}\n</response>'
    )
    sheet = desk(server, "marks", replace(RUBRIC, template=template))
    sheet.post(questions(1))
    project = int(sheet.place("judgements").split("/")[-2])
    assert (
        "Judge the user's &quot;request&quot; &lt;1 &amp; 2&gt;."
        in call(server, f"/api/projects/{project}")["label_config"]
    )


def test_long_scales_are_typed_and_read(server):
    sheet = desk(server, "long scale", replace(RUBRIC, max_score=100))
    sheet.post(questions(2))
    answer(server, sheet, "judgements", 0, ("answer", "number", {"number": 87}))
    answer(server, sheet, "judgements", 1, ("cannot_say", "choices", {"choices": ["cannot say"]}))
    assert [each.score for (each,) in sheet.collect("judgements").values()] == [87.0, None]


def test_what_is_wrong_at_the_server_is_said_without_the_token(server, monkeypatch):
    monkeypatch.setenv("OTHER_TOKEN", "no-such-token-0123456789")
    with pytest.raises(ConfigError, match=r"answers 401 .*put a valid access token into OTHER_TOKEN") as refusal:
        desk(server, "x y z", api_key_env="OTHER_TOKEN").check()
    assert "no-such-token" not in str(refusal.value)
    nowhere = LabelStudioOracleConfig(url="http://127.0.0.1:9", project="x y z", timeout_s=5)
    with pytest.raises(ConfigError, match=r"127.0.0.1:9 cannot be reached"):
        LabelStudioDesk(nowhere, RUBRIC).check()
    call(server, "/api/projects", {"title": "not ours"})
    with pytest.raises(ConfigError, match=r"must have a control with the name answer"):
        desk(server, "not ours").check()


def run(server, folder):
    oracle = f'oracle={{type="label_studio", url="{server.url}", project="twelve"}}'
    command = [
        sys.executable, "-m", "rayrl.cli", "run", "jobs/configs/quickstart.toml", oracle, f"run_dir={folder}",
        "name=asks-people", "pool.limit=60", "pool.num_eval=12", "generate.k=3", "generate.max_tokens=24",
        "sft.enabled=false", f"select.budget={NUM_LABELLED}", "evaluator.epochs=2", "dpo.epochs=1", "evaluate.budget=0",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


def test_a_person_labels_twelve_items_in_a_browser_and_the_run_ends_with_them(server, browser, tmp_path):
    folder = tmp_path / "run"
    began = time.monotonic()
    parked = run(server, folder)
    print(f"from the start to parked: {time.monotonic() - began:.0f} s")
    assert parked.returncode == 75, parked.stderr[-3000:]
    assert f"0 of {NUM_LABELLED} questions of query are answered" in parked.stderr
    page_of_tasks = next(word for word in parked.stderr.split() if word.startswith(f"{server.url}/projects/"))

    page = browser.new_context(viewport={"width": 1400, "height": 1100}).new_page()
    page.set_default_timeout(180_000)  # the first page takes a minute on a busy machine
    page.goto(f"{server.url}/user/login")
    page.fill("input[name=email]", server.email)
    page.fill("input[name=password]", server.password)
    page.press("input[name=password]", "Enter")
    page.wait_for_url(lambda url: "login" not in url)
    page.goto(page_of_tasks.replace("/data", "/data?labeling=1"))
    for number in range(NUM_LABELLED):
        page.get_by_role("button", name="Submit").first.wait_for()
        # The name of a choice is followed by its key in brackets.
        page.locator("label", has_text=re.compile(rf"^{number % 6}\[")).first.click()
        page.locator("textarea").first.fill(f"reason {number}")
        with page.expect_response(lambda answer: "/annotations" in answer.url and answer.request.method == "POST"):
            page.get_by_role("button", name="Submit").first.click()
        page.wait_for_function(f"document.querySelector('textarea')?.value !== 'reason {number}'")

    began = time.monotonic()
    done = run(server, folder)
    print(f"from the answers to the report: {time.monotonic() - began:.0f} s")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    assert report["paid"]["label"]["spent"] == report["paid"]["label"]["scored"] == NUM_LABELLED
    ((person,), num) = report["people"]["people"], report["people"]["num_questions"]
    assert (person["name"], person["num_answers"], num) == (server.email, NUM_LABELLED, NUM_LABELLED)
    assert person["median_s"] > 0
    table = pq.read_table(folder / "stages" / "query" / "table").to_pylist()
    assert {row["rationale"]: row["score"] for row in table} == {
        f"reason {number}": float(number % 6) for number in range(NUM_LABELLED)
    }
    shown = browser.new_page()
    shown.goto(f"file://{folder}/report.html")
    assert "What people said" in shown.content() and server.email in shown.content()


def test_a_kill_while_tasks_are_pushed_or_pulled_doubles_and_loses_none(server, tmp_path):
    script = (
        "import sys; from rayrl.config import LabelStudioOracleConfig, RubricConfig\n"
        "from rayrl.models.judge_prompt import load_rubric\n"
        "from rayrl.oracles.people.label_studio import LabelStudioDesk\n"
        "from tests.people.test_label_studio import questions\n"
        f"desk = LabelStudioDesk(LabelStudioOracleConfig(url={server.url!r}, project='killed'),"
        " load_rubric(RubricConfig()))\n"
        "print('ready', flush=True)\n"
        "while True:\n    desk.post(questions(450)); desk.collect('judgements')\n"
    )
    for wait_s in (0.05, 0.4, 0.9, 1.5):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    sheet = desk(server, "killed")
    sheet.post(questions(450))
    project = int(sheet.place("judgements").split("/")[-2])
    tasks = call(server, f"/api/tasks?project={project}&page_size=1000&fields=all")["tasks"]
    assert len(tasks) == len({each["data"]["key"] for each in tasks}) == 450
