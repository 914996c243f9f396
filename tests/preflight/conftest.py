"""Configs that the tests of this folder change."""

import pytest

from tests.preflight.trees import small_rlp_tree, small_tree


@pytest.fixture
def tree(tmp_path):
    """A run of proxy_dpo."""
    return small_tree(tmp_path)


@pytest.fixture
def rlp_tree(tmp_path):
    """A run of rlp."""
    return small_rlp_tree(tmp_path)
