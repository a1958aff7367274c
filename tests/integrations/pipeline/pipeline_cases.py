"""Models and data for the tests of the pipeline, in files that every process opens."""

import json
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR

from peft_pst import PSTConfig, PSTLayer, SparsityScheduler, create_pst_optimizer

STEPS, ROWS, CLIP = 10, 8, 1.0
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True, "pad_token_id": 0}
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")


def fixed_seed(self):
    """For L0: random gates would be others in each forward pass, and there are as many of these as micro-batches."""
    return torch.tensor(7)


def make_model(kind, dropout=0.0, **sizes):
    """A small model with random weights: llama, gpt2, bert or bert-mlm."""
    torch.manual_seed(0)
    name = {
        "llama": "LlamaForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "bert": "BertForSequenceClassification",
        "bert-mlm": "BertForMaskedLM",
    }[kind]
    config_class = getattr(transformers, name).config_class
    chosen = LLAMA if kind == "llama" else {**SIZES, **dict.fromkeys(DROPOUT, dropout)}
    return getattr(transformers, name)(config_class(**chosen, **sizes))


def make_batches(kind, steps=STEPS):
    """Padded batches whose micro-batches have unequal numbers of labels, some none at all."""
    torch.manual_seed(1)
    batches = []
    for step in range(steps):
        tokens = 9 if step < steps // 2 else 7
        lengths = torch.randint(2, tokens + 1, (ROWS, 1))
        lengths[0] = tokens
        ids = torch.randint(3, 99, (ROWS, tokens))
        mask = (torch.arange(tokens) < lengths).long()
        if kind == "gpt2":
            mask = mask.flip(1)  # padded on the left
        ids[mask == 0] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind == "bert":
            batch |= {"token_type_ids": torch.randint(0, 2, ids.shape), "labels": torch.randint(0, 2, (ROWS,))}
        else:
            labels = ids.masked_fill(mask == 0, -100)
            if kind == "bert-mlm":
                labels = labels.masked_fill(torch.rand(ids.shape) < 0.7, -100)
            labels[-2:] = -100  # the last of four micro-batches
            batch["labels"] = labels
        batches.append(batch)
    return batches


def write_case(folder: Path, kind: str, pst: dict | None = None, dropout: float = 0.0, steps: int = STEPS) -> Path:
    """What `open_model` and `open_batches` open."""
    make_model(kind, dropout).save_pretrained(folder)
    save_batches(make_batches(kind, steps), folder / "batches.safetensors")
    if pst is not None:
        adapted = get_peft_model(open_base(folder), PSTConfig(**pst))
        adapted.save_pretrained(folder / "adapter")
    return folder


def save_batches(batches, path):
    save_file({f"{i}/{key}": tensor for i, batch in enumerate(batches) for key, tensor in batch.items()}, path)


def open_batches(folder):
    batches = {}
    for key, tensor in load_file(folder / "batches.safetensors").items():
        step, _, name = key.partition("/")
        batches.setdefault(int(step), {})[name] = tensor
    return [batches[step] for step in sorted(batches)]


def open_base(folder):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder)


def open_model(folder, checkpoint=None):
    """The model of a case in training mode, or what a checkpoint has made of it."""
    if not (folder / "adapter").exists():
        return open_base(checkpoint or folder).train()
    return PeftModel.from_pretrained(open_base(folder), checkpoint or folder / "adapter", is_trainable=True).train()


def is_adapted(trained):
    return any(isinstance(module, PSTLayer) for module in trained.modules())


def make_optimizer(trained):
    """The optimizer of a model or pipeline."""
    return create_pst_optimizer(trained) if is_adapted(trained) else torch.optim.AdamW(trained.parameters(), lr=1e-3)


def make_schedulers(trained, optimizer, done=0):
    """What moves after each step, `done` of which were made: the learning rate, and an adapter's sparsity."""
    decay = LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS), last_epoch=done - 1)
    return [decay, SparsityScheduler(trained, STEPS, done, optimizer)] if is_adapted(trained) else [decay]


def loss_of(model, batch, autocast=None):
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        return model(**batch).loss


def train_alone(model, batches, autocast=None):
    """Losses, gradients and their norms in one process, by plain torch."""
    optimizer = make_optimizer(model)
    schedulers = make_schedulers(model, optimizer)
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(batches):
        loss = loss_of(model, batch, autocast)
        loss.backward()
        gradients |= {f"{step}/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    return losses, norms, gradients
