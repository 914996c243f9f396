"""The Dockerfile: what it is built from and into. It is read, not built: no Docker here."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "cluster" / "cpu.lock").read_text()
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()


def stages(text):
    """Each stage's base and instructions, its base's included: [(instruction, arguments)]."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    found, bases, current = {}, {}, None
    for line in filter(str.strip, lines):
        instruction, arguments = line.split(None, 1)
        if instruction == "FROM":
            base, _, current = arguments.split()
            bases[current], found[current] = base, list(found.get(base, []))
        else:
            found[current].append((instruction, " ".join(arguments.split())))
    return bases, found


def copies(instructions):
    """Sources copied from the build context."""
    return [
        source
        for name, arguments in instructions
        if name == "COPY" and not arguments.startswith("--from=")
        for source in arguments.split()[:-1]
    ]


BASES, STAGES = stages(DOCKERFILE)


def unpinned(bases):
    """Bases from elsewhere without the tag of one release."""
    outside = [base for base in bases.values() if base not in bases]
    return [base for base in outside if not re.search(r":\d+\.\d+\.\d+[\w.-]*(@sha256:\w{64})?$", base)]


def test_bases_are_pinned():
    assert {"cpu", "gpu"} <= set(STAGES)
    assert unpinned(BASES) == []
    assert unpinned({"a": "python:3.11-slim", "b": "python:latest", "c": "python"}) == [
        "python:3.11-slim",
        "python:latest",
        "python",
    ]
    assert "python:3.11." in DOCKERFILE  # the lock's Python


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_targets_end_as_an_ordinary_user_with_a_home(target):
    names = [name for name, _ in STAGES[target]]
    assert STAGES[target][-1] == ("USER", "1000:1000") and names.count("USER") == 1
    assert any("HOME=/home/ray" in arguments for name, arguments in STAGES[target] if name == "ENV")
    assert ("WORKDIR", "/opt/rayrl") in STAGES[target]  # as in the RayJob


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_only_the_projects_own_files_are_copied(target):
    sources = copies(STAGES[target])
    assert all((ROOT / source).exists() for source in sources)
    assert set(sources) - {"cluster/cpu.lock"} == {"pyproject.toml", "README.md", "LICENSE", "rayrl", "jobs"}
    assert not any(name == "ADD" for name, _ in STAGES[target])


def test_the_build_context_is_what_is_copied():
    ignore = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    assert allowed == {source for target in ("cpu", "gpu") for source in copies(STAGES[target])}


def test_the_cpu_target_installs_the_lock_and_checks_its_hashes():
    (install,) = [a for n, a in STAGES["cpu"] if n == "RUN" and "cpu.lock" in a]
    assert "--require-hashes" in install and "--no-deps" in install
    packages = re.split(r"^(?=\S+==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(packages) > 100
    assert [p.split()[0] for p in packages if "--hash=sha256:" not in p] == []


def test_the_gpu_target_installs_the_projects_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (install,) = [a for n, a in STAGES["gpu"] if n == "RUN" and "pip install" in a]
    assert set(re.search(r"\.\[(.+)\]", install)[1].split(",")) == {"gpu", "s3"} <= set(extras)
    assert any(a == "--from=cuda /usr/local/cuda-13.0 /usr/local/cuda" for n, a in STAGES["gpu"] if n == "COPY")
    assert BASES["cuda"].startswith("nvidia/cuda:13.0.")


def test_no_secret_is_written_down():
    assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)\w*=", DOCKERFILE)
    assert not any(name == "ARG" for stage in STAGES.values() for name, _ in stage)
