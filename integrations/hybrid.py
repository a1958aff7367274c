"""Hybrid data: labelled data of two languages in one training, and each language reported apart (LightChatGLM).

data = mix_languages(to_english, to_chinese, ("en", "zh"))
HybridTrainer(teacher, arguments, train_dataset=data, ...).train()
taught = DistillationConfig.hybrid(teacher)
HybridTrainer(student, arguments, train_dataset=data, distillation=taught, ...).train()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_pst.labels import IGNORED, predicts_next
from peft_pst.report.tables import format_table

from .distilling import DistillingTrainer
from .trainer import PSTTrainer, check_no_penalty

if TYPE_CHECKING:
    from datasets import Dataset

LANGUAGE = "language"
"""The column that says which language a row is of: 0 for the source, 1 for the target."""


def source_share(w_s: float, n_s: int, w_d: float, n_d: int) -> float:
    """alpha = w_s·n_s / (w_s·n_s + w_d·n_d)  (LightChatGLM).

    Args:
        w_s, w_d: what a label of the source language counts, and one of the target language.
        n_s, n_d: how many labels there are of each; the counts of rows, where a row has one.

    Raises:
        ValueError: if a weight or a count is not positive.
    """
    for name, value in {"w_s": w_s, "n_s": n_s, "w_d": w_d, "n_d": n_d}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value}: expected a weight or a number of labels, above 0.")
    return w_s * n_s / (w_s * n_s + w_d * n_d)


def mix_languages(source: Dataset, target: Dataset, names: tuple[str, str], seed: int = 0) -> Dataset:
    """The rows of both in random order, with the column `language`, a `ClassLabel` of the two names.

    It needs datasets, which peft-pst[demo] installs.

    Args:
        source, target: tokenized data with the same columns.
        names: those of the languages, source first.

    Raises:
        ValueError: if a dataset is empty, the columns differ or the names are equal.
    """
    from datasets import ClassLabel, concatenate_datasets

    if names[0] == names[1]:
        raise ValueError(f"names={tuple(names)}: expected two languages.")
    if not len(source) or not len(target):
        raise ValueError(f"{len(source)} rows of {names[0]!r}, {len(target)} of {names[1]!r}: expected some of both.")
    if set(source.column_names) != set(target.column_names):
        raise ValueError(
            f"The columns of {names[0]!r} are {sorted(source.column_names)}, those of {names[1]!r} "
            f"{sorted(target.column_names)}: expected the same."
        )
    feature = ClassLabel(names=list(names))
    parts = [
        part.add_column(LANGUAGE, [index] * len(part)).cast_column(LANGUAGE, feature)
        for index, part in enumerate((source, target))
    ]
    return concatenate_datasets(parts).shuffle(seed=seed)


def count_labels(data: Dataset, model: nn.Module) -> tuple[int, int]:
    """How many labels of each language a training of the model on the data learns from in an epoch.

    Raises:
        ValueError: if the data has no column `language` or no labels, or a language has no label.
    """
    if not hasattr(data, "column_names") or not hasattr(data, "__len__"):
        raise ValueError(
            f"The data is a {type(data).__name__}: expected a datasets.Dataset, as mix_languages returns, since its "
            "labels are counted before the training."
        )
    column = next((name for name in ("labels", "label") if name in data.column_names), None)
    if LANGUAGE not in data.column_names or column is None:
        raise ValueError(
            f"The columns of the data are {data.column_names}: expected `{LANGUAGE}`, which mix_languages adds, and "
            "`labels`."
        )
    first = 1 if predicts_next(model) else 0
    counts = [0, 0]
    for batch in data.select_columns([LANGUAGE, column]).with_format(None).iter(1000):
        for language, labels in zip(batch[LANGUAGE], batch[column], strict=True):
            counts[language] += sum(label != IGNORED for label in labels[first:]) if isinstance(labels, list) else 1
    if not all(counts):
        names = data.features[LANGUAGE].names
        raise ValueError(f"{counts[0]} labels of {names[0]!r}, {counts[1]} of {names[1]!r}: expected some of both.")
    return counts[0], counts[1]


def label_losses(model: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each label that counts, in fp32, whether the prediction was right, and the row that it is in.

    Args:
        logits: [rows, classes] or [rows, tokens, classes]. Those of a causal language model are about the next token.
        labels: int64 [rows] or [rows, tokens].

    Returns:
        Three vectors of as many entries as labels count: fp32, bool, int64.
    """
    if predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORED
    logits, labels, rows = logits[keep].float(), labels[keep], keep.nonzero()[:, 0]
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels, rows


def _ignore_first(
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]], rows: list[dict[str, Any]]
) -> dict[str, Tensor]:
    """A batch without the first label of each row, which nothing predicts: transformers 4 would count it."""
    batch = collator(rows)
    batch["labels"][:, 0] = IGNORED
    return batch


class HybridTrainer(DistillingTrainer):
    """A Trainer for the mixed data of two languages:

        loss = alpha · (mean loss of the source labels) + (1 - alpha) · (mean loss of the target labels).

    A label's loss is weighed by alpha·N/N_s, or (1 - alpha)·N/N_d, with the numbers of labels in the training data,
    and of the weighed losses it is the mean: over the whole data that is the formula itself, however it is cut into
    batches and processes.

    With `distillation=DistillationConfig.hybrid(teacher)` this is the task's part of a student's loss. The soft labels
    are not weighed by language: a teacher that was tuned with alpha has it in what it says.

    Each evaluation reports the languages apart, see `LanguageCallback`; its `eval_loss` is the plain mean. An
    encoder-decoder needs the `decoder_input_ids` of `DataCollatorForSeq2Seq(model=model)`.

    Args:
        *args, **kwargs: those of `DistillingTrainer`. Datasets are those of `mix_languages`.
        alpha (`float`): the share of the source language, such as `source_share` gives.

    Raises:
        ValueError: if alpha is not between 0 and 1, the training data has no labels of both languages, or another loss
            is asked for.
    """

    def __init__(self, *args: Any, alpha: float = 0.65, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha}: expected the share of the source language, between 0 and 1.")
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ValueError("HybridTrainer has a loss of its own: leave out compute_loss_func and label smoothing.")
        if predicts_next(self.model):
            self.data_collator = partial(_ignore_first, self.data_collator)
        self._weights = None
        if self.train_dataset is not None:
            n_s, n_d = count_labels(self.train_dataset, self.model)
            self._weights = torch.tensor([alpha / n_s, (1 - alpha) / n_d]) * (n_s + n_d)
        self.compute_loss_func = self._task_loss
        self.add_callback(LanguageCallback())

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if LANGUAGE not in self._signature_columns:
            self._signature_columns.append(LANGUAGE)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the model; the languages of their rows are for `_task_loss`."""
        prepared = super()._prepare_inputs(inputs)
        self._languages = prepared.pop(LANGUAGE, None)
        return prepared

    def _task_loss(self, outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
        losses, _, rows = label_losses(self.model, outputs["logits"], labels)
        if self.model.training:
            losses = losses * self._weights.to(losses.device)[self._languages[rows]]
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)


class HybridPSTTrainer(HybridTrainer, PSTTrainer):
    """A `PSTTrainer` for the mixed data of two languages.

    Raises:
        ValueError: as `HybridTrainer` and `PSTTrainer` do, or if the adapter has a penalty.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_no_penalty(self.model, "HybridTrainer's loss")


class LanguageCallback(TrainerCallback):
    """Reports each language apart: `eval_{language}_loss`, the mean over its labels, `eval_{language}_perplexity` and
    `eval_{language}_accuracy`, the share of the labels that are the likeliest prediction; in the metrics that
    `Trainer.evaluate` returns, in `log_history`, and as a table when the training ends.

    It reads the evaluation data a second time, in every process the whole. `HybridTrainer` brings it.
    """

    def __init__(self) -> None:
        self._last: dict[str, dict[str, float]] = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: nn.Module,
        eval_dataloader: DataLoader,
        **kwargs: Any,
    ) -> None:
        self._last = evaluate_languages(
            model, eval_dataloader.dataset, eval_dataloader.collate_fn, args.per_device_eval_batch_size
        )
        prefix = next(name for name in metrics if name.endswith("_runtime")).removesuffix("runtime")
        found = {
            f"{prefix}{language}_{name}": value for language, of in self._last.items() for name, value in of.items()
        }
        metrics.update(found)
        state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._last and state.is_world_process_zero:
            print(f"\n{language_table({'': self._last})}")


@torch.no_grad()
def evaluate_languages(
    model: nn.Module,
    data: Dataset,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int = 32,
) -> dict[str, dict[str, float]]:
    """Loss, perplexity and accuracy over the labels of each language, by its name.

    Args:
        model: it is evaluated as it computes, so under autocast where that is on.
        data: as `mix_languages` returns.
        collator: makes a batch of rows; it pads what needs to be.

    Raises:
        ValueError: if the data has no column `language` or no labels of a language.
    """
    count_labels(data, model)
    names = data.features[LANGUAGE].names
    sums = torch.zeros(len(names), 3, dtype=torch.float64)  # loss, right predictions, labels
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    loader = DataLoader(data, batch_size, collate_fn=collator)
    for batch in tqdm(loader, desc="languages", leave=False):
        languages, batch = batch[LANGUAGE], {name: value.to(device) for name, value in batch.items()}
        del batch[LANGUAGE]
        labels = batch.pop("labels")
        losses, right, rows = label_losses(model, model(**batch).logits, labels)
        of_labels = torch.stack([losses, right.float(), torch.ones_like(losses)], dim=1).double().cpu()
        sums.index_add_(0, languages[rows.cpu()], of_labels)
    model.train(was_training)
    found = {}
    for name, (loss, right, count) in zip(names, sums.tolist(), strict=True):
        perplexity = torch.tensor(loss / count).exp().item()  # inf of a model that has diverged
        found[name] = {"loss": loss / count, "perplexity": perplexity, "accuracy": right / count}
    return found


def language_table(stages: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What `evaluate_languages` found, one row for each stage, such as a model, and language."""
    rows = [
        (stage, language, f"{found['loss']:.3f}", f"{found['perplexity']:.2f}", f"{found['accuracy']:.2%}")
        for stage, languages in stages.items()
        for language, found in languages.items()
    ]
    return format_table(("", "language", "loss", "perplexity", "accuracy"), rows)
