import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rayrl").rglob("*.py"))
LAYERS = [
    {"errors"},
    {"records"},
    {"config"},
    {"algorithms"},
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
    {"cli"},
    {"jobs"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "vllm": "rayrl/engines/",
    "deepspeed": "rayrl/training/deepspeed_engine.py",
    "ray.train": "rayrl/training/launch.py",
}


def imports(path):
    """Every module a file imports, anywhere in it; `from ray import train` is an import of ray.train."""
    for node in ast.walk(ast.parse(path.read_text())):
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


@pytest.mark.parametrize("module", ["rayrl.config", "rayrl.records", "rayrl.preflight", "rayrl.cli"])
def test_light_modules_load_nothing_heavy(module):
    heavy = ("torch", "ray", "vllm", "transformers")
    program = f"import sys, {module}\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr[-2000:]
