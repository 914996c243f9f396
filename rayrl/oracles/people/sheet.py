"""A desk of spreadsheets: one file for each person, in which they fill in a cell of each row, and save.

Rows are added at the end, and nothing else is changed: answers, order, added columns and, in .xlsx files, the look of
the cells stay. A row is known by its key.
"""
# openpyxl has no types.
# pyright: reportMissingTypeStubs=false, reportMissingModuleSource=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from openpyxl import Workbook, load_workbook
from openpyxl.styles import Alignment, Font
from openpyxl.utils import get_column_letter
from openpyxl.worksheet.datavalidation import DataValidation

from rayrl.config import SheetOracleConfig
from rayrl.data.cells import SHOWN_CHARACTERS
from rayrl.data.csv_rows import NAMED_SEPARATOR, SEPARATORS, find_dialect
from rayrl.data.rows import read_rows
from rayrl.errors import ConfigError, DataError
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.people.criteria import answer_form, criteria
from rayrl.oracles.people.desk import CANNOT_SAY, Annotation, Kind, kind_of, share_of
from rayrl.records import Comparison, Judgement
from rayrl.runs import storage

COLUMNS: dict[Kind, list[str]] = {
    "judgements": ["key", "prompt", "response", "score", "reasons"],
    "comparisons": ["key", "prompt", "first", "second", "better", "reasons"],
}
ANSWER_COLUMN: dict[Kind, str] = {"judgements": "score", "comparisons": "better"}
MAX_CELL = 32_767
"""Characters that a cell of an .xlsx file holds."""
MAX_NAMED = 5
"""Bad cells that one message names."""
_WIDTHS = {"key": 10, "prompt": 50, "response": 80, "first": 60, "second": 60, "score": 14, "better": 14, "reasons": 50}
_HELP = "How to answer"
_KEY_MARK = "q-"
"""Stands before a key: programs take 16 digits for a number, and some keys have no letter, or only an e."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A row of a spreadsheet that has a key or an answer."""

    where: str
    cells: Mapping[str, object]


class SheetDesk:
    """Spreadsheets, one for each person and kind of question."""

    def __init__(self, config: SheetOracleConfig, rubric: Rubric, setting: str = "oracle") -> None:
        self._config = config
        self._rubric = rubric
        self._setting = setting
        self._people = config.people or [""]
        self.name = self.comparer = config.in_key

    def check(self) -> None:
        for kind in COLUMNS:
            for person in self._people:
                self._check_place(self._file(person, kind))
            self.collect(kind)

    def _check_place(self, url: str) -> None:
        if not storage.is_local(url):
            return
        file = Path(storage.locate(url)[1])
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            usable = not file.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK)
        except OSError:
            usable = False
        if not usable:
            raise ConfigError(
                f"{self._setting}.path must be a spreadsheet that can be written, got {self._config.path}: {file} is a "
                "folder, or lies where nothing can be written; name another one"
            )

    def post(self, questions: Sequence[Judgement | Comparison]) -> None:
        if not questions:
            return
        kind = kind_of(questions[0])
        for place, person in enumerate(self._people):
            url = self._file(person, kind)
            known = {_key(row) for row in self._rows(url, kind)}
            theirs = [each for each in questions if self._is_theirs(each.key, place) and each.key not in known]
            if theirs:
                rows = [[_text_of(each, column) for column in COLUMNS[kind]] for each in theirs]
                added = self._with_rows_xlsx if url.lower().endswith(".xlsx") else self._with_rows_csv
                storage.write_bytes(url, added(url, kind, rows))

    def collect(self, kind: Kind) -> dict[str, list[Annotation]]:
        found: dict[str, list[Annotation]] = {}
        num_files: Counter[str] = Counter()
        bad: list[str] = []
        for person in self._people:
            answered: dict[str, tuple[str, float | None]] = {}
            keys: dict[str, None] = {}  # in the order of the rows
            for row in self._rows(self._file(person, kind), kind):
                keys[_key(row)] = None
                try:
                    annotation = self._read(row, kind, person)
                except DataError as error:
                    bad.append(str(error))
                    continue
                if annotation is None:
                    continue
                key = _key(row)
                where, score = answered.setdefault(key, (row.where, annotation.score))
                if where == row.where:
                    found.setdefault(key, []).append(annotation)
                elif score != annotation.score:
                    bad.append(f"{row.where}: it answers the question of {where} otherwise; empty one of the two")
            num_files.update(list(keys))
        if bad:
            more = f" (and {len(bad) - MAX_NAMED} more)" if len(bad) > MAX_NAMED else ""
            raise DataError(f"{'; '.join(bad[:MAX_NAMED])}{more}. Nothing was taken over; correct them and save")
        return {key: found.get(key, []) for key, num in num_files.items() if key and num >= self._config.num_people}

    def place(self, kind: Kind) -> str:
        return ", ".join(self._file(person, kind) for person in self._people)

    def _file(self, person: str, kind: Kind) -> str:
        stem, dot, suffix = self._config.path.rpartition(".")
        named = stem + ("-comparisons" if kind == "comparisons" else "") + (f"-{person}" if person else "")
        return f"{named}{dot}{suffix}"

    def _is_theirs(self, key: str, place: int) -> bool:
        """Return whether a person is asked a question: `num_people` of them are, and by its key it goes around."""
        first = int(key, 16) % len(self._people)
        return (place - first) % len(self._people) < self._config.num_people

    def _read(self, row: _Row, kind: Kind, person: str) -> Annotation | None:
        """Read the answer of a row; None if there is none.

        Raises:
            DataError: it is no answer, or the row has none of our keys.
        """
        column = ANSWER_COLUMN[kind]
        cell = row.cells.get(column)
        text = "" if cell is None else str(cell).strip()
        if not text:
            return None
        if not _key(row):
            raise DataError(f"{row.where}: it has an answer and no key; copy the key of its question back into it")
        reasons = str(row.cells.get("reasons") or "").strip()
        if text.lower() == CANNOT_SAY:
            return Annotation(annotator=person, score=None, rationale=reasons)
        score = share_of(text) if kind == "comparisons" else _number(text)
        if score is None or (kind == "judgements" and not self._rubric.accepts(score)):
            raise DataError(
                f"{row.where}, column {column}: it must be {answer_form(self._rubric, kind)}, got "
                f"{text[:SHOWN_CHARACTERS]!r}"
            )
        return Annotation(annotator=person, score=score, rationale=reasons)

    def _rows(self, url: str, kind: Kind) -> Iterator[_Row]:
        """Yield the rows of a file; none if it is not there yet."""
        if not storage.exists(url):
            return
        if url.lower().endswith(".xlsx"):
            yield from _rows_of_xlsx(url, COLUMNS[kind])
            return
        if not storage.read_bytes(url).strip():
            raise DataError(f"{url} is empty; put a copy of it back, or remove it, and it is written again")
        for row in read_rows(url, COLUMNS[kind], encoding=self._config.encoding):
            yield _Row(where=row.where, cells=row.cells)

    def _with_rows_csv(self, url: str, kind: Kind, rows: list[list[str]]) -> bytes:
        """Return the content of a .csv file with rows added in the order of its columns, in the way it is written."""
        columns, encoding = COLUMNS[kind], self._config.encoding
        if storage.exists(url):
            text = storage.read_bytes(url).decode(encoding)
            text += "" if text.endswith(("\n", "\r")) else "\n"
            marked, text = text.startswith("\ufeff"), text.removeprefix("\ufeff")
            named = NAMED_SEPARATOR.match(text)
            table = text[named.end() :] if named else text
            dialect = find_dialect(table, columns, SEPARATORS, named[1] if named else None)
            separator = dialect.separator
            header = next(row for row in dialect.reader(io.StringIO(table, newline="")) if any(map(str.strip, row)))
            rows = [[dict(zip(columns, row, strict=True)).get(name.strip(), "") for name in header] for row in rows]
        else:
            # Without a mark Excel takes UTF-8 for something else. Python writes that of UTF-16 by itself.
            text, separator, marked, rows = "", ",", encoding.lower().replace("_", "-") == "utf-8", [columns, *rows]
        sink = io.StringIO(newline="")
        # A text that begins like a formula would be computed by the program that opens the file.
        csv.writer(sink, delimiter=separator).writerows([[_no_formula(cell) for cell in row] for row in rows])
        try:
            return (("\ufeff" if marked else "") + text + sink.getvalue()).encode(encoding)
        except UnicodeEncodeError as error:
            raise DataError(
                f"{url}: {self._setting}.encoding {encoding} has no character {error.object[error.start]!r}, which "
                "stands in a prompt or response; leave encoding out, or name an .xlsx file"
            ) from None

    def _with_rows_xlsx(self, url: str, kind: Kind, rows: list[list[str]]) -> bytes:
        """Return the content of an .xlsx file with rows added below the last one."""
        if storage.exists(url):
            content = storage.read_bytes(url)
            book = load_workbook(io.BytesIO(content))
            sheet: Any = book.worksheets[0]
            header = [str(cell.value or "").strip() for cell in sheet[1]]
            _keep_computed(sheet, load_workbook(io.BytesIO(content), data_only=True).worksheets[0])
        else:
            book = Workbook()
            sheet, header = book.active, COLUMNS[kind]
            self._lay_out(book, sheet, kind)
        start = max((cell.row for row in sheet.iter_rows() for cell in row if cell.value is not None), default=1)
        for number, row in enumerate(rows, start + 1):
            by_name = dict(zip(COLUMNS[kind], row, strict=True))
            for place, name in enumerate(header, 1):
                cell = sheet.cell(number, place)
                cell.value = _fit(by_name.get(name, ""), url) or None
                if cell.value is not None:
                    cell.data_type = "s"  # also of a text that begins like a formula
                cell.alignment = Alignment(wrap_text=True, vertical="top")
        self._add_choices(sheet, kind, header, start + 1, start + len(rows))
        sink = io.BytesIO()
        book.save(sink)
        return sink.getvalue()

    def _lay_out(self, book: Any, sheet: Any, kind: Kind) -> None:
        sheet.title = "Questions"
        sheet.append(COLUMNS[kind])
        for place, name in enumerate(COLUMNS[kind], 1):
            sheet.cell(1, place).font = Font(bold=True)
            sheet.column_dimensions[get_column_letter(place)].width = _WIDTHS[name]
        sheet.freeze_panes = "A2"
        told = book.create_sheet(_HELP)
        told.column_dimensions["A"].width = 110
        answer = f"Write into column {ANSWER_COLUMN[kind]}: {answer_form(self._rubric, kind)}."
        for number, text in enumerate((*criteria(self._rubric, kind).split("\n"), "", answer), 1):
            told.cell(number, 1, text or None).alignment = Alignment(wrap_text=True, vertical="top")

    def _add_choices(self, sheet: Any, kind: Kind, header: list[str], first: int, last: int) -> None:
        """Let the cells of the answers offer what may stand there."""
        least, most = self._rubric.min_score, self._rubric.max_score
        words = ["first", "second", "tie"] if kind == "comparisons" else list(map(str, range(least, most + 1)))
        formula = f'"{",".join([*words, CANNOT_SAY])}"'
        if len(formula) > 250:  # the longest list that the format allows
            return
        choices = DataValidation(type="list", formula1=formula, allow_blank=True)
        # Other numbers on the scale are answers too.
        choices.showErrorMessage = kind == "comparisons"
        letter = get_column_letter(header.index(ANSWER_COLUMN[kind]) + 1)
        choices.add(f"{letter}{first}:{letter}{last}")
        sheet.add_data_validation(choices)


def _keep_computed(sheet: Any, computed: Any) -> None:
    """Put what formulas of people's gave into their cells: a workbook that is written here is not computed again."""
    for row in sheet.iter_rows(min_row=2):
        for cell in row:
            if cell.data_type == "f" and (value := computed[cell.coordinate].value) is not None:
                cell.value = value


def _rows_of_xlsx(url: str, needed: Sequence[str]) -> Iterator[_Row]:
    try:
        book = load_workbook(io.BytesIO(storage.read_bytes(url)), data_only=True)
    except Exception as error:  # of many kinds: a zip file that is cut, XML that is none
        raise DataError(f"{url} cannot be read as a spreadsheet: {error}; put a copy of it back") from None
    rows = book.worksheets[0].iter_rows(values_only=True)
    header = [str(name or "").strip() for name in next(rows, ())]
    for column in needed:
        if header.count(column) != 1:
            raise DataError(
                f"{url} must have the column {column} once in the first row of its first sheet, and has "
                f"{', '.join(filter(None, header))}; write its name back"
            )
    for number, cells in enumerate(rows, 2):
        if any(cell is not None for cell in cells):
            named = dict(zip(header, cast("tuple[object, ...]", cells), strict=False))
            yield _Row(where=f"{url}, row {number}", cells={"key": None, **named})


def _text_of(question: Judgement | Comparison, column: str) -> str:
    """Return what stands in a column of a question that is not answered yet."""
    if column == "key":
        return f"{_KEY_MARK}{question.key}"
    return "" if column in ("score", "better", "reasons") else str(getattr(question, column))


def _key(row: _Row) -> str:
    """Return the key of a row's question; "" if the cell is empty."""
    return str(row.cells["key"] or "").strip().removeprefix(_KEY_MARK)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _fit(text: str, url: str) -> str:
    """Return a text as a cell can hold it.

    Raises:
        DataError: it is too long.
    """
    if len(text) > MAX_CELL:
        raise DataError(
            f"{url}: a cell must have at most {MAX_CELL:,} characters, and a text has {len(text):,}; name a .csv file "
            "in oracle.path, or lower generate.max_tokens"
        )
    # XML has no control characters but these.
    return "".join(each if each >= " " or each in "\t\n\r" else "\ufffd" for each in text)
