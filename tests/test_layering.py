"""The house: imports point one way and never in a circle, and facts that stand once are written nowhere else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from rayrl.config import RunConfig
from rayrl.runs.stage_table import STAGES

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rayrl").rglob("*.py"))
LAYERS = [
    {"errors"},
    {"records"},
    {"algorithms"},
    {"config"},
    {"runs"},
    {"metrics"},
    {"models"},
    {"data"},
    {"oracles"},
    {"engines"},
    {"fleets"},
    {"training"},
    {"stages"},
    {"report"},
    {"preflight"},
    {"pipelines"},
    {"study"},
    {"cli"},
    {"jobs"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "vllm": ("rayrl/engines/", "rayrl/training/sync/transfer.py"),
    "deepspeed": "rayrl/training/deepspeed_engine.py",
    "ray.train": "rayrl/training/launch.py",
}


def imports(path):
    """Every module a file imports, anywhere in it; `from ray import train` is an import of ray.train.

    Imports for annotations alone (TYPE_CHECKING) load nothing, and are left out.
    """
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module):
    """The part of the project a dotted name belongs to: rayrl.data.reading -> data."""
    first, *rest = module.split(".")
    return first if first == "jobs" else rest[0] if first == "rayrl" and rest else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    own = part(name.removesuffix(".py").replace("/", "."))
    for module in imports(path):
        if part(module) in LEVEL and own in LEVEL:
            assert LEVEL[part(module)] <= LEVEL[own], f"{name} imports {module}"
        for restricted, place in ONLY_IN.items():
            if f"{module}.".startswith(f"{restricted}."):
                assert name.startswith(place), f"{name} imports {module}"
        if own == "algorithms":
            assert module.split(".")[0] != "ray", f"{name} imports {module}"
            assert part(module) in (None, "algorithms", "records", "errors"), f"{name} imports {module}"


def module_of(path):
    """The dotted name of a file: rayrl/runs/run.py -> rayrl.runs.run; a package is its __init__."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_modules_import_each_other_in_a_circle():
    known = {module_of(path): path for path in FILES}
    graph = {}
    for name, path in known.items():
        found = set(imports(path)) | {module.rpartition(".")[0] for module in imports(path)}
        graph[name] = {module for module in found & known.keys() if not name.startswith(f"{module}.")} - {name}
    # Take away what imports nothing that is left, until nothing goes: what stays is in a circle, or leads into one.
    while leaves := {name for name, imported in graph.items() if not imported & graph.keys()}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    assert graph == {}


STAGE_NAMES = {stage.name for stage in STAGES}
OTHER_MEANINGS = set(RunConfig.model_fields) | {"samples", "candidates", "query", "importance"}
"""Stages whose names are also those of tables of the config, or ordinary words."""
TAKE_A_STAGE = {"folder", "key", "finished", "finish", "curve", "manifest", "read_manifest", "StagePlan"}


def docstrings(tree):
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_stages_are_named_in_their_table_and_nowhere_else(path):
    if path.name == "stage_table.py":
        return
    tree = ast.parse(path.read_text())
    text = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in STAGE_NAMES - OTHER_MEANINGS and id(node) not in text:
            pytest.fail(f"line {node.lineno}: {node.value!r}; use the entry of rayrl/runs/stage_table.py")
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
            if called in TAKE_A_STAGE:
                named = [arg.value for arg in given if isinstance(arg, ast.Constant) and arg.value in STAGE_NAMES]
                assert not named, f"line {node.lineno}: {named}; use the entry of rayrl/runs/stage_table.py"


def test_the_config_is_copied_only_to_resolve_paths():
    copies = {path.name for path in FILES if "model_copy" in path.read_text()}
    assert copies == {"run.py"}, "a round gets its budget and seed as arguments"


@pytest.mark.parametrize("module", ["rayrl.config", "rayrl.records", "rayrl.preflight", "rayrl.cli"])
def test_light_modules_load_nothing_heavy(module):
    heavy = ("torch", "ray", "vllm", "transformers")
    program = f"import sys, {module}\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr[-2000:]
