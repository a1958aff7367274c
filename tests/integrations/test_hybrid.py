import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from peft_pst import DistillationConfig, PSTConfig
from peft_pst.integrations import PSTTrainer
from peft_pst.integrations.hybrid import (
    HybridPSTTrainer,
    HybridTrainer,
    count_labels,
    evaluate_languages,
    language_table,
    mix_languages,
    source_share,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES["initializer_range"] = 0.2  # so that predictions of different models differ
NAMES = ("en", "zh")
# of each row its tokens, and how many of the last ones have labels: 5 labels of English, 10 of Chinese; a first token
# has one too, but nothing predicts it
ROWS = {"en": [(6, 2), (4, 1), (5, 2)], "zh": [(7, 4), (3, 1), (6, 3), (4, 1), (5, 1)]}


def make_tokenizer():
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0}, "[PAD]")), pad_token="[PAD]"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, **SIZES))


def bert(seed=0):
    torch.manual_seed(seed)
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=99, num_labels=3, **sizes))


def rows_of(language, kind):
    """Rows for a causal language model, or for a classifier."""
    rows = []
    for i, (length, labelled) in enumerate(ROWS[language]):
        ids = [(7 * j + 11 * i + 31 * (language == "zh")) % 98 + 1 for j in range(length)]
        labels = [ids[0]] + [-100] * (length - labelled - 1) + ids[length - labelled :] if kind == "causal" else i % 3
        rows.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(rows)


def mixed(kind="causal", seed=0):
    return mix_languages(rows_of("en", kind), rows_of("zh", kind), NAMES, seed)


def logits_of_labels(model, kind, language):
    """One row at a time, in float64: of each label its logits, and the label."""
    model = model.double().eval()
    found = []
    for row in rows_of(language, kind):
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        if kind == "classifier":
            found.append((logits, row["labels"]))
        else:
            found += [(logits[i - 1], label) for i, label in enumerate(row["labels"]) if i > 0 and label != -100]
    return found


def formula(model, kind, alpha):
    """alpha · (mean over the source labels) + (1 - alpha) · (mean over the target labels), written out."""
    means = []
    for language in NAMES:
        losses = [-logits.log_softmax(-1)[label] for logits, label in logits_of_labels(model, kind, language)]
        means.append(sum(losses) / len(losses))
    return alpha * means[0] + (1 - alpha) * means[1]


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(tmp_path, tokenizer, model, kind="causal", trainer_class=HybridTrainer, alpha=0.65, choices=None, **kwargs):
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0,
        **kwargs,
    }
    collator = DataCollatorForSeq2Seq(tokenizer) if kind == "causal" else DataCollatorWithPadding(tokenizer)
    gradients = Gradients()
    trainer = trainer_class(
        model,
        TrainingArguments(str(tmp_path), **settings),
        train_dataset=mixed(kind),
        eval_dataset=mixed(kind, seed=1),
        data_collator=collator,
        alpha=alpha,
        callbacks=[gradients],
        **(choices or {}),
    )
    trainer.train()
    return trainer, gradients.found


def distance(found, expected):
    assert found.keys() == expected.keys()
    difference = sum(((found[name] - expected[name]) ** 2).sum() for name in expected)
    return float((difference / sum((grad**2).sum() for grad in expected.values())).sqrt())


def test_alpha_by_hand():
    assert source_share(w_s=2.0, n_s=300, w_d=0.5, n_d=700) == pytest.approx(600 / 950)
    assert source_share(1, 13, 1, 7) == 0.65
    with pytest.raises(ValueError, match="n_d=0: expected a weight or a number of labels"):
        source_share(1, 5, 1, 0)


def test_a_share_of_weights_weighs_each_label_by_its_own():
    """alpha·N/N_s : (1 - alpha)·N/N_d is w_s : w_d."""
    n_s, n_d = 5, 10
    alpha = source_share(3.0, n_s, 0.5, n_d)
    assert (alpha / n_s) / ((1 - alpha) / n_d) == pytest.approx(3.0 / 0.5)


def test_the_languages_are_mixed_at_random():
    data = mixed()
    assert data.features["language"].names == list(NAMES) and len(data) == 8
    assert sorted(data["input_ids"]) == sorted(
        [*rows_of("en", "causal")["input_ids"], *rows_of("zh", "causal")["input_ids"]]
    )
    english = [list(ids) for ids in rows_of("en", "causal")["input_ids"]]
    assert all((row["input_ids"] in english) == (row["language"] == 0) for row in data)
    orders = {tuple(mixed(seed=seed)["language"]) for seed in range(4)}
    assert len(orders) > 1 and data["input_ids"][:] == mixed(seed=0)["input_ids"][:]
    assert count_labels(data, llama()) == (5, 10) and count_labels(mixed("classifier"), bert()) == (3, 5)
    whole = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])  # nothing predicts the first
    assert count_labels(mix_languages(whole, whole, NAMES), llama()) == (2, 2)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("kind", "make"), [("causal", llama), ("classifier", bert)])
def test_gradients_are_those_of_the_formula(tmp_path, tokenizer, kind, make, accumulation):
    reference = make().double()
    loss = formula(reference, kind, 0.8)
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer, found = train(tmp_path, tokenizer, make(), kind, alpha=0.8, **batches)
    assert distance(found, expected) < 1e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_a_student_between_soft_labels_and_its_own_task(tmp_path, tokenizer, kind, accumulation):
    """lambda · KL(teacher || student), over all labels alike, + (1 - lambda) · the formula."""
    make = {"causal": llama, "classifier": bert}[kind]
    reference, teacher = make().double(), make(seed=5)
    task, soft = formula(reference, kind, 0.65), []
    for language in NAMES:
        own, expected = (logits_of_labels(model, kind, language) for model in (reference, make(seed=5)))
        for (student, _), (taught, _) in zip(own, expected, strict=True):
            p = taught.detach().softmax(-1)
            soft.append((p * (p.log() - student.log_softmax(-1))).sum())
    (0.3 * sum(soft) / len(soft) + 0.7 * task).backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    taught = {"distillation": DistillationConfig.hybrid(teacher, 0.3)}
    trainer, found = train(tmp_path, tokenizer, make(), kind, choices=taught, **batches)
    assert distance(found, expected) < 1e-5
    logged = trainer.state.log_history[0]
    assert logged["task_loss"] == pytest.approx(float(task.detach()), rel=1e-4)
    assert logged["logits_loss"] == pytest.approx(float(sum(soft).detach()) / len(soft), rel=1e-4)


def test_the_default_of_both_shares():
    teacher = nn.Linear(1, 1)
    config = DistillationConfig.hybrid(teacher, last_hidden_state=0.01)
    assert (config.task, config.logits, config.temperature) == (pytest.approx(0.35), 0.65, 1.0)
    assert config.teacher is teacher and config.last_hidden_state == 0.01
    with pytest.raises(ValueError, match="lambda_=0: expected the share of the soft labels"):
        DistillationConfig.hybrid(teacher, 0)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_each_language_is_reported_apart(tmp_path, tokenizer, kind, capsys):
    make = {"causal": llama, "classifier": bert}[kind]
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "per_device_eval_batch_size": 3}
    trainer, _ = train(tmp_path, tokenizer, make(), kind, **arguments)
    logged = next(row for row in trainer.state.log_history if "eval_loss" in row)
    returned, test = trainer.evaluate(), trainer.evaluate(mixed(kind), metric_key_prefix="test")
    every = []
    for language in NAMES:
        found = logits_of_labels(make(), kind, language)
        losses = [float(-logits.log_softmax(-1)[label]) for logits, label in found]
        right = [int(logits.argmax()) == label for logits, label in found]
        every += losses
        expected = {"loss": sum(losses) / len(losses), "accuracy": sum(right) / len(right)}
        expected["perplexity"] = float(torch.tensor(expected["loss"]).exp())
        for name, value in expected.items():
            assert logged[f"eval_{language}_{name}"] == pytest.approx(value, rel=1e-4)
            assert returned[f"eval_{language}_{name}"] == pytest.approx(value, rel=1e-4)
            assert test[f"test_{language}_{name}"] == pytest.approx(value, rel=1e-4)
    assert trainer.predict(mixed(kind)).metrics["test_loss"] > 0  # the model takes no `language`
    table = next(line for line in capsys.readouterr().out.splitlines() if "| zh " in line)
    assert f"{logged['eval_zh_loss']:.3f}" in table and f"{logged['eval_zh_accuracy']:.2%}" in table
    # batches of one size weigh alike in what Trainer calls the loss: one batch holds all
    assert trainer_loss(trainer, kind) == pytest.approx(sum(every) / len(every), rel=1e-4)


def trainer_loss(trainer, kind):
    trainer.args.per_device_eval_batch_size = 8
    return trainer.evaluate(mixed(kind))["eval_loss"]


def test_evaluating_leaves_the_mode_of_the_model(tokenizer):
    model = llama().train()
    found = evaluate_languages(model, mixed(), DataCollatorForSeq2Seq(tokenizer), batch_size=2)
    again = evaluate_languages(model, mixed(seed=3), DataCollatorForSeq2Seq(tokenizer), batch_size=8)
    assert model.training
    assert all(found[name] == pytest.approx(again[name], rel=1e-5) for name in NAMES)
    assert language_table({"now": found}).count("\n") == 3


def test_pst_on_the_mixed_languages(tmp_path, tokenizer):
    teacher = llama()
    model = get_peft_model(llama(), PSTConfig(task_type="CAUSAL_LM", sparsity=0.5, initial_sparsity=0.5))
    choices = {"distillation": DistillationConfig.hybrid(teacher), "learning_rates": {"lr": 3e-4}}
    trainer, gradients = train(tmp_path, tokenizer, model, "causal", HybridPSTTrainer, choices=choices)
    logged = trainer.state.log_history[0]
    assert logged["sparsity"] == pytest.approx(0.5, abs=1e-3) and {"task_loss", "logits_loss"} <= logged.keys()
    assert all("pst_" in name for name in gradients)


def arguments(tmp_path):
    return TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)


def test_refused_data():
    english, chinese = (rows_of(language, "causal") for language in NAMES)
    for choices, message in (
        ((english, chinese, ("en", "en")), "expected two languages"),
        ((english.select([]), chinese, NAMES), "0 rows of 'en', 5 of 'zh'"),
        (
            (english.remove_columns("labels"), chinese, NAMES),
            r"of 'en' are \['input_ids'\], those of 'zh' \['input_ids', ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mix_languages(*choices)
    for data, message in (
        (english, "expected `language`, which mix_languages adds"),
        (mixed().remove_columns("labels"), "and `labels`"),
        ([1, 2], "The data is a list: expected a datasets.Dataset"),
        (mixed().to_iterable_dataset(), "The data is a IterableDataset: expected a"),
        (mixed().filter(lambda row: row["language"]), "0 labels of 'en', 10 of 'zh'"),
    ):
        with pytest.raises(ValueError, match=message):
            count_labels(data, llama())


def test_refused_shares_and_losses(tmp_path):
    with pytest.raises(ValueError, match="alpha=65: expected the share of the source language, between 0 and 1"):
        HybridTrainer(llama(), arguments(tmp_path), train_dataset=mixed(), alpha=65)
    smooth = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, label_smoothing_factor=0.1)
    for settings, choices in ((smooth, {}), (arguments(tmp_path), {"compute_loss_func": lambda *_, **__: None})):
        with pytest.raises(ValueError, match="leave out compute_loss_func and label smoothing"):
            HybridTrainer(llama(), settings, train_dataset=mixed(), **choices)


def test_a_penalty_that_would_not_count_is_refused(tmp_path, tokenizer):
    model = get_peft_model(llama(), PSTConfig(importance="l0", update="full", penalty=3.0))
    with pytest.raises(ValueError, match="penalty=3.0, which is part of the loss .* HybridTrainer's loss"):
        train(tmp_path, tokenizer, model, trainer_class=HybridPSTTrainer)
    with pytest.raises(ValueError, match="penalty=3.0, .* compute_loss_func or label smoothing"):
        PSTTrainer(model, TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True))
    taught = DistillationConfig(llama(), task=0)
    with pytest.raises(ValueError, match=r"penalty=3.0, .* DistillationConfig\(task=0\)"):
        PSTTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), distillation=taught)
