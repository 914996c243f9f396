"""The reference of the settings is complete, and the committed files are what the tables say."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from rayrl.config import DpoConfig, GenerateConfig, RunConfig, SelectConfig
from rayrl.config.reference import (
    PAGE,
    SCHEMA,
    bounds_in_words,
    changes_in_words,
    default_in_words,
    page,
    schema,
    tables_of,
    type_in_words,
)

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def test_the_committed_files_are_up_to_date():
    assert (CONFIGS / PAGE).read_text() == page(), "run make reference"
    assert (CONFIGS / SCHEMA).read_text() == schema(), "run make reference"


def test_every_setting_and_table_says_what_it_is():
    silent = [
        f"{name}.{field_name}" for name, _, table in tables_of() for field_name, field in table.model_fields.items()
        if not field.description and not isinstance(field.annotation, type) and "." not in str(field.annotation)
    ]  # fmt: skip
    assert silent == []
    assert all(table.__dict__.get("__doc__") for _, _, table in tables_of())


def test_a_setting_in_words():
    fields = GenerateConfig.model_fields
    assert (type_in_words(fields["k"].annotation), bounds_in_words(fields["k"])) == ("whole number", "> 0")
    assert (bounds_in_words(fields["temperature"]), default_in_words(fields["temperature"])) == (">= 0", "`0.7`")
    assert changes_in_words(SelectConfig.model_fields["budget"]) == "may grow"
    assert changes_in_words(DpoConfig.model_fields["num_workers"]) == "operation"
    assert default_in_words(RunConfig.model_fields["name"]) == "required"
    assert type_in_words(RunConfig.model_fields["pipeline"].annotation) == '"proxy_dpo" or "rlp"'


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_schema_takes_every_shipped_config(path):
    checker = jsonschema.Draft202012Validator(json.loads(schema()))
    assert list(checker.iter_errors(tomllib.loads(path.read_text()))) == []


@pytest.mark.parametrize(("table", "wrong"), [("select", {"budgte": 3}), ("dpo", {"beta": "high"})])
def test_the_schema_refuses_what_the_config_refuses(table, wrong):
    config = tomllib.loads((CONFIGS / "quickstart.toml").read_text())
    config[table] = config.get(table, {}) | wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, json.loads(schema()))
