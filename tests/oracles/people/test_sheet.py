"""Spreadsheets as people fill them in: each answer is read, each bad cell named, and nothing of theirs is changed."""

import csv
import io
import re
import zipfile

import pytest
from openpyxl import load_workbook
from openpyxl.styles import Font
from pydantic import ValidationError

from rayrl.config import RubricConfig, SheetOracleConfig
from rayrl.errors import ConfigError, DataError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.people.sheet import MAX_CELL, SheetDesk
from rayrl.records import Comparison, Judgement, content_id

RUBRIC = load_rubric(RubricConfig())


def question(number, response=None):
    return Judgement(
        key=content_id("question", str(number)),
        prompt_id=f"p{number}",
        response_id=f"p{number}-0",
        prompt=f"Prompt {number},\nsecond line",
        response=response or f'Answer {number}; "quoted"',
    )


def pair(number):
    return Comparison(
        key=content_id("pair", str(number)),
        prompt_id=f"p{number}",
        first_id="a",
        second_id="b",
        prompt=f"Prompt {number}",
        first="=SUM(A1)",
        second="fine",
    )


def desk(tmp_path, suffix=".csv", **settings):
    return SheetDesk(SheetOracleConfig(path=str(tmp_path / f"questions{suffix}"), **settings), RUBRIC)


def answers_of(desk, kind="judgements"):
    """What people answered, without the questions that wait."""
    return {key: answers for key, answers in desk.collect(kind).items() if answers}


def rows_of(path):
    if path.suffix == ".xlsx":
        return [["" if cell is None else str(cell) for cell in row] for row in load_workbook(path).worksheets[0].values]
    return list(csv.reader(io.StringIO(path.read_text("utf-8-sig"), newline="")))


def fill(path, column, answers):
    """Write answers into a column, row by row, as a person would; None leaves the cell empty."""
    if path.suffix == ".xlsx":
        book = load_workbook(path)
        sheet = book.worksheets[0]
        place = [cell.value for cell in sheet[1]].index(column) + 1
        for number, answer in enumerate(answers, 2):
            if answer is not None:
                sheet.cell(number, place).value = answer
        book.save(path)
        return
    header, *rows = rows_of(path)
    for row, answer in zip(rows, answers, strict=False):
        row[header.index(column)] = "" if answer is None else str(answer)
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_answers_come_back_by_key_and_partial_files_are_welcome(tmp_path, suffix):
    questions = [question(n) for n in range(5)]
    sheet = desk(tmp_path, suffix)
    assert sheet.collect("judgements") == {}
    sheet.post(questions)
    path = tmp_path / f"questions{suffix}"
    assert [row[1:3] for row in rows_of(path)[1:]] == [[each.prompt, each.response] for each in questions]
    fill(path, "score", [4, "cannot say", None, " 0 ", "2.5"])
    fill(path, "reasons", ["clear", "no idea"])
    assert set(sheet.collect("judgements")) == {each.key for each in questions}
    found = answers_of(sheet)
    assert {key: [(a.score, a.rationale) for a in answers] for key, answers in found.items()} == {
        questions[0].key: [(4.0, "clear")],
        questions[1].key: [(None, "no idea")],
        questions[3].key: [(0.0, "")],
        questions[4].key: [(2.5, "")],
    }


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_questions_are_added_once_and_answers_stay(tmp_path, suffix):
    sheet, path = desk(tmp_path, suffix), tmp_path / f"questions{suffix}"
    sheet.post([question(0), question(1)])
    fill(path, "score", [3])
    sheet.post([question(1), question(2)])
    sheet.post([question(2)])
    assert len(rows_of(path)) == 1 + 3
    assert list(answers_of(sheet)) == [question(0).key]


def test_a_file_saved_with_semicolons_and_an_added_column_goes_on_as_it_is(tmp_path):
    sheet, path = desk(tmp_path), tmp_path / "questions.csv"
    sheet.post([question(0)])
    header, row = rows_of(path)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([["note", *header], ["mine", *row[:3], "5", ""]])
    sheet.post([question(1)])
    assert [a.score for a in sheet.collect("judgements")[question(0).key]] == [5.0]
    last = list(csv.reader(io.StringIO(path.read_text(), newline=""), delimiter=";"))[-1]
    assert last == ["", f"q-{question(1).key}", question(1).prompt, question(1).response, "", ""]


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_every_bad_cell_is_named_by_its_row_and_nothing_is_taken(tmp_path, suffix):
    sheet, path = desk(tmp_path, suffix), tmp_path / f"questions{suffix}"
    sheet.post([question(n) for n in range(4)])
    fill(path, "score", [4, "seven", 9, "nan"])
    with pytest.raises(DataError, match=r"column score: it must be a number from 0 to 5, or: cannot say") as refusal:
        sheet.collect("judgements")
    said = str(refusal.value)
    assert "'seven'" in said and "'9'" in said and "'nan'" in said and str(path) in said
    rows = ("row 3", "row 4", "row 5") if suffix == ".xlsx" else ("row 2", "row 3", "row 4")
    assert all(row in said for row in rows)
    assert "Nothing was taken over" in said


def test_rows_without_their_key_and_double_rows_are_named(tmp_path):
    sheet, path = desk(tmp_path), tmp_path / "questions.csv"
    sheet.post([question(0), question(1)])
    fill(path, "score", [1, 2])
    header, first, second = rows_of(path)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, first, ["", *second[1:]], [first[0], *first[1:3], "5", ""]])
    with pytest.raises(
        DataError, match=r"row 2.*copy the key.*; .*row 3.*: it answers the question of .*row 1 .*other"
    ):
        sheet.collect("judgements")


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_a_column_that_is_gone_is_named(tmp_path, suffix):
    sheet, path = desk(tmp_path, suffix), tmp_path / f"questions{suffix}"
    sheet.post([question(0)])
    if suffix == ".xlsx":
        book = load_workbook(path)
        book.worksheets[0]["D1"] = "points"
        book.save(path)
    else:
        path.write_text(path.read_text().replace("score", "points", 1))
    with pytest.raises(DataError, match=r"column score"):
        sheet.collect("judgements")


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_comparisons_have_a_file_of_their_own_and_no_formulas(tmp_path, suffix):
    sheet, path = desk(tmp_path, suffix), tmp_path / f"questions-comparisons{suffix}"
    sheet.post([pair(0), pair(1), pair(2)])
    assert sheet.place("comparisons") == str(path)
    if suffix == ".xlsx":
        assert load_workbook(path).worksheets[0]["C2"].data_type == "s"
        assert rows_of(path)[1][2] == "=SUM(A1)"
    else:
        assert rows_of(path)[1][2] == "'=SUM(A1)"
    fill(path, "better", ["First", "tie", "the second"])
    with pytest.raises(
        DataError, match=r"column better: it must be first, second or tie, or: cannot say, got 'the sec"
    ):
        sheet.collect("comparisons")
    fill(path, "better", ["First", "tie", "second"])
    found = sheet.collect("comparisons")
    assert [found[pair(n).key][0].score for n in range(3)] == [1.0, 0.5, 0.0]
    assert not (tmp_path / f"questions{suffix}").exists()


def test_people_share_the_questions_and_each_is_asked_of_as_many_as_it_needs(tmp_path):
    sheet = desk(tmp_path, people=["anna", "ben", "eve"], num_people=2)
    questions = [question(n) for n in range(60)]
    sheet.post(questions)
    keys = {
        name: {row[0] for row in rows_of(tmp_path / f"questions-{name}.csv")[1:]} for name in ("anna", "ben", "eve")
    }
    assert all(sum(f"q-{each.key}" in theirs for theirs in keys.values()) == 2 for each in questions)
    assert all(30 <= len(theirs) <= 50 for theirs in keys.values())
    sheet.post(questions)
    fill(tmp_path / "questions-ben.csv", "score", [1])
    ((_, [answer]),) = answers_of(sheet).items()
    assert (answer.annotator, answer.score) == ("ben", 1.0)


def test_the_workbook_tells_how_to_answer_and_offers_the_answers(tmp_path):
    desk(tmp_path, ".xlsx").post([question(0)])
    book = load_workbook(tmp_path / "questions.xlsx")
    told = " ".join(str(cell) for (cell,) in book["How to answer"].values)
    assert "Start at 0 and add one point" in told and "Write into column score: a number from 0 to 5" in told
    (choices,) = book.worksheets[0].data_validations.dataValidation
    assert choices.formula1 == '"0,1,2,3,4,5,cannot say"' and str(choices.sqref) == "D2"


def test_what_a_cell_cannot_hold(tmp_path):
    sheet = desk(tmp_path, ".xlsx")
    sheet.post([question(0, "bell \x07 end")])
    assert rows_of(tmp_path / "questions.xlsx")[1][2] == "bell \ufffd end"
    with pytest.raises(DataError, match=r"at most 32,767 characters, and a text has 32,768; name a .csv file"):
        sheet.post([question(1, "x" * (MAX_CELL + 1))])
    desk(tmp_path).post([question(1, "x" * (MAX_CELL + 1))])


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "questions.xlsx").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match=r"questions.xlsx cannot be read as a spreadsheet"):
        desk(tmp_path, ".xlsx").check()
    (tmp_path / "questions.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"questions.csv is empty"):
        desk(tmp_path).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "answers.ods"}, "path must end in .xlsx or .csv"),
        ({"num_people": 2}, "num_people = 2 needs as many names in people"),
        ({"people": ["anna", "Anna"]}, "must name each person once"),
        ({"people": ["an na"]}, 'write "an-na"'),
        ({"deadline": "2027-01-31T18:00:00"}, "deadline must name its time zone"),
        ({"max_concurrency": 4}, "max_concurrency = 4 has no effect on people"),
        ({"budget_usd": 4.0}, "budget_usd needs usd_per_answer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SheetOracleConfig(**({"path": "q.csv"} | settings))


def test_a_question_that_is_not_before_all_whom_it_needs_does_not_lie_there(tmp_path):
    sheet = desk(tmp_path, people=["anna", "ben"], num_people=2)
    sheet.post([question(0), question(1)])
    path = tmp_path / "questions-ben.csv"
    header, first, _ = rows_of(path)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, first])
    assert [f"q-{key}" for key in sheet.collect("judgements")] == [first[0]]
    sheet.post([question(0), question(1)])
    assert len(rows_of(path)) == 3


def test_what_a_formula_gave_survives_the_next_questions(tmp_path):
    sheet, path = desk(tmp_path, ".xlsx"), tmp_path / "questions.xlsx"
    sheet.post([question(0)])
    fill(path, "score", ["=1+2"])
    book = load_workbook(path)
    assert book.worksheets[0]["D2"].data_type == "f"
    # openpyxl computes nothing: what Excel leaves beside the formula is put into the file by hand.
    with zipfile.ZipFile(path) as before:
        parts = {name: before.read(name) for name in before.namelist()}
    name = "xl/worksheets/sheet1.xml"
    parts[name] = re.sub(rb"<f>1\+2</f><v\s*/?>(</v>)?", b"<f>1+2</f><v>3</v>", parts[name])
    with zipfile.ZipFile(path, "w") as after:
        for each, content in parts.items():
            after.writestr(each, content)
    assert [a.score for a in sheet.collect("judgements")[question(0).key]] == [3.0]
    sheet.post([question(1)])
    assert [a.score for a in sheet.collect("judgements")[question(0).key]] == [3.0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_files_in_every_encoding_are_written_and_read_again(tmp_path, encoding):
    sheet = desk(tmp_path, encoding=encoding)
    for number in range(3):
        sheet.post([question(number, "caf\u00e9")])
    path = tmp_path / "questions.csv"
    assert path.read_bytes().decode(encoding).removeprefix("\ufeff").count("caf\u00e9") == 3
    assert len(sheet.collect("judgements")) == 3


def test_a_character_that_an_encoding_lacks_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"oracle.encoding cp1252 has no character '\u4e2d'"):
        desk(tmp_path, encoding="cp1252").post([question(0, "\u4e2d")])


def test_a_file_that_names_its_separator_is_added_to_with_it(tmp_path):
    sheet, path = desk(tmp_path), tmp_path / "questions.csv"
    sheet.post([question(0)])
    header, row = rows_of(path)
    with open(path, "w", newline="") as file:
        file.write("sep=;\n")
        csv.writer(file, delimiter=";").writerows([header, row])
    sheet.post([question(1)])
    assert list(sheet.collect("judgements")) == [question(0).key, question(1).key]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "questions.csv").mkdir()
    with pytest.raises(ConfigError, match=r"oracle.people.path must be a spreadsheet that can be written"):
        SheetDesk(SheetOracleConfig(path=str(tmp_path / "questions.csv")), RUBRIC, "oracle.people").check()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"oracle.path must be a spreadsheet that can be written"):
        SheetDesk(SheetOracleConfig(path=str(tmp_path / "file" / "questions.csv")), RUBRIC).check()


def test_questions_come_below_the_last_row_with_a_value(tmp_path):
    sheet, path = desk(tmp_path, ".xlsx"), tmp_path / "questions.xlsx"
    sheet.post([question(0)])
    book = load_workbook(path)
    book.worksheets[0].cell(5000, 4).font = Font(bold=True)
    book.save(path)
    sheet.post([question(1)])
    assert load_workbook(path).worksheets[0]["A3"].value == f"q-{question(1).key}"
