"""Processes that train together end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_SCRIPT = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
from dydit_core.train.team import Team, together

def work(team, folder):
    (folder / str(team.rank)).write_text(str(os.getpid()))
    while True:
        time.sleep(0.02)

if __name__ == "__main__":
    together(work, 2, 1, Path(sys.argv[1]))
"""


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except FileNotFoundError:
        return True


def _until(true: object, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="torch ties members to their parent on Linux alone")
def test_members_of_a_killed_training_end_with_it(tmp_path: Path) -> None:
    """Also in the background, where a shell has Ctrl-C ignored: else they would train on beside the run that continues theirs."""
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)
    root = Path(__file__).parents[1]
    leader = subprocess.Popen([sys.executable, script, tmp_path], env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL)
    marks = [tmp_path / "0", tmp_path / "1"]
    assert _until(lambda: all(mark.exists() and mark.read_text() for mark in marks))
    leader.send_signal(signal.SIGKILL)
    leader.wait()
    assert _until(lambda: all(_gone(int(mark.read_text())) for mark in marks))
