"""Fine-tune a causal language model in stages on several processes.

    torchrun --nproc-per-node 2 examples/pipeline/train.py --schedule 1f1b --micro-batches 4

trains a small Llama with random weights on sentences that this script makes up; `--model FOLDER --data FILE` trains
another model on the lines of a text. Each process takes a GPU if there is one, else the CPU. With `--pst 0.9` a PST
adapter prunes 90 % of the layers' weights. What was saved last, in OUTPUT/checkpoint, opens like any model:
`AutoModelForCausalLM.from_pretrained`, for an adapter `PeftModel.from_pretrained`; the same command with `--resume`
goes on from it, with as many processes or others.
"""

import argparse
import random
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from peft_pst import PSTConfig, SparsityScheduler, create_pst_optimizer
from peft_pst.integrations.pipeline import Pipeline

WHO = ["the cat", "a dog", "my neighbour", "the old parrot", "a child", "nobody", "every student", "the compiler"]
DOES = ["sees", "likes", "follows", "does not know", "waits for", "dreams of"]
WHERE = ["in the garden", "at night", "behind the house", "on the train", "in silence", "with great care"]


def make_sentences(count: int) -> list[str]:
    draw = random.Random(0)
    parts = (WHO, DOES, WHO, WHERE, ["and"], WHO, DOES, WHO, WHERE)
    # of different lengths, so that there is padding
    return [" ".join(draw.choice(part) for part in parts[: draw.choice((3, 4, 9))]) + " ." for _ in range(count)]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def make_model(vocabulary: int) -> PreTrainedModel:
    """The same one in every process, and after a restart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, pad_token_id=0, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the folder of a model and its tokenizer")
    parser.add_argument("--data", type=Path, help="a file with a text in each line")
    parser.add_argument("--output", type=Path, default=Path("outputs/pipeline"))
    parser.add_argument("--schedule", default="1f1b", choices=["gpipe", "1f1b", "interleaved"])
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--layers", type=int, nargs="+", help="of each stage; by default balanced by measured cost")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="of a text in tokens, at most")
    parser.add_argument("--lr", type=float, help="by default 1e-3, with --pst that of create_pst_optimizer")
    parser.add_argument("--pst", type=float, metavar="SPARSITY", help="train a PST adapter to this sparsity")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--timeout", type=float, default=15.0, help="seconds after which a silent process is lost")
    args = parser.parse_args()

    texts = args.data.read_text().splitlines() if args.data else make_sentences(500)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else make_tokenizer(texts)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def batch_of(step: int) -> dict[str, torch.Tensor]:
        """The same in every process, and after a restart."""
        chosen = random.Random(step).choices(texts, k=args.batch_size)
        batch = dict(tokenizer(chosen, padding=True, truncation=True, max_length=args.length, return_tensors="pt"))
        batch.pop("token_type_ids", None)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    checkpoint = args.output / "checkpoint"
    if args.resume and args.pst is None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else make_model(len(tokenizer))
    if args.pst is not None:
        if args.resume:
            model = PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
        else:
            model = get_peft_model(model, PSTConfig(task_type="CAUSAL_LM", sparsity=args.pst))

    pipeline = Pipeline(
        model, args.schedule, args.micro_batches, args.layers, example=batch_of(0), timeout=args.timeout
    )
    pipeline.train()
    rates = {} if args.lr is None else {"lr": args.lr}
    if args.pst is None:
        optimizer = torch.optim.AdamW(pipeline.parameters(), **{"lr": 1e-3, **rates})
    else:
        optimizer = create_pst_optimizer(pipeline, **rates)
    done = pipeline.resume(checkpoint, optimizer) if args.resume else 0
    decay = LambdaLR(optimizer, lambda step: 1 - step / args.steps, last_epoch=done - 1)
    sparsity = SparsityScheduler(pipeline, args.steps, done, optimizer) if args.pst is not None else None

    is_main = pipeline.rank == 0
    if is_main:
        print(f"{len(pipeline.layers)} stages of {pipeline.layers} layers on {pipeline.processes} processes")
    progress = tqdm(range(done, args.steps), initial=done, total=args.steps, disable=not is_main)
    for step in progress:
        loss = pipeline.step(batch_of(step))
        pipeline.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if sparsity is not None:
            sparsity.step()
        progress.set_postfix(loss=f"{loss:.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            pipeline.save(checkpoint, optimizer, step + 1, tokenizer)
            if is_main:
                progress.write(f"step {step + 1}: loss {loss:.6f}, saved to {checkpoint}")
    alive = ", ".join(f"{count} on stage {stage}" for stage, count in pipeline.most_alive.items())
    print(f"rank {pipeline.rank}: at most {alive} of {args.micro_batches} micro-batches were alive at once")


if __name__ == "__main__":
    main()
