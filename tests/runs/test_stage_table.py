"""Numbers that the stage table works out."""

import pytest

from rayrl.runs.stage_table import num_refresh_blocks


@pytest.mark.parametrize(("num_wanted", "expected"), [(None, 10), (1, 1), (64, 1), (65, 2), (640, 10), (10_000, 10)])
def test_the_refresh_samples_whole_blocks(num_wanted, expected):
    assert num_refresh_blocks(num_wanted, 64, 10) == expected
