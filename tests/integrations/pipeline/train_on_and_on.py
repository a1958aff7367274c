"""One of the processes of a pipeline that trains until it is killed: train_on_and_on.py CASE OUTPUT LAYERS TIMEOUT.

Saves after three steps to OUTPUT/checkpoint, and after one more writes OUTPUT/ready-RANK.
"""

import json
import sys
import time
from itertools import count
from pathlib import Path

import torch
from pipeline_cases import make_optimizer, open_batches, open_model

from peft_pst.integrations.pipeline import Pipeline

case, output, layers, timeout = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4])
torch.set_num_threads(1)
pipeline = Pipeline(open_model(case), "1f1b", micro_batches=4, layers=layers, timeout=timeout)
optimizer = make_optimizer(pipeline)
batch = open_batches(case)[0]
for step in count(1):
    pipeline.step(batch)
    optimizer.step()
    optimizer.zero_grad()
    if step == 3:
        pipeline.save(output / "checkpoint", optimizer, step)
    if step == 4:
        (output / f"ready-{pipeline.rank}").touch()
    time.sleep(0.1)  # other runs are at work beside this one
