"""A Label Studio server of its own for the tests, from the environment that `make label-studio` makes."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.dashboard.watched import ROOT, free_port

PROGRAM = ROOT / ".label-studio" / "bin" / "label-studio"
START_S = 240.0
"""Its first start makes a database, which takes a minute on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class LabelStudioServer:
    """A server with one user."""

    url: str
    email: str
    password: str
    token: str


@contextlib.contextmanager
def label_studio(folder: Path) -> Iterator[LabelStudioServer]:
    """Run a server whose data lie in a folder, and end it."""
    if not PROGRAM.exists():
        raise FileNotFoundError(f"make test-people needs {PROGRAM}: run `make label-studio`")
    port = free_port()
    server = LabelStudioServer(
        url=f"http://127.0.0.1:{port}", email="anna@example.org", password="a-long-word", token="0123456789abcdef" * 2
    )
    environment = os.environ | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "COLLECT_ANALYTICS": "false",
        "SENTRY_DSN": "",
    }
    user = ["--username", server.email, "--password", server.password, "--user-token", server.token]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            [PROGRAM, "start", "--no-browser", "--port", str(port), "--internal-host", "127.0.0.1", *user],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(server, process, folder / "server.log")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(server: LabelStudioServer, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, f"Label Studio ended:\n{log.read_text()[-2000:]}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        time.sleep(0.5)
    raise TimeoutError(f"waited {START_S:.0f} s for Label Studio to answer:\n{log.read_text()[-2000:]}")
