"""One of the processes of pipelines: train_in_stages.py FOLDER, for every case in FOLDER and each of its schedules.

Written to the case: `SCHEDULE-RANK.json`, and `SCHEDULE-RANK.safetensors` with the gradients of each step.
"""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from pipeline_cases import (
    CLIP,
    fixed_seed,
    make_batches,
    make_model,
    make_optimizer,
    make_schedulers,
    open_batches,
    open_model,
)
from safetensors.torch import save_file

from peft_pst import PSTConfig
from peft_pst.importance import L0
from peft_pst.integrations.pipeline import Pipeline

L0.draw_seed = fixed_seed
LAYERS = {"gpipe": [2, 2], "1f1b": [1, 3], "interleaved": [1, 1, 1, 1]}


def train(case, schedule):
    autocast = torch.bfloat16 if case.name.endswith("bf16") else None
    pipeline = Pipeline(open_model(case), schedule, micro_batches=4, layers=LAYERS[schedule], autocast=autocast)
    optimizer = make_optimizer(pipeline)
    schedulers = make_schedulers(pipeline, optimizer)
    batches = open_batches(case)
    result = {"losses": [], "norms": [], "names": sorted(pipeline.names.values())}
    gradients = {}
    for step, batch in enumerate(batches):
        drawn = torch.get_rng_state()
        result["losses"].append(pipeline.step(batch))
        result["most_alive"] = pipeline.most_alive
        assert torch.equal(drawn, torch.get_rng_state())
        gradients |= {f"{step}/{name}": p.grad.clone() for p, name in pipeline.names.items() if p.grad is not None}
        result["norms"].append(pipeline.clip_grad_norm_(CLIP))
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    result["evaluated"] = pipeline.evaluate(batches[0])
    pipeline.step(batches[0])
    pipeline.step(batches[1])
    gradients |= {f"twice/{name}": p.grad.clone() for p, name in pipeline.names.items() if p.grad is not None}
    # rank 0 is given another batch than rank 1
    other = {**batches[0], "input_ids": batches[0]["input_ids"].roll(1, 0)}
    try:
        pipeline.step(other if pipeline.rank == 0 else batches[0])
    except ValueError as error:
        result["refused"] = str(error)
    pipeline.close()
    save_file(gradients, case / f"{schedule}-{pipeline.rank}.safetensors")
    (case / f"{schedule}-{pipeline.rank}.json").write_text(json.dumps(result))


def refused(model):
    try:
        Pipeline(model, layers=[2, 2])
    except ValueError as error:
        return str(error)


torch.set_num_threads(1)
for case in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    for schedule in json.loads((case / "schedules.json").read_text()):
        train(case, schedule)
another = make_model("llama")
rank = torch.distributed.get_rank()
with torch.no_grad():
    next(another.parameters()).add_(rank)
whole_budget = get_peft_model(make_model("llama"), PSTConfig(sparsity=0.5, budget="global"))
(Path(sys.argv[1]) / f"refused-{rank}.json").write_text(json.dumps([refused(another), refused(whole_budget)]))
balanced = Pipeline(make_model("gpt2"), "interleaved", example=make_batches("gpt2")[0])
(Path(sys.argv[1]) / f"balanced-{rank}.json").write_text(
    json.dumps([balanced.layers, sorted(balanced.names.values())])
)
