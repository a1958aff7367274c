import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)

from peft_pst import Distillation, DistillationConfig, PSTConfig
from peft_pst.distillation import kl_divergence, last_hidden_state_loss, square_head

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def llama(seed=0, **kwargs):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, **{**SIZES, **kwargs}))


def student(base, seed=1, **kwargs):
    """With factors that are not at their start, so that it computes something else than its base."""
    torch.manual_seed(seed)
    model = get_peft_model(base, PSTConfig(sparsity=0.8, initial_sparsity=0.8, **kwargs))
    for name, parameter in model.named_parameters():
        if "pst_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def batch(*lengths, labels=True):
    """Right padded token ids, the mask, and the tokens as labels."""
    ids = torch.arange(7, 7 + len(lengths) * max(lengths)).view(len(lengths), -1) * 13 % 99
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    found = {"input_ids": ids, "attention_mask": mask.long()}
    return {**found, "labels": ids.masked_fill(~mask, -100)} if labels else found


def test_kl_of_softened_predictions():
    own, expected = torch.randn(5, 11), torch.randn(5, 11)
    p, q = ((logits.double() / 3).softmax(-1) for logits in (expected, own))
    written_out = 9 * (p * (p.log() - q.log())).sum() / 5
    assert float(kl_divergence(own, expected, 3.0)) == pytest.approx(float(written_out), rel=1e-5)
    assert float(kl_divergence(own, own, 2.0)) == pytest.approx(0, abs=1e-6)
    assert kl_divergence(own.bfloat16(), expected.bfloat16(), 3.0).dtype == torch.float32


def test_the_loss_of_ast_by_hand():
    """(1 - a) CE + a T² KL of each predicted token with a = 2/3 and T = 2, the mean over tokens."""
    dense, inputs = llama().eval()(**batch(5, 3, labels=False)).logits.detach().double(), batch(5, 3)
    model = get_peft_model(llama(), PSTConfig.ast())
    model.base_model.set_sparsity(0.5)
    nn.init.normal_(model.base_model.model.model.layers[0].mlp.up_proj.pst_D["default"], std=0.02)
    distillation = Distillation(model, DistillationConfig(task=1 / 3, logits=2 / 3))
    taught, output = distillation.teach(inputs), model(**inputs)
    mine = distillation.total(output.loss, distillation.losses(inputs, output, taught))
    own, tokens = output.logits.detach().double(), []
    for text, (length, labels) in enumerate(zip((5, 3), inputs["labels"].tolist(), strict=True)):
        for i in range(length - 1):
            p, q = ((logits[text, i] / 2).softmax(-1) for logits in (dense, own))
            tokens.append(-own[text, i].log_softmax(-1)[labels[i + 1]] / 3 + 2 / 3 * 4 * (p * (p / q).log()).sum())
    assert len(tokens) == 6 and float(mine.detach()) == pytest.approx(float(sum(tokens) / 6), rel=1e-5)


def test_hidden_states_by_hand():
    own, expected = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens = [(0, 0), (0, 1), (1, 0)]
    half = sum(0.5 * sum((own[t][c] - expected[t][c]).double() ** 2 for c in range(4)) for t in tokens) / 3
    assert float(last_hidden_state_loss(own, expected, mask)) == pytest.approx(float(half), rel=1e-6)
    relative = [
        sum(((s[t] - e[t]).double() ** 2).sum() for t in tokens) / sum((e[t].double() ** 2).sum() for t in tokens)
        for s, e in ((own, expected), (2 * own, expected))
    ]
    found = square_head([own, 2 * own], [expected, expected], mask)
    assert float(found) == pytest.approx(float(sum(relative) / 2), rel=1e-6)
    assert float(square_head([own], [expected])) != pytest.approx(float(square_head([own], [expected], mask)))


def test_the_free_teacher_is_the_base_model():
    base = llama(attention_dropout=0.5)
    expected = copy.deepcopy(base).eval()(**batch(5, 3, labels=False), output_hidden_states=True)
    model = student(base)
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    taught = Distillation(model, DistillationConfig(hidden_states=1)).teach(batch(5, 3))
    assert torch.equal(taught.logits, expected.logits) and not taught.logits.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(taught.hidden_states, expected.hidden_states, strict=True))
    assert [module.training for module in model.modules()] == modes  # and the adapter is back:
    assert not torch.allclose(model(**batch(5, 3)).logits, expected.logits, atol=1e-3)


def test_an_adapter_as_teacher_shares_the_frozen_weights(tmp_path):
    lora = get_peft_model(
        llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, modules_to_save=["lm_head"])
    )
    nn.init.normal_(lora.base_model.model.lm_head.modules_to_save["default"].weight, std=0.1)
    lora.save_pretrained(tmp_path)
    expected = lora.eval()(**batch(5, 3, labels=False)).logits
    model = student(llama(), modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    distillation = Distillation(model, DistillationConfig(teacher=tmp_path))
    torch.testing.assert_close(distillation.teach(batch(5, 3)).logits, expected)
    own = {tensor.data_ptr() for tensor in model.parameters()}
    extra = [name for name, tensor in distillation._teacher.named_parameters() if tensor.data_ptr() not in own]
    assert extra and all("lora_" in name or "lm_head" in name for name in extra)
    assert head.requires_grad and any("pst_" in name and p.requires_grad for name, p in model.named_parameters())
    model(**batch(5, 3)).loss.backward()
    assert head.grad is not None


def test_a_model_as_teacher():
    teacher, model = llama(seed=5), student(llama())
    taught = Distillation(model, DistillationConfig(teacher=teacher)).teach(batch(4))
    assert torch.equal(taught.logits, teacher(**batch(4, labels=False)).logits) and not teacher.training


def test_padding_counts_nowhere():
    model = student(llama())
    config = DistillationConfig(logits=1, last_hidden_state=1, hidden_states=1)
    distillation = Distillation(model, config)

    def losses(inputs):
        taught = distillation.teach(inputs)
        return distillation.losses(inputs, model(**distillation.request(inputs)), taught)

    inputs = batch(6, 3)
    alone = [{name: tensor[i : i + 1, :length] for name, tensor in inputs.items()} for i, length in ((0, 6), (1, 3))]
    first, second = (losses(one) for one in alone)
    found = losses(inputs)
    # 5 and 2 tokens have a next one; hidden states are of 6 and 3
    assert float(found["logits"]) == pytest.approx(float(5 * first["logits"] + 2 * second["logits"]) / 7, rel=1e-3)
    name = "last_hidden_state"
    assert float(found[name]) == pytest.approx(float(6 * first[name] + 3 * second[name]) / 9, rel=1e-5)
    unlabelled = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    assert {name: float(loss) for name, loss in losses(unlabelled).items()} == pytest.approx(
        {name: float(loss) for name, loss in found.items()}, rel=1e-3
    )


def test_labels_say_which_predictions_count():
    model, inputs = student(llama()), batch(6, 6)
    inputs["labels"][:, :4] = -100  # a prompt: the predictions after tokens 3 and 4 count
    distillation = Distillation(model, DistillationConfig(temperature=1.0))
    output, taught = model(**inputs), distillation.teach(inputs)
    own, expected = (x.logits[:, 3:5].reshape(-1, 99).log_softmax(-1) for x in (output, taught))
    written_out = (expected.exp() * (expected - own)).sum() / 4
    assert float(distillation.losses(inputs, output, taught)["logits"]) == pytest.approx(float(written_out), rel=1e-5)


def test_an_encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0)
    model = student(AutoModelForSeq2SeqLM.from_config(config))
    inputs = {**batch(5, 3, labels=False), "labels": torch.tensor([[4, 5, 6], [7, -100, -100]])}
    distillation = Distillation(model, DistillationConfig(last_hidden_state=1))
    output, taught = model(**distillation.request(inputs)), distillation.teach(inputs)
    found, keep = distillation.losses(inputs, output, taught), inputs["labels"] != -100
    assert float(found["logits"]) == pytest.approx(
        float(kl_divergence(output.logits[keep], taught.logits[keep], 2.0)), rel=1e-6
    )
    states = (x.decoder_hidden_states[-1] for x in (output, taught))
    assert float(found["last_hidden_state"]) == pytest.approx(float(last_hidden_state_loss(*states, keep)), rel=1e-6)


def test_a_classifier(bert, tokens):
    model = student(bert(), task_type="SEQ_CLS")
    with pytest.warns(UserWarning, match="the frozen base model has them untrained"):
        distillation = Distillation(model, DistillationConfig())
    inputs = {"input_ids": tokens, "labels": torch.tensor([0, 1])}
    output, taught = model(**inputs), distillation.teach(inputs)
    found = distillation.losses(inputs, output, taught)["logits"]
    assert float(found) == pytest.approx(float(kl_divergence(output.logits, taught.logits, 2.0)), rel=1e-6)


def test_what_is_distilled_moves_the_student():
    model, inputs = student(llama()), batch(6, 6)
    distillation = Distillation(model, DistillationConfig(task=0.5, logits=2, last_hidden_state=0.1, hidden_states=3))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for _ in range(20):
        output = model(**distillation.request(inputs))
        losses = distillation.losses(inputs, output, distillation.teach(inputs))
        total = distillation.total(output.loss, losses)
        by_hand = 0.5 * output.loss + 2 * losses["logits"] + 0.1 * losses["last_hidden_state"]
        torch.testing.assert_close(total, by_hand + 3 * losses["hidden_states"])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen.append(sum(float(loss.detach()) for loss in losses.values()))
    assert seen[-1] < 0.8 * seen[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": -1}, "logits=-1: expected the weight of a loss"),
        ({"logits": 0}, "are all 0, so that the teacher teaches nothing"),
        ({"temperature": 0}, "temperature=0: expected more than 0"),
    ],
)
def test_refused_configs(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**arguments)


def test_refused_teachers():
    with pytest.raises(ValueError, match="the model is a LlamaForCausalLM without one: give a model as the teacher"):
        Distillation(llama(), DistillationConfig())
    inputs, model = batch(4), student(llama())
    for teacher, message in (
        (llama(num_hidden_layers=3), "The student has 3 hidden states, the teacher 4"),
        (llama(hidden_size=64), r"the shape \(1, 4, 32\), the teacher's \(1, 4, 64\)"),
    ):
        distillation = Distillation(model, DistillationConfig(teacher=teacher, logits=0, hidden_states=1))
        with pytest.raises(ValueError, match=message):
            distillation.losses(inputs, model(**distillation.request(inputs)), distillation.teach(inputs))
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=120, **SIZES))
    distillation = Distillation(model, DistillationConfig(teacher=teacher))
    with pytest.raises(ValueError, match="expected a teacher with the same vocabulary or classes"):
        distillation.losses(inputs, model(**inputs), distillation.teach(inputs))


def pair_of(cls, bert, **kwargs):
    """A student and a dense teacher of a class with a head of its own."""
    config = bert(initializer_range=0.2, **kwargs).config
    return student(cls(config)).eval(), cls(copy.deepcopy(config)).eval()


def logits_loss(model, teacher, inputs, temperature=3.0):
    distillation = Distillation(model, DistillationConfig(teacher, temperature=temperature))
    output, taught = model(**inputs), teacher(**inputs)
    return output, taught, distillation.losses(inputs, output, distillation.teach(inputs))["logits"]


def test_a_regression(bert, tokens):
    model, teacher = pair_of(BertForSequenceClassification, bert, num_labels=1)
    inputs = {"input_ids": tokens, "labels": torch.rand(2)}
    output, taught, loss = logits_loss(model, teacher, inputs)
    difference = (output.logits - taught.logits).double().flatten().tolist()
    assert (
        float(loss.detach()) == pytest.approx(sum(d * d for d in difference) / len(difference), rel=1e-5) and loss > 0
    )


def test_labels_that_do_not_exclude_each_other(bert, tokens):
    """T² KL of two outcomes for each label, the mean over texts and labels."""
    model, teacher = pair_of(BertForSequenceClassification, bert, num_labels=3)
    inputs = {"input_ids": tokens, "labels": torch.rand(2, 3).round()}
    output, taught, loss = logits_loss(model, teacher, inputs)
    assert model.config.problem_type == "multi_label_classification"
    p, q = ((o.logits.double() / 3).sigmoid() for o in (taught, output))
    written_out = 9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert float(loss.detach()) == pytest.approx(float(written_out.detach()), rel=1e-4) and loss > 0


def test_question_answering(bert, tokens):
    """Where the answer starts and where it ends weigh alike, as in the task's loss."""
    model, teacher = pair_of(BertForQuestionAnswering, bert)
    output, taught, loss = logits_loss(model, teacher, {"input_ids": tokens})
    written_out = 0
    for name in ("start_logits", "end_logits"):
        p, q = ((o[name].double() / 3).softmax(-1) for o in (taught, output))
        written_out += 9 * (p * (p / q).log()).sum() / len(p) / 2
    assert float(loss.detach()) == pytest.approx(float(written_out.detach()), rel=1e-4) and loss > 0


def test_a_batch_without_a_label_has_losses_of_0():
    model, inputs = student(llama()), batch(5, 3)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    config = DistillationConfig(llama(seed=5), last_hidden_state=1, hidden_states=1)
    distillation = Distillation(model, config)
    output = model(**distillation.request(inputs))
    losses = distillation.losses(inputs, output, distillation.teach(inputs))
    sum(losses.values()).backward()
    assert [float(loss) for loss in losses.values()] == [0, 0, 0]


def test_a_model_without_a_head_has_no_logits_to_distil():
    base = LlamaForCausalLM(LlamaConfig(vocab_size=99, **SIZES)).model
    model, inputs = student(base), batch(4, labels=False)
    distillation = Distillation(model, DistillationConfig())
    with pytest.raises(ValueError, match="LlamaModel has no head, and so no logits to distil"):
        distillation.losses(inputs, model(**inputs), distillation.teach(inputs))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_free_teacher_takes_no_memory():
    """The peak of a training with it, against that of one without, each in a process of its own."""

    def peak(teacher):
        command = [sys.executable, Path(__file__).with_name("distill_and_measure.py"), teacher]
        # large tensors each get memory of their own, so that nothing depends on what lay where before
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return json.loads(run.stdout)

    plain = peak("none")
    assert peak("free") <= 1.1 * plain
    assert peak("copy") > 1.2 * plain  # so that the measurement would show a second copy
