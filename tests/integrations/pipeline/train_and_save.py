"""One of the processes of pipelines that save: train_and_save.py LAYERS CASE=OUTPUT ... [--resume].

Trains on all batches of each CASE, with `--resume` from OUTPUT/half on, and saves to OUTPUT/half after half of them
and to OUTPUT/end after the last one; `OUTPUT/RANK.json` has the losses.
"""

import json
import sys
from pathlib import Path

import torch
from pipeline_cases import STEPS, make_optimizer, make_schedulers, open_batches, open_model

from peft_pst.integrations.pipeline import Pipeline


def train(case, output, layers, resume):
    checkpoint = output / "half" if resume else None
    model = open_model(case, checkpoint)
    torch.manual_seed(6 if resume else 5)  # what dropout draws comes from the checkpoint
    pipeline = Pipeline(model, "1f1b", micro_batches=4, layers=layers).train()
    optimizer = make_optimizer(pipeline)
    done = pipeline.resume(checkpoint, optimizer) if resume else 0
    schedulers = make_schedulers(pipeline, optimizer, done)
    losses = {}
    for step, batch in list(enumerate(open_batches(case)))[done:]:
        losses[step] = pipeline.step(batch)
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        if step + 1 in (STEPS // 2, STEPS):
            pipeline.save(output / ("half" if step + 1 < STEPS else "end"), optimizer, step + 1)
    pipeline.close()
    (output / f"{pipeline.rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = [tuple(map(Path, job.split("="))) for job in sys.argv[2:] if "=" in job]
    for case, output in jobs:
        train(case, output, json.loads(sys.argv[1]), "--resume" in sys.argv)
