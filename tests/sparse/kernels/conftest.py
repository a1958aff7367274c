import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def alone():
    """A function that runs a function of alone.py in a process of its own, and what it printed."""

    def run(function, *arguments, **variables):
        command = [sys.executable, Path(__file__).with_name("alone.py"), function, *arguments]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    return run
