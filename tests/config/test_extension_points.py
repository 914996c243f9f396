"""Settings that name an entry of a registry: one more entry is one more value, and nothing else changes."""

from typing import get_args

import numpy as np
import pytest

from rayrl.algorithms.advantages import ADVANTAGES, AdvantageEstimator, gae
from rayrl.algorithms.clustering import CLUSTERINGS, Clustering
from rayrl.algorithms.information import UML_OBJECTIVES
from rayrl.algorithms.kl import KL_ESTIMATORS
from rayrl.algorithms.pairing import PAIRINGS, Pairing
from rayrl.algorithms.preference import PREFERENCE_LOSSES
from rayrl.algorithms.rewards import ENSEMBLE_OBJECTIVES
from rayrl.algorithms.selection import STRATEGIES, Selection, Strategy
from rayrl.config import DpoConfig, RewardModelConfig, UmlConfig, load_config
from tests.config.test_config import SMALL, refusal


def choose_nothing(pool, num_selected, knowledge):
    return Selection(ids=[], radii=[])


ADDED = [
    ("select.strategy", STRATEGIES, Strategy(choose=choose_nothing, reads_vectors=False)),
    ("pseudo_label.pairing", PAIRINGS, Pairing(pairs=lambda scores, margin: [], num_pairs=lambda k: 1)),
    ("ppo.kl_estimator", KL_ESTIMATORS, lambda log_ratio: log_ratio.abs()),
    ("ppo.advantages", ADVANTAGES, AdvantageEstimator(estimate=gae, reads_values=True)),
    ("refresh.spg.clustering", CLUSTERINGS, Clustering(reads="entailment", find=lambda labels: np.arange(len(labels)))),
]


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize(("setting", "registry", "entry"), ADDED, ids=[setting for setting, _, _ in ADDED])
def test_an_added_entry_is_accepted_and_changes_no_other_setting(small, monkeypatch, setting, registry, entry):
    override = f"{setting}=brand_new"
    before = load_config(small)
    assert 'got "brand_new"' in refusal(small, override)
    monkeypatch.setitem(registry, "brand_new", entry)
    assert load_config(small) == before
    dumped = load_config(small, [override]).model_dump(mode="json")
    *sections, key = setting.split(".")
    table, expected = dumped, before.model_dump(mode="json")
    other = expected
    for section in sections:
        table, other = table[section], other[section]
    assert table[key] == "brand_new"
    table[key] = other[key]
    assert dumped == expected


@pytest.mark.parametrize(
    ("table", "field", "registry"),
    [
        (DpoConfig, "loss", PREFERENCE_LOSSES),
        (RewardModelConfig, "objective", ENSEMBLE_OBJECTIVES),
        (UmlConfig, "objective", UML_OBJECTIVES),
    ],
)
def test_choices_of_settings_that_cannot_import_torch_are_the_registries(table, field, registry):
    assert list(get_args(table.model_fields[field].annotation)) == list(registry)
