"""One of the processes of a training: train_students_in_processes.py FOLDER KIND. Prints, as JSON, what came of it: of
KIND `projection` its weight after three steps, of `hybrid` the gradient of a weight in the first step.

The global batch is the same for any number of processes, which torch.distributed reads from the environment.
"""

import json
import os
import sys

import test_distilling_students as students
import test_hybrid as hybrid

folder, kind = sys.argv[1:]
processes = int(os.environ["WORLD_SIZE"])
settings = {"gradient_accumulation_steps": 4 // processes} | ({"ddp_backend": "gloo"} if processes > 1 else {})
if kind == "projection":
    settings |= {"per_device_train_batch_size": 1, "max_steps": 3, "learning_rate": 1e-3}
    trainer = students.make(folder, students.student(), **settings)
    trainer.train()
    print(json.dumps(trainer._projection.weight.tolist()))
else:
    settings["per_device_train_batch_size"] = 2
    _, gradients = hybrid.train(folder, hybrid.make_tokenizer(), hybrid.llama(), alpha=0.8, **settings)
    print(json.dumps(gradients["lm_head.weight"].tolist()))
