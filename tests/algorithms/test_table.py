"""The table of equations names functions that exist."""

import importlib
import re

import pytest

import rayrl.algorithms

ROWS = [line for line in (rayrl.algorithms.__doc__ or "").splitlines() if line.startswith("| ") and "`" in line]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("`")[1])
def test_the_table_names_what_is_there(row):
    module, name = re.findall(r"`(\w+)\.(\w+)`", row)[-1]
    assert hasattr(importlib.import_module(f"rayrl.algorithms.{module}"), name)


def test_the_table_is_read():
    assert len(ROWS) > 30
