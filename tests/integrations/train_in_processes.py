"""One of the processes of a training: train_in_processes.py FOLDER KIND CONFIG [--distill] [--resume].

FOLDER holds the model in `base`; KIND is ddp, fsdp2, zero2 or zero3; CONFIG is JSON, the arguments of PSTConfig. The
global batch is the same for any number of processes, which torch.distributed reads from the environment.

Written to FOLDER: `masks-RANK.pt`, the hash of all masks after each step, and by the main process
`trained.safetensors`, the adapter, `logits.safetensors`, of all data, and the merged model in `auto` and, without a
boost, `dense`.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import BertForSequenceClassification, TrainerCallback, TrainingArguments, set_seed

from peft_pst import DistillationConfig, PSTConfig, PSTLayer, calibrate, save_pretrained
from peft_pst.integrations import PSTTrainer

folder, kind, choices = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
GLOBAL_BATCH, BATCH = 12, 2
# what `accelerate launch` makes of a config file
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def shard_on_cpu() -> None:
    """accelerate shards on accelerators only, though FSDP2 runs on a CPU as well."""
    start = PartialState.__init__

    def init(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


class Masks(TrainerCallback):
    """Notes which entries are pruned after each step."""

    hashes: list[str]

    def on_train_begin(self, args, state, control, **kwargs):
        self.hashes = []

    def on_step_end(self, args, state, control, model, **kwargs):
        digest = hashlib.sha256()
        for layer in (module for module in model.modules() if isinstance(module, PSTLayer)):
            digest.update((layer.masked_weight("default") == 0).numpy().tobytes())
        self.hashes.append(digest.hexdigest())


# several processes on a CPU make transformers load an optimizer onto a device of this name, unknown to torch
torch.serialization.register_package(0, lambda _: None, lambda obj, location: obj if location == "cpu:0" else None)
set_seed(0)
torch.set_num_threads(1)
if kind == "fsdp2":
    shard_on_cpu()
    os.environ |= FSDP2
further = {}
if kind.startswith("zero"):
    further["deepspeed"] = {
        "zero_optimization": {
            "stage": int(kind[-1]),
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # else parameters as small as these stay whole
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
arguments = TrainingArguments(
    str(folder),
    max_steps=20,
    data_seed=0,
    per_device_train_batch_size=BATCH,  # a Trainer that resumes takes it from the checkpoint
    gradient_accumulation_steps=GLOBAL_BATCH // (BATCH * processes),
    save_steps=10,
    logging_steps=5,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    **further,
)
# after the arguments: in sight of ZeRO-3 transformers opens a model in pieces
base = BertForSequenceClassification.from_pretrained(folder / "base")
model = get_peft_model(base, PSTConfig(task_type="SEQ_CLS", **choices))
data = [{"input_ids": torch.randint(0, 99, (7,)), "labels": int(torch.randint(0, 2, ()))} for _ in range(60)]
if choices.get("importance") == "wanda":
    batches = [{"input_ids": row["input_ids"][None]} for row in data]
    calibrate(model, batches[rank::processes])
masks = Masks()
distillation = DistillationConfig(logits=0, hidden_states=1.0) if "--distill" in sys.argv else None
trainer = PSTTrainer(
    model,
    arguments,
    train_dataset=data,
    learning_rates={"lr": 3e-4},
    distillation=distillation,
    callbacks=[masks],
)
trainer.train(resume_from_checkpoint="--resume" in sys.argv)
torch.save(masks.hashes, folder / f"masks-{rank}.pt")
state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
if rank == 0:
    state = get_peft_model_state_dict(model, state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "trained.safetensors")
logits = torch.from_numpy(trainer.predict(data).predictions)
if rank == 0:
    save_file({"logits": logits}, folder / "logits.safetensors")
merged = model.merge_and_unload()
for name in ("auto",) if choices.get("boost") else ("auto", "dense"):  # plain transformers has no place for a boost
    if kind in ("fsdp2", "zero3") or rank == 0:
        save_pretrained(merged, folder / name, name)
