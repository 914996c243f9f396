"""Rows of published answers that were given several times."""

from jobs.oracles.prepare_repeated import pandalm_row, prometheus_row

PAIR = {"instruction": "Is it so?", "input": "", "response1": True, "response2": " no ", "annotator1": 2}


def test_the_first_person_labels_and_the_others_are_the_truth_where_they_agree():
    row = pandalm_row(PAIR | {"annotator2": 1, "annotator3": 1})
    assert row == {"prompt": "Is it so?", "first": "True", "second": "no", "preference": "second", "others": "first"}
    assert pandalm_row(PAIR | {"input": "this", "annotator2": 0, "annotator3": 1}) == {
        "prompt": "Is it so?\n\nthis",
        "first": "True",
        "second": "no",
        "preference": "second",
        "others": "",
    }
    assert pandalm_row(PAIR | {"response2": " ", "annotator2": 1, "annotator3": 1}) is None


def test_the_response_is_taken_out_of_the_judge_prompt():
    asked = "Task.\n###The instruction to evaluate:\nWhy?\n\n###Response to evaluate:\nSo.\n\n###Reference Answer"
    row = prometheus_row({"instruction": asked, "gpt4_score": [3, 4, 5]})
    assert row == {"prompt": "Why?", "response": "So.", "score": 3, "others": 4.5}
