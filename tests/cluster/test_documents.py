"""Names in the documents exist: files, pictures, settings, and commands whose configs load."""

import re
from pathlib import Path

import pytest

from rayrl.config import load_config

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "cluster" / "README.md", ROOT / "jobs" / "README.md"]
DOCUMENTS = [*GUIDES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "jobs" / "bench" / "RESULTS.md"]


def missing(text):
    """Files of the repository that a text names and that do not exist."""
    files = r"\b(?:cluster|jobs|rayrl|tests|notebooks)/[\w/.-]+\.(?:py|toml|yaml|sh|md|lock|json|ipynb|jinja)\b"
    named = set(re.findall(files, text.replace(r"\_", "_")))
    return sorted(name for name in named if not (ROOT / name).exists() and "X." not in name)


def named(document):
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_named_files_exist(document):
    assert missing(document.read_text()) == []
    assert missing("see jobs/nothing.py") == ["jobs/nothing.py"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_and_pictures_exist(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [link for link in links if not link.startswith("http") and not (document.parent / link).is_file()] == []


def test_the_config_of_the_readme_loads(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(example)
    config = load_config(path)
    assert config.name == "mine" and config.run_dir == "runs/mine" and config.oracle.type == "http"


def test_the_table_of_files_is_whole():
    table = GUIDES[0].read_text().split("\n\n")[2]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    here = {str(f.relative_to(ROOT / "cluster")) for f in (ROOT / "cluster").rglob("*") if f.is_file()}
    assert listed == here - {"README.md", "Dockerfile.dockerignore"}


def test_submitted_commands_load_and_run_on_a_shared_disk():
    commands = re.findall(r"python (jobs/\w+\.py) (jobs/configs/\w+\.toml) (run_dir=\S+)", GUIDES[1].read_text())
    assert commands
    for job, config, run_dir in commands:
        resolved = load_config(ROOT / config, [run_dir])
        assert job == f"jobs/{resolved.pipeline}.py" and resolved.run_dir.startswith("/mnt/rayrl/")


def test_the_key_file_of_the_guides_is_the_one_that_is_mounted():
    mounted = "/var/run/secrets/rayrl"
    assert mounted in (ROOT / "cluster" / "kuberay" / "rayjob.yaml").read_text()
    for guide in GUIDES:
        assert f"oracle.api_key_env=file:{mounted}/api-key" in guide.read_text()
    assert "--from-file=api-key=" in GUIDES[0].read_text()
    override = f"oracle.api_key_env=file:{mounted}/api-key"
    assert load_config(ROOT / "jobs/configs/llama_8gpu.toml", [override]).oracle.api_key_env.endswith("api-key")
