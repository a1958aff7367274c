"""Saves a model in processes that are killed, and prints after each which model the folder holds.

20 are killed at moments spread over the time that a save takes, 20 before operations on files spread over those of a
save, so that the short time in which the folders change places is met too.

Forks, since importing torch takes longer than a save; so nothing here may start a thread before a fork.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from peft_pst import save_pretrained

MOMENTS = 20
SIZES = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}


def make(seed):
    torch.manual_seed(seed)
    model = BertModel(BertConfig(num_hidden_layers=4, **SIZES))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.masked_fill_(torch.rand_like(parameter) < 0.9, 0)
    return model


def forked(function):
    """Run a function in a process of its own; the process number."""
    process = os.fork()
    if not process:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return process


def finish(function):
    _, status = os.waitpid(forked(function), 0)
    assert status == 0


def which(folder, models):
    """Print the name of the model that the folder holds, all of it."""
    opened = BertModel.from_pretrained(folder).dequantize().state_dict()
    equal = [name for name, m in models.items() if all(torch.equal(t, opened[k]) for k, t in m.state_dict().items())]
    print(*equal, flush=True)


def killed_before(operation, counter, save):
    """Save, and die before the n-th operation on files; without one, count them in a file."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save()
    counter.write_text(str(count))


def main():
    torch.set_num_threads(1)
    folder, counter = Path(sys.argv[1]) / "new" / "model", Path(sys.argv[1]) / "counter"
    models = {"old": make(0), "new": make(1)}

    def save(name):
        save_pretrained(models[name], folder, max_shard_size=2_000_000)

    finish(lambda: save("old"))
    start = time.perf_counter()
    finish(lambda: save("new"))
    duration = time.perf_counter() - start
    for moment in range(MOMENTS):
        finish(lambda: save("old"))
        process = forked(lambda: save("new"))
        time.sleep(duration * (moment + 0.5) / MOMENTS)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        finish(lambda: which(folder, models))
    finish(lambda: save("old"))  # a save that sweeps up after a killed one has more operations
    finish(lambda: killed_before(None, counter, lambda: save("new")))
    operations = int(counter.read_text())
    for moment in range(MOMENTS):
        finish(lambda: save("old"))
        operation = 1 + round(moment * (operations - 1) / (MOMENTS - 1))
        _, status = os.waitpid(forked(lambda n=operation: killed_before(n, counter, lambda: save("new"))), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        finish(lambda: which(folder, models))
    finish(lambda: save("new"))
    print(*os.listdir(folder.parent))


if __name__ == "__main__":
    main()
