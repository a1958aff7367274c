"""The command peft-pst: what the library does, on folders.

It stands above the rest of the library and its integrations; nothing imports it.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import PeftConfig
from rich.console import Console
from rich.markdown import Markdown
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

app = typer.Typer(
    help="Sparse models: what they are and cost, merged, saved, checked, and put on the Hub.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(help="A saved model or adapter.", exists=True, file_okay=False)]
Output = Annotated[Path, typer.Argument(help="Where to; a model that is there is replaced.")]
Base = Annotated[str | None, typer.Option(help="An adapter's base model, if not the one that it names.")]
Format = Annotated[Literal["auto", "dense"], typer.Option(help="`dense` stores zeros like any value.")]
Values = Annotated[
    Literal["exact", "bf16", "fp16", "int8"], typer.Option(help="How sparse weights store their values.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write all that was found to this file.")]
Results = Annotated[
    Path | None,
    typer.Option(help="What was measured: a JSON list of objects with the fields of huggingface_hub's EvalResult."),
]
RepoId = Annotated[str, typer.Argument(help="Where on the Hub, as owner/name.")]
BaseName = Annotated[str | None, typer.Option("--base-model", help="The Hub's name of the model that was trained.")]


@app.command()
def report(
    folder: Folder,
    base: Base = None,
    data: Annotated[
        Path | None, typer.Option(help="A CSV file with a column `text`, and for a classifier `label`.")
    ] = None,
    dense: Annotated[Path | None, typer.Option(help="The dense model, to compare predictions with.")] = None,
    country: Annotated[str, typer.Option(help="Where the electricity comes from, for the CO2.")] = "USA",
    figures: Annotated[Path | None, typer.Option(help="Write figures into this folder.")] = None,
    json_file: Json = None,
) -> None:
    """What each layer's sparsity is and costs; with data, what the model does.

    Example: `peft-pst report outputs/small --data test.csv --dense outputs/dense --figures outputs/figures`
    """
    from . import plot_depth, plot_flips, plot_masks, plot_scores, plot_sparsity, tensor_sparsity
    from . import report as make_report
    from .opening import open_model

    if dense is not None and data is None:
        raise ValueError("--dense needs --data too: predictions are compared on texts.")
    tokenizer = None if data is None else _tokenizer_of(folder, base)
    if data is not None and tokenizer is None:
        raise ValueError(f"{str(folder)!r} has no tokenizer for the texts of --data: save the model's beside it.")
    model = open_model(folder, base)
    texts, labels = (None, None) if data is None else _read(data, model.config.label2id)
    dense_model = None if dense is None else open_model(dense)
    found = make_report(model, texts=texts, labels=labels, tokenizer=tokenizer, dense=dense_model, country=country)
    _show(found.table())
    _write_json(json_file, found.to_dict())
    if figures is not None:
        plot_sparsity(tensor_sparsity(model), figures / "sparsity.png")
        plot_depth(tensor_sparsity(model), figures / "depth.png")
        plot_masks(model, figures / "masks.png")
        if (folder / "adapter_config.json").is_file() and model.active_peft_config.importance == "pst":
            plot_scores(model, figures / "scores.png")
        history = _log_history(folder)
        if any("flip_rate" in entry for entry in history):
            plot_flips(history, figures / "flips.png")
        _say(f"Figures are in {figures}/")


@app.command()
def merge(
    adapter: Folder, output: Output, base: Base = None, format: Format = "auto", values: Values = "exact"
) -> None:
    """Merge an adapter into its base model and save what comes out.

    Example: `peft-pst merge outputs/adapter outputs/small`
    """
    from .opening import open_model

    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{str(adapter)!r} holds no adapter. A model that is merged is saved again by peft-pst save.")
    model = open_model(adapter, base)
    _save(model.merge_and_unload(safe_merge=True), output, format, values, _tokenizer_of(adapter, base))


@app.command()
def save(folder: Folder, output: Output, format: Format = "auto", values: Values = "exact") -> None:
    """Save a model again: a dense one with zeros in fewer bytes, or a sparse one dense.

    Example: `peft-pst save outputs/merged outputs/small --values int8`
    """
    from .opening import open_model

    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds an adapter: merge it with peft-pst merge.")
    _save(open_model(folder), output, format, values, _tokenizer(folder))


@app.command()
def verify(
    folder: Folder, against: Annotated[Path | None, typer.Option(help="A folder that must hold the same.")] = None
) -> None:
    """Check every tensor of a sparse checkpoint; with --against also that it is the same as another.

    Example: `peft-pst verify outputs/small --against outputs/merged`
    """
    from . import format_table
    from .sparse.verify import verify as find_problems

    found = find_problems(folder, against)
    wrong = [(name, "; ".join(problems)) for name, problems in found.items() if problems]
    if wrong:
        _show(format_table(("tensor", "problem"), wrong))
        raise typer.Exit(1)
    _say(f"All {len(found)} tensors are right" + ("." if against is None else f", and the same as in {against}."))


@app.command()
def push(
    folder: Folder,
    repo_id: RepoId,
    adapter: Annotated[Path | None, typer.Option(help="An adapter to put beside a merged model.")] = None,
    base_model: BaseName = None,
    results: Results = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repo public.")] = False,
) -> None:
    """Put a model or an adapter on the Hub, with its card, in one commit.

    Example: `peft-pst push outputs/small me/my-sparse-model --adapter outputs/adapter`
    """
    from .integrations import push_to_hub

    commit = push_to_hub(
        folder,
        repo_id,
        adapter=adapter,
        base_model=base_model,
        results=_results(results),
        private=not public,
    )
    _say(str(commit))


@app.command()
def card(
    folder: Folder,
    repo_id: RepoId,
    base: Base = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter that goes beside a merged model.")] = None,
    base_model: BaseName = None,
    results: Results = None,
) -> None:
    """Write the card of a model or an adapter, README.md, into its folder.

    Example: `peft-pst card outputs/small me/my-sparse-model --base-model google-bert/bert-base-uncased`
    """
    from .integrations import model_card
    from .opening import open_model

    made = model_card(
        open_model(folder, base), folder, repo_id, adapter=adapter, base_model=base_model, results=_results(results)
    )
    made.save(folder / "README.md")
    _say(f"The card is {folder / 'README.md'}")


@app.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Argument(help="Where to: a new folder.")],
    task: Annotated[str | None, typer.Option(help="What it is for, in optimum's words; otherwise found out.")] = None,
    base: Base = None,
    shrink: Annotated[bool, typer.Option("--shrink", help="Remove what is zero as a whole before.")] = False,
    sparse: Annotated[bool, typer.Option(help="Leave zeros out of the file where that is smaller.")] = True,
    quantize: Annotated[Literal["int8"] | None, typer.Option(help="Quantize the weights.")] = None,
    tolerance: Annotated[float, typer.Option(help="How far an output may be from PyTorch's.")] = 1e-4,
) -> None:
    """Export a model, or an adapter merged into its base model, to ONNX, and compare it with PyTorch.

    Example: `peft-pst export outputs/small outputs/onnx`
    """
    from .integrations.onnx import export as export_to_onnx

    export_to_onnx(
        folder, output, task, base=base, shrink=shrink, sparse=sparse, quantize=quantize, tolerance=tolerance
    )


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder with config.json, or the model's name on the Hub.")],
    sparsity: Annotated[float, typer.Option(help="Share of the target weights that PST prunes.")] = 0.9,
    batch_size: Annotated[int, typer.Option(help="Sequences a device and step.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What trains.")] = "cuda",
    devices: Annotated[int, typer.Option(help="How many of them.")] = 1,
    sharding: Annotated[
        Literal["none", "zero-1", "zero-2", "zero-3", "fsdp"], typer.Option(help="What the devices share.")
    ] = "none",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute each block again in backward.")
    ] = False,
    json_file: Json = None,
) -> None:
    """What training a model will need, by PST, LoRA and in full: from its config alone, without its weights.

    Example: `peft-pst plan outputs/merged --batch-size 16 --tokens 64 --device cpu`
    """
    from . import PSTConfig, format_table
    from .plan import plan as make_plan
    from .plan import plan_rows

    found = make_plan(
        AutoConfig.from_pretrained(model),
        PSTConfig(sparsity=sparsity),
        batch_size=batch_size,
        tokens=tokens,
        dtype=dtype,
        device=device,
        devices=devices,
        sharding=sharding,
        gradient_checkpointing=gradient_checkpointing,
    )
    _show(format_table(*plan_rows(found)))
    _write_json(json_file, found.to_dict())


@app.command()
def bench(
    folder: Folder,
    shapes: Annotated[str, typer.Option(help="Batches, sequences x tokens.")] = "1x128,8x128,1x32",
    threads: Annotated[int | None, typer.Option(help="How many torch computes with.")] = None,
    repeats: Annotated[int, typer.Option(help="How many rounds count.")] = 20,
    runtimes: Annotated[
        str | None,
        typer.Option(help="Measure it in these too, in fp32 and int8: onnx, openvino, or both with a comma."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A CSV file with the columns `text` and `label`: a classifier's accuracy is measured on it."
        ),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
    json_file: Json = None,
) -> None:
    """How fast a whole model is, dense and sparse side by side, and what it takes in memory and on disk.

    Example: `peft-pst bench outputs/small --threads 2 --runtimes onnx --data test.csv --figure outputs/bench.png`
    """
    from .bench import bench as measure
    from .bench import plot_bench
    from .bench.benchmark import parse_shapes
    from .integrations.runtimes import RUNTIMES, parse_runtimes

    batches, names = parse_shapes(shapes), parse_runtimes(runtimes)
    texts, labels = (None, None) if data is None else _read(data, AutoConfig.from_pretrained(folder).label2id)
    if data is not None and labels is None:
        raise ValueError(f"{str(data)!r} has no column `label`: expected the class of each text, for the accuracy.")
    with tempfile.TemporaryDirectory() as work:
        others = {}
        for name in names:
            others |= RUNTIMES[name](folder, Path(work), threads or torch.get_num_threads(), texts)
        found = measure(
            folder, shapes=batches, threads=threads, repeats=repeats, others=others, texts=texts, labels=labels
        )
    _show(found.table())
    _write_json(json_file, found.to_dict())
    if figure is not None:
        plot_bench(found, figure)
        _say(f"The figure is {figure}")


def main() -> None:
    """Run the command. What a user can mend is said in one line; anything else is a traceback."""
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="The model's sparse weights stay compressed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)


def _save(model: Any, output: Path, format: str, values: str, tokenizer: Any) -> None:
    from . import save_pretrained

    save_pretrained(model, output, format, values=values, tokenizer=tokenizer)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    _say(f"{output}: {size / 1e6:,.1f} MB")


def _tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model, None if it has none."""
    return AutoTokenizer.from_pretrained(source) if get_tokenizer_config(source) else None


def _tokenizer_of(folder: Path, base: str | None) -> Any:
    """The tokenizer of a model, or of an adapter, which may have that of its base model; None if there is none."""
    if not (folder / "adapter_config.json").is_file():
        return _tokenizer(folder)
    base = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    return _tokenizer(folder) or (_tokenizer(base) if base else None)


def _read(file: Path, label2id: dict[str, int]) -> tuple[list[str], list[int] | None]:
    """Texts and labels of a CSV file: a label is a name that the model knows, or its number. What
    looks like numbers is names if all of it is."""
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or "text" not in rows[0]:
        raise ValueError(
            f"{str(file)!r} has no column `text`: expected a CSV file with a header and at least one row."
        )
    if "label" not in rows[0]:
        return [row["text"] for row in rows], None
    found = {row["label"] for row in rows}
    known = label2id if found <= label2id.keys() else {**label2id, **{str(id): id for id in label2id.values()}}
    if unknown := found - known.keys():
        raise ValueError(
            f"{str(file)!r} has the labels {sorted(unknown)}, but the model knows {sorted(label2id)}, or by number "
            f"{sorted(label2id.values())}."
        )
    return [row["text"] for row in rows], [known[row["label"]] for row in rows]


def _log_history(folder: Path) -> list[dict[str, Any]]:
    """What the Trainer logged up to a checkpoint; nothing where the folder is none."""
    state = folder / "trainer_state.json"
    return json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []


def _results(file: Path | None) -> list:
    from huggingface_hub import EvalResult

    return [] if file is None else [EvalResult(**fields) for fields in json.loads(file.read_text(encoding="utf-8"))]


def _show(table: str) -> None:
    """A table: drawn on a terminal, as Markdown into a file."""
    console = Console()
    if console.is_terminal:
        console.print(Markdown(table))
    else:
        print(table)


def _say(line: str) -> None:
    print(line)


def _write_json(file: Path | None, content: Any) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
