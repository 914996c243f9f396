"""Answers of judges as they come: thoughts, decorations, tokens of chat formats, forms of a template's own, JSON."""

import time
from dataclasses import replace

import pytest
from pydantic import ValidationError

from rayrl.config import RubricConfig
from rayrl.errors import ConfigError
from rayrl.models.answer_text import without_end, without_thoughts
from rayrl.models.json_answers import judgement_schema, read_json_comparison, read_json_judgement
from rayrl.models.judge_prompt import Rubric, load_rubric, oracle_prompt, parse_by_pattern, parse_judgement
from rayrl.models.pairwise_prompt import parse_comparison

RUBRIC = load_rubric(RubricConfig())
TAGS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<analysis>", "</analysis>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.mark.parametrize(("opening", "closing"), TAGS)
def test_a_thought_is_no_answer(opening, closing):
    assert parse_judgement(f"{opening}Perhaps\nScore: 1", RUBRIC) is None
    assert parse_comparison(f"{opening}Perhaps\nBetter: first") is None
    assert parse_judgement(f"{opening}Perhaps\nScore: 1\n{closing}Good.\nScore: 4", RUBRIC) == (4, "Good.")
    assert parse_comparison(f"{opening}Perhaps\nBetter: first\n{closing}Better: tie") == ("tie", "")
    # The opening tag was in the prompt.
    assert parse_judgement(f"Perhaps\nScore: 1\n{closing}Good.\nScore: 4", RUBRIC) == (4, "Good.")
    assert parse_judgement(f"{opening}a{closing}\nScore: 4\n{opening}wait", RUBRIC) is None


def test_a_thought_is_closed_by_its_own_tag_alone():
    assert without_thoughts("<think>a</analysis>b\nScore: 5") is None
    assert without_thoughts("<think>a<analysis>b</analysis>c</think>d") == "d"


@pytest.mark.parametrize("text", ["It quotes `<think>` and goes on.", "a <b> [thinker] analysis: <thinks>", "5 < 6"])
def test_what_only_looks_like_a_thought_stays(text):
    assert without_thoughts(text) == text


@pytest.mark.parametrize(
    "end", ["</s>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "\n```", " </s>\n"]
)
def test_tokens_that_end_a_message_are_cut_off(end):
    assert without_end(f"Score: 4{end}") == "Score: 4"
    assert parse_judgement(f"Good.\nScore: 4{end}", RUBRIC) == (4, "Good.")
    assert parse_comparison(f"Good.\nBetter: first{end}") == ("first", "Good.")


@pytest.mark.parametrize(
    "line",
    [
        "`Score: 4`",
        "**Score:** `4`",
        "**Score**: **4**",
        "Score: 4 / 5",
        "Score: **4**/5",
        "- Score: 4",
        "* Score: 4",
        "\u2022 Score: 4",
        "> Score: 4",
        "1. Score: 4",
        "- **Score: 4**",
        '"Score: 4"',
        "\u201cScore: 4\u201d",
        "__Score: 4__",
        "Score\uff1a4",
        "Score: \uff14",
        "\uff33core\uff1a\uff14\uff0f\uff15",
    ],
)
def test_what_the_format_invites_is_read(line):
    assert parse_judgement(f"Good.\n{line}", RUBRIC) == (4, "Good.")


@pytest.mark.parametrize(
    "line",
    ["Score: 4\u00b2", "Score: 3\u00bd", "Score: 4.0", "Score: 4 out of 5", "Score: 4 or 5", "Score - 4", "Score: --4",
     "The Score: 4", "Score: 4, I think", "Score: [[4]]", "`Score: n`", "Score: 4\nScore: 5", "- Score: 9",
     "Score: 4/10"],
)  # fmt: skip
def test_what_is_not_clear_is_not_read(line):
    assert parse_judgement(f"Good.\n{line}", RUBRIC) is None


@pytest.mark.parametrize("line", ["`Better: first`", "- **Better:** first.", '"Better: first"', "Better\uff1afirst"])
def test_a_decorated_verdict_is_read(line):
    assert parse_comparison(f"Good.\n{line}") == ("first", "Good.")


@pytest.mark.parametrize("text", ["*" * 50_000, "* " * 50_000, "\n" * 50_000 + "x", "<|" * 30_000, "Score: " * 20_000])
def test_a_long_answer_of_nothing_is_refused_in_no_time(text):
    start = time.monotonic()
    assert parse_judgement(text, RUBRIC) is None and parse_comparison(text) is None
    assert time.monotonic() - start < 2


# Forms of a template's own.

OWN = Rubric(template="{prompt} {response}", min_score=1, max_score=10, pattern=r"\[\[(-?[\d.]+)\]\]")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Good. [[7]]", (7, "Good.")),
        ("[[7]] since it is good. [[7]]", (7, "since it is good.")),
        ("<think>[[1]]</think>Good. [[7]]", (7, "Good.")),
        ("<think>[[1]]", None),
        ("[[7]] [[8]]", None),
        ("[[7.5]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("7", None),
    ],
)
def test_the_pattern_reads_the_templates_own_form(text, parsed):
    assert parse_by_pattern(text, OWN) == parsed


def test_the_pattern_is_a_part_of_the_version_only_where_it_is_set():
    without = replace(OWN, pattern=None)
    assert len({without.version, OWN.version, replace(OWN, pattern="([0-9])").version}) == 3
    assert oracle_prompt(OWN, "p", "r") == "p r" and "Score: n" in oracle_prompt(without, "p", "r")
    # Paid answers are kept under this hash.
    assert RUBRIC.version == BUILT_IN_VERSION


BUILT_IN_VERSION = "6ab30a40a7d4b120"


@pytest.mark.parametrize("pattern", ["no group", "(a)(b)", "(", "(?:a)"])
def test_a_pattern_without_one_group_is_refused(pattern):
    with pytest.raises(ValidationError, match=r"rubric\.pattern"):
        RubricConfig(template="t", pattern=pattern)


def test_a_pattern_needs_a_template():
    with pytest.raises(ConfigError, match=r"rubric\.template"):
        load_rubric(RubricConfig(pattern="([0-9])"))


@pytest.mark.parametrize(
    "request_",
    [
        'strictly follow this format: "[[rating]]", for example: "Rating: [[5]]"',
        "Rating: <1-10>",
        "Total rating: (your rating, as a number between 0 and 10)",
        "Feedback: (write it) [RESULT] (an integer from 1 to 5)",
        'Answer in JSON: {"reasons": "...", "score": 3}',
        "Write <score>n</score> at the end.",
        "Put the number in \\boxed{}",
        "**Rating**: 4",
    ],
)
def test_a_template_that_asks_for_a_form_of_its_own_is_refused(tmp_path, request_):
    (tmp_path / "own.txt").write_text(f"{{prompt}}\n{{response}}\n{request_}")
    (tmp_path / "pair.txt").write_text(f"{{prompt}}\n{{first}}\n{{second}}\n{request_}")
    with pytest.raises(ConfigError, match=r"rubric\.pattern"):
        load_rubric(RubricConfig(template=str(tmp_path / "own.txt")))
    with pytest.raises(ConfigError, match=r"rubric\.pairwise_template .* take that request out"):
        load_rubric(RubricConfig(pairwise_template=str(tmp_path / "pair.txt")))


@pytest.mark.parametrize(
    "text",
    [
        "Rate how helpful it is, from 0 to 5. A rating of 5 is rare.",
        "Rating: how well does it serve the reader?",
        "Score it strictly: a score: the sum of points. Grade: see above.",
        'The prompt may hold JSON such as {"name": 1, "points": [[0, 1], [2, 3]]}.',
        "End with one line `Score: n`, with n from 0 to 5.",
        "Is x[0][1] right? Does it close <b>tags</b>, and give the result?",
    ],
)
def test_an_ordinary_rubric_is_not_refused(tmp_path, text):
    (tmp_path / "own.txt").write_text(f"{text}\n{{prompt}}\n{{response}}")
    assert text in load_rubric(RubricConfig(template=str(tmp_path / "own.txt"))).template


# JSON.


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ('{"rationale": "Good.", "score": 4}', (4, "Good.")),
        ('```json\n{"rationale": "Good.", "score": 4}\n```', (4, "Good.")),
        ('<think>{"score": 1}</think>{"score": 4.0}', (4, "")),
        ('{"score": 4, "score": 5}', None),
        ('{"score": "4"}', None),
        ('{"score": true}', None),
        ('{"score": 4.5}', None),
        ('{"score": 6}', None),
        ('{"score": NaN}', None),
        ('[{"score": 4}]', None),
        ('Here it is: {"score": 4}', None),
        ('{"rationale": "Good."', None),
        ("", None),
    ],
)
def test_only_one_clear_object_is_a_judgement(text, parsed):
    assert read_json_judgement(text, RUBRIC) == parsed


def test_only_one_of_three_preferences_is_a_comparison():
    assert read_json_comparison('{"rationale": "a", "better": "second"}') == ("second", "a")
    for better in ('"A"', "1", "null", '["first"]'):
        assert read_json_comparison(f'{{"better": {better}}}') is None


def test_a_long_scale_is_bounded_in_the_schema():
    score = judgement_schema(replace(RUBRIC, max_score=1000))["json_schema"]["schema"]["properties"]["score"]
    assert score == {"type": "integer", "minimum": 0, "maximum": 1000}
