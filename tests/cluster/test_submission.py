"""Upload of `ray job submit --working-dir .`, measured with Ray's own packaging."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """The project's files, as a clone has them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = tmp_path / "rayrl" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return tmp_path / "rayrl"


def upload(folder, tmp_path):
    package = tmp_path / "package.zip"
    package.unlink(missing_ok=True)
    create_package(str(folder), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    return package


def test_the_upload_is_small_and_holds_the_jobs(checkout, tmp_path):
    for left_out in ("runs/quickstart/weights", ".git/objects", ".venv/lib"):
        (checkout / left_out).parent.mkdir(parents=True, exist_ok=True)
        (checkout / left_out).write_bytes(b"x")
    package = upload(checkout, tmp_path)
    assert package.stat().st_size < DASHBOARD_CLIENT_MAX_SIZE / 10
    names = set(zipfile.ZipFile(package).namelist())
    assert {"jobs/proxy_dpo.py", "jobs/configs/quickstart.toml", "rayrl/pipelines/proxy_dpo.py"} <= names
    assert "jobs/quickstart/model/model.safetensors" in names
    assert not [name for name in names if name.startswith(("runs/", ".git/", ".venv/"))]


def test_what_nobody_excludes_is_uploaded(checkout, tmp_path):
    (checkout / "mine.parquet").write_bytes(b"x")
    assert "mine.parquet" in zipfile.ZipFile(upload(checkout, tmp_path)).namelist()
    (checkout / ".rayignore").write_text("*.parquet\n")
    assert "mine.parquet" not in zipfile.ZipFile(upload(checkout, tmp_path)).namelist()
