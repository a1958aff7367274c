import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")


@pytest.mark.parametrize("where", ["end", "start"])
def test_every_buffer_next_to_a_protected_page(where, alone):
    assert "within bounds" in alone("bounds", where, OMP_NUM_THREADS="1").stdout


@pytest.mark.parametrize("where", ["end", "start"])
def test_a_byte_too_far_is_fatal(where):
    """So the test above would notice."""
    script = Path(__file__).with_name("alone.py")
    done = subprocess.run([sys.executable, script, "touch", where], capture_output=True, text=True, timeout=120)
    assert done.returncode == -11 and done.stdout == "the buffer itself is readable\n"
