import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for pipeline_cases, as the scripts here find it


class Processes:
    """The processes of one run of a script, and what each has written."""

    def __init__(self, command, count, logs, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "OMP_NUM_THREADS": 1}
        self.logs = [logs / f"log-{rank}" for rank in range(count)]
        self.processes = []
        for rank, path in enumerate(self.logs):
            own = {name: str(value) for name, value in {**shared, "RANK": rank, **environment}.items()}
            with path.open("w") as log:
                self.processes.append(subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log))

    def wait(self, timeout=200):
        return [process.wait(timeout) for process in self.processes]

    def check(self, timeout=200):
        codes = self.wait(timeout)
        assert not any(codes), "\n\n".join(path.read_text()[-3000:] for path in self.logs)


@pytest.fixture(scope="session")
def start():
    """A function that starts a script of this folder: `start("script.py", processes, folder for logs, *arguments)`."""
    started = []

    def run(script, count, logs, *arguments):
        started.append(Processes([sys.executable, HERE / script, *map(str, arguments)], count, logs))
        return started[-1]

    yield run
    for processes in started:
        for process in processes.processes:
            process.kill()
