"""Progress bars follow the work where they can be seen, and leave no trace in a log."""

import os
import pty
import subprocess
import sys

PROGRAM = "from rayrl.metrics.progress import track\nassert list(track(iter('abc'), 'counting', total=3)) == [*'abc']"


def test_a_log_gets_nothing():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=theirs, env=environment() | {"TERM": "xterm"})
    os.close(theirs)
    drawn = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 0 and "counting" in drawn


def environment():
    """Without what makes rich take any stream for a terminal, or none."""
    return {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")}
