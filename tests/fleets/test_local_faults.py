"""`damage` finds what a fault left in the tables of a run."""

import shutil
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrl.fleets.local_faults import Damage, damage

UNHARMED = {"num_lost": 0, "num_doubled": 0, "num_paid_twice": 0, "num_different": 0, "num_in_flight": 0}


def write(folder, stage, rows, table="table"):
    (folder / "stages" / stage / table).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "stages" / stage / table / "part-00000.parquet")


def answers(numbers):
    return [{"response_id": f"r{n}", "status": "scored", "score": float(n)} for n in numbers]


def pay(folder, attempts):
    with sqlite3.connect(folder / "ledger.sqlite") as ledger:
        ledger.execute("CREATE TABLE IF NOT EXISTS attempts (key TEXT, state TEXT)")
        ledger.executemany("INSERT INTO attempts VALUES (?, ?)", attempts)


@pytest.fixture
def runs(tmp_path):
    """Two finished runs that are the same: (one, the undisturbed one)."""
    one, undisturbed = tmp_path / "one", tmp_path / "undisturbed"
    prompts = [{"prompt_id": f"p{n}", "text": "x"} for n in range(4)]
    write(undisturbed, "generate", prompts)
    write(undisturbed, "select", [{"response_id": f"r{n}"} for n in range(3)])
    write(undisturbed, "query", answers(range(3)))
    write(undisturbed, "pseudo_label", [{"prompt_id": f"p{n}"} for n in range(4)], "scored-e")
    write(undisturbed, "pseudo_label", [{"prompt_id": f"p{n}"} for n in range(3)])
    pay(undisturbed, [(f"r{n}", "scored") for n in range(3)])
    shutil.copytree(undisturbed, one)
    return one, undisturbed


def found(runs, **harm):
    return damage(*runs) == Damage(**UNHARMED | harm)


def test_a_run_like_the_other_is_unharmed(runs):
    assert found(runs)


def test_lost_doubled_and_changed_rows_are_counted(runs):
    rows = [{"prompt_id": "p0", "text": "x"}, {"prompt_id": "p0", "text": "x"}, {"prompt_id": "p1", "text": "y"}]
    write(runs[0], "generate", rows)
    assert found(runs, num_lost=2, num_doubled=1, num_different=1)


def test_prompts_without_scores_are_lost_and_pairs_of_one_prompt_doubled(runs):
    write(runs[0], "pseudo_label", [{"prompt_id": "p0"}], "scored-e")
    write(runs[0], "pseudo_label", [{"prompt_id": "p0"}] * 2)
    assert found(runs, num_lost=3, num_doubled=1)


def test_an_answer_that_was_paid_twice_is_told(runs):
    pay(runs[0], [("r0", "scored")])
    assert found(runs, num_paid_twice=1)


def test_a_question_under_way_excuses_its_own_answer_and_no_row(runs):
    pay(runs[0], [("r3", "lost")])
    write(runs[0], "query", answers(range(2)))
    assert found(runs, num_in_flight=1)
    write(runs[0], "generate", [{"prompt_id": f"p{n}", "text": "x"} for n in range(3)])
    assert found(runs, num_in_flight=1, num_lost=1)
