import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pipeline_cases import write_case
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).parents[3] / "examples" / "pipeline" / "train.py"
MINUTE = 60
LOST = {
    # what happens to whom, of how many stages
    "hangs": (signal.SIGSTOP, 1, [1, 2, 1]),
    "killed, and with it the store": (signal.SIGKILL, 0, [2, 2]),
    "hangs, and with it the store": (signal.SIGSTOP, 0, [2, 2]),
}


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """All of them at once, since most of the time goes into starting Python."""
    folder = tmp_path_factory.mktemp("lost")
    case = write_case(folder / "case", "llama")
    runs = {}
    for name, (_, _, layers) in LOST.items():
        output = tmp_path_factory.mktemp("output")
        runs[name] = start("train_on_and_on.py", len(layers), output, case, output, layers, 6), output
    return runs


@pytest.mark.parametrize("name", LOST)
def test_a_lost_stage_ends_the_run_by_its_name(runs, name):
    (run, output), (kind, rank, layers) = runs[name], LOST[name]
    wait_until(lambda: all((output / f"ready-{i}").exists() for i in range(len(layers))))
    run.processes[rank].send_signal(kind)
    struck = time.monotonic()
    survivors = [i for i in range(len(layers)) if i != rank]
    codes = [run.processes[i].wait(MINUTE) for i in survivors]
    assert time.monotonic() - struck < MINUTE
    run.processes[rank].kill()
    assert all(code > 0 for code in codes)
    last = sum(layers[: rank + 1]) - 1
    for i in survivors:
        message = run.logs[i].read_text().split("StageError:")[1]
        named = f"has lost stage {rank} (layers {last + 1 - layers[rank]}-{last}) of rank {rank}, process "
        assert f"{named}{run.processes[rank].pid} on " in message
        assert f"The last checkpoint is {output / 'checkpoint'}, of step 3: start all processes again" in message


class Example:
    """A run of the example by torchrun, as a user starts it."""

    def __init__(self, folder, *options):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, EXAMPLE, "--output", folder, "--layers", "2", "2", "--steps", "60", *options]
        self.log = folder.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds):
        try:
            return self.process.wait(seconds), self.log.read_text()
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def test_the_example_resumes_after_a_stage_was_killed(tmp_path):
    broken = Example(tmp_path / "broken", "--timeout", "6")
    whole = Example(tmp_path / "whole")
    try:
        wait_until((tmp_path / "broken" / "checkpoint").exists)
        workers = Path(f"/proc/{broken.process.pid}/task/{broken.process.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
    finally:
        code, output = broken.wait(MINUTE)
    assert code > 0 and "step 60:" not in output
    assert f"has lost stage 1 (layers 2-3) of rank 1, process {workers[1]} on " in output
    resumed = Example(tmp_path / "broken", "--resume")
    results = [run.wait(120) for run in (whole, resumed)]
    assert [code for code, _ in results] == [0, 0], results
    last = [line for _, text in results for line in text.splitlines() if line.startswith("step 60: loss ")]
    assert len(last) == 2 and last[0].split(",")[0] == last[1].split(",")[0]
    assert all("at most 2 on stage 0 of 4 micro-batches were alive" in text for _, text in results)
    states = [load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "broken")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "broken" / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "broken" / "checkpoint")
    ids = tokenizer("the cat sees a dog in the garden", return_tensors="pt")["input_ids"]
    assert model(ids, labels=ids).loss < 3  # at the start log 40, about 3.7
