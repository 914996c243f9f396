"""Rows of the papers' data sets become the columns that the configs read."""

import json

from jobs.prepare_papers import guanaco_row, pair_row, prepare


def test_a_conversation_becomes_its_first_prompt_and_response():
    text = "### Human: What is 2?### Assistant: A number.\nIndeed.### Human: Sure?### Assistant: Yes."
    assert guanaco_row({"text": text}) == {"prompt": "What is 2?", "response": "A number.\nIndeed."}
    assert guanaco_row({"text": "### Human: What is 2?"}) is None
    assert guanaco_row({"text": "### Human: What is 2?### Assistant: "}) is None


def test_a_preference_becomes_a_pair():
    row = {"instruction": "Add.", "input": "1, 2", "output_1": "3", "output_2": "4", "preference": 2}
    pair = pair_row(row)
    assert (pair["chosen"], pair["rejected"]) == ("4", "3")
    assert "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:" in pair["prompt"]
    assert pair_row(row | {"preference": 1})["chosen"] == "3" and pair_row(row | {"preference": 0}) is None


def test_files_of_either_form_are_written_row_by_row(tmp_path):
    rows = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(3)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("list.json", "lines.jsonl"):
        assert prepare("seed", tmp_path / name, tmp_path / "out" / "seed.jsonl") == (3, 0)
        written = [json.loads(line) for line in (tmp_path / "out" / "seed.jsonl").read_text().splitlines()]
        assert [row["response"] for row in written] == ["0", "1", "2"]
        assert "Input" not in written[0]["prompt"]
