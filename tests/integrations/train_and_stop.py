"""A training that a test kills and resumes: train_and_stop.py FOLDER CONFIG [--slow] [--resume].

CONFIG is JSON, the arguments of PSTConfig; with "ast" those of PSTConfig.ast.
"""

import json
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peft_pst import PSTConfig, create_pst_optimizer
from peft_pst.integrations import PSTCallback

folder = Path(sys.argv[1])


class Progress(TrainerCallback):
    """Notes the step, and gives the test time to kill the process between two of them."""

    def on_step_end(self, args, state, control, **kwargs):
        part = folder / "step.json.part"  # the kill may come in the middle of a write
        part.write_text(json.dumps(state.global_step))
        part.rename(folder / "step.json")
        if "--slow" in sys.argv and state.global_step > 10:
            time.sleep(1)


set_seed(0)
torch.set_num_threads(1)
config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
choices = json.loads(sys.argv[2])
make = PSTConfig.ast if choices.pop("ast", False) else PSTConfig
model = get_peft_model(BertForSequenceClassification(config), make(task_type="SEQ_CLS", **choices))
data = [{"input_ids": torch.randint(0, 99, (7,)), "labels": int(torch.randint(0, 2, ()))} for _ in range(40)]
arguments = TrainingArguments(
    str(folder),
    max_steps=20,
    per_device_train_batch_size=4,
    save_steps=5,
    logging_steps=1,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=data,
    optimizers=(create_pst_optimizer(model), None),
    callbacks=[PSTCallback(), Progress()],
)
trainer.train(resume_from_checkpoint="--resume" in sys.argv)
model.save_pretrained(folder / "final")
(folder / "log.json").write_text(json.dumps(trainer.state.log_history))
merged = model.merge_and_unload()
masks = {
    name: p != 0
    for name, p in merged.named_parameters()
    if "encoder" in name and name.endswith("weight") and p.ndim == 2
}
save_file(masks, folder / "masks.safetensors")
