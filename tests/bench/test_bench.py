import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from types import ModuleType

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from peft_pst import Bench, PSTConfig, SparseLinear, bench, cli, densify, plot_bench, save_pretrained
from peft_pst.bench import Latency, Measured, Runtime

pytestmark = pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")

# peft_pst.bench is the function, so that `import ... as` does not find what is in the package
benchmark, memory, timing, variants = (
    importlib.import_module(f"peft_pst.bench.{name}") for name in ("benchmark", "memory", "timing", "variants")
)
RESIDENT_BYTES = benchmark._resident_bytes
HAS_KERNELS = importlib.util.find_spec("peft_pst.sparse.acceleration") is not None
NAMES = ["dense fp32", "dense bf16", "sparse fp32"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses, and no new process for the memory: the real one takes seconds."""
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(benchmark, "_resident_bytes", lambda variant, shape, progress: len(variant.name))


@pytest.fixture(autouse=True)
def accelerated(monkeypatch):
    """The models that went through accelerate_sparse, which makes them dense here."""
    models = []

    def accelerate_sparse(model):
        assert model.dtype == torch.float32
        models.append(model)
        return densify(model).float()

    if not HAS_KERNELS:
        monkeypatch.setitem(sys.modules, "peft_pst.sparse.acceleration", ModuleType("acceleration"))
    module = importlib.import_module("peft_pst.sparse.acceleration")
    monkeypatch.setattr(module, "accelerate_sparse", accelerate_sparse, raising=HAS_KERNELS)
    monkeypatch.setattr(variants, "accelerate_sparse", accelerate_sparse, raising=False)
    return models


def pruned(model):
    method = PSTConfig(importance="magnitude", update="none", initial_sparsity=0.9, sparsity=0.9)
    return get_peft_model(model, method).merge_and_unload()


@pytest.fixture
def classifier(bert, tmp_path):
    save_pretrained(pruned(bert(max_position_embeddings=16)), tmp_path / "classifier")
    return tmp_path / "classifier"


def word_tokenizer(words):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def llama(tmp_path):
    def save(**choices):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
        config = LlamaConfig(vocab_size=99, eos_token_id=7, bos_token_id=1, **{**sizes, **choices})
        save_pretrained(pruned(LlamaForCausalLM(config)), tmp_path / "llama")
        return tmp_path / "llama"

    return save


def file_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_classifier(classifier, accelerated):
    found = bench(classifier, shapes=[(1, 8), (2, 16)], repeats=3)
    assert found.model == "BertForSequenceClassification" and found.repeats == 3
    assert found.threads == torch.get_num_threads() and found.versions["torch"] == torch.__version__
    assert [one.name for one in found.measured] == NAMES
    for one in found.measured:
        assert list(one.latency) == ["1x8", "2x16"] and one.tokens_per_second is None
        assert all(0 < latency.p50 <= latency.p95 for latency in one.latency.values())
        assert one.resident_bytes == len(one.name)
    assert len(accelerated) == 1


def test_what_the_times_become(llama, monkeypatch):
    monkeypatch.setattr(
        benchmark, "seconds", lambda models, inputs, repeats, progress: {name: [0.01, 0.03, 0.02] for name in models}
    )
    for one in bench(llama(), shapes=[(1, 8)], repeats=3).measured:
        assert one.latency["1x8"].p50 == pytest.approx(20) and one.latency["1x8"].p95 == pytest.approx(29)
        assert one.tokens_per_second == pytest.approx(64 / 0.02)


def test_the_sizes_are_those_of_the_files(classifier, bert, tmp_path):
    sparse = file_bytes(classifier)
    model = pruned(bert(max_position_embeddings=16))
    save_pretrained(model, tmp_path / "dense", "dense")
    parameters = sum(p.numel() for p in model.parameters())
    for folder in (classifier, tmp_path / "dense"):
        fp32, bf16, ours = (one.file_bytes for one in bench(folder, shapes=[(1, 8)], repeats=1).measured)
        assert fp32 == file_bytes(tmp_path / "dense") and 0 < fp32 - 4 * parameters < 10_000
        assert 0 < bf16 - 2 * parameters < 10_000
        assert ours == sparse < fp32


def test_what_each_variant_computes_with(classifier, tmp_path):
    work = tmp_path / "work"
    fp32, bf16, ours = (
        one.open() for one in variants.write_variants(variants.open_model(classifier), classifier, work)
    )
    assert {p.dtype for p in fp32.parameters()} == {p.dtype for p in ours.parameters()} == {torch.float32}
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}
    assert not any(isinstance(module, SparseLinear) for model in (fp32, bf16) for module in model.modules())
    assert not any(model.training for model in (fp32, bf16, ours))
    inputs = timing.random_tokens(99, 2, 8)
    with torch.inference_mode():
        expected = fp32(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits, expected)
        torch.testing.assert_close(bf16(**inputs).logits.float(), expected, atol=0.02, rtol=0)


def test_a_checkpoint_in_bf16_is_computed_in_fp32(bert, tmp_path, accelerated):
    save_pretrained(pruned(bert()).bfloat16(), tmp_path / "narrow")
    found = bench(tmp_path / "narrow", shapes=[(1, 8)], repeats=1)
    assert {p.dtype for p in accelerated[0].parameters()} == {torch.float32}
    assert found.measured[0].file_bytes > 1.8 * found.measured[1].file_bytes


def test_a_language_model_decodes(llama, monkeypatch):
    lengths = []
    generate = LlamaForCausalLM.generate

    def counted(self, *args, **kwargs):
        found = generate(self, *args, **kwargs)
        lengths.append(found.shape)
        return found

    monkeypatch.setattr(LlamaForCausalLM, "generate", counted)
    folder = llama()
    found = bench(folder, shapes=[(1, 8)], repeats=1)
    assert lengths == [(1, 96)] * 6  # a round before the one that counts
    assert all(one.tokens_per_second > 0 for one in found.measured)
    assert found.table().count("tokens/s") == 3


def test_a_token_that_ends_the_text_does_not_end_it():
    config = LlamaConfig(vocab_size=9, eos_token_id=0, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)  # so that the first of all tokens comes, unless it must not
    found = timing.decoding(model)(**timing.random_tokens(9, 1, 32))
    assert found.shape == (1, 96)


def test_rounds_take_turns():
    order = []

    def run(name, taken):
        return lambda x: (order.append((name, x, torch.is_inference_mode_enabled())), time.sleep(taken))

    with tqdm(total=8, disable=True) as progress:
        found = timing.seconds({"a": run("a", 0), "b": run("b", 0.01)}, {"x": 5}, 3, progress)
    assert order == [("a", 5, True), ("b", 5, True)] * 4
    assert [len(times) for times in found.values()] == [3, 3] and min(found["b"]) >= 0.01


def test_inputs_are_the_same_in_each_call():
    first, again = timing.random_tokens(1000, 4, 50), timing.random_tokens(1000, 4, 50)
    assert torch.equal(first["input_ids"], again["input_ids"]) and first["input_ids"].shape == (4, 50)
    assert 900 < first["input_ids"].max() < 1000 and first["input_ids"].unique().numel() > 100
    assert torch.equal(first["attention_mask"], torch.ones(4, 50, dtype=torch.int64))


def test_others_are_measured_beside(classifier):
    shapes = []
    mine = Runtime(lambda input_ids, attention_mask: shapes.append((*input_ids.shape, *attention_mask.shape)), 3000)
    found = bench(classifier, shapes=[(1, 8), (3, 4)], repeats=2, others={"mine": mine})
    assert shapes == [(1, 8, 1, 8)] * 3 + [(3, 4, 3, 4)] * 3
    assert [one.name for one in found.measured] == [*NAMES, "mine"] and found.measured[-1].file_bytes == 3000
    line = cells(next(line for line in found.table().splitlines() if line.startswith("| mine")))
    assert line[-2] == "" and line[-1].startswith("0.0 MB")


def test_another_runtime_decodes_too(llama):
    folder = llama()
    other = Runtime(lambda **inputs: None, generator=variants.open_model(folder))
    found = bench(
        folder, shapes=[(1, 8)], repeats=1, others={"mine": other, "no decoder": Runtime(lambda **inputs: None)}
    )
    assert found.measured[3].tokens_per_second > 0 and found.measured[4].tokens_per_second is None


@pytest.fixture
def labelled(classifier):
    """The folder with a tokenizer, texts of several lengths, and the classes that the dense model in float64 finds."""
    tokenizer = word_tokenizer([f"w{i}" for i in range(90)])
    tokenizer.save_pretrained(classifier)
    texts = [" ".join(f"w{(7 * i + j * j) % 90}" for j in range(1 + i % 9)) for i in range(70)]
    model = densify(variants.open_model(classifier)).double()
    with torch.no_grad():
        classes = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    return texts, classes


def test_accuracy_is_that_of_texts_one_by_one(classifier, labelled):
    texts, classes = labelled
    labels = [1 - one if i % 10 == 0 else one for i, one in enumerate(classes)]
    contrary = Runtime(lambda **inputs: -variants.open_model(classifier)(**inputs).logits)
    found = bench(classifier, shapes=[(1, 8)], repeats=1, texts=texts, labels=labels, others={"contrary": contrary})
    fp32, bf16, sparse, other = (one.accuracy for one in found.measured)
    assert fp32 == sparse == pytest.approx(0.9) and other == pytest.approx(0.1) and abs(bf16 - 0.9) < 0.1
    assert [cells(line)[-1] for line in found.table().splitlines()[:3:2]] == ["accuracy", "90.0 %"]


def test_labels_that_do_not_fit(classifier, llama):
    with pytest.raises(ValueError, match="2 texts have 1 labels: expected one for each"):
        bench(classifier, texts=["a", "b"], labels=[1])
    folder = llama()
    word_tokenizer(["a", "b"]).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"The output for 2 texts has the shape \(2, \d+, 99\): labels need a model"):
        bench(folder, shapes=[(1, 8)], texts=["a b", "b"], labels=[1, 0])


def test_threads_are_set_while_it_measures(classifier):
    before = torch.get_num_threads()
    seen = []
    found = bench(
        classifier,
        shapes=[(1, 8)],
        threads=before + 1,
        repeats=1,
        others={"mine": Runtime(lambda **inputs: seen.append(torch.get_num_threads()))},
    )
    assert seen == [before + 1] * 2 and found.threads == before + 1 and torch.get_num_threads() == before


@pytest.fixture
def result():
    return Bench(
        model="BertModel",
        machine="a processor",
        threads=2,
        repeats=20,
        versions={"torch": "2.13.0"},
        measured=(
            Measured("dense fp32", {"1x128": Latency(40.0, 50.0)}, 20.0, 100_000_000, 90_000_000, 0.975),
            Measured("dense bf16", {"1x128": Latency(20.0, 20.0)}, 30.0, 50_000_000, 45_000_000, 0.97),
            Measured("sparse fp32", {"1x128": Latency(10.0, 11.0)}, 50.0, 60_000_000, 9_000_000, 0.8),
        ),
    )


def test_table(result):
    lines = result.table().splitlines()
    header = ["", "1x128, p50", "1x128, p95", "decoding", "resident memory", "file", "accuracy"]
    assert cells(lines[0]) == header
    assert [cells(line) for line in lines[2:5]] == [
        ["dense fp32", "40.0 ms", "50.0 ms", "20.0 tokens/s", "100.0 MB", "90.0 MB", "97.5 %"],
        [
            "dense bf16",
            "20.0 ms (0.50)",
            "20.0 ms (0.40)",
            "30.0 tokens/s (1.50)",
            "50.0 MB (0.50)",
            "45.0 MB (0.50)",
            "97.0 %",
        ],
        [
            "sparse fp32",
            "10.0 ms (0.25)",
            "11.0 ms (0.22)",
            "50.0 tokens/s (2.50)",
            "60.0 MB (0.60)",
            "9.0 MB (0.10)",
            "80.0 %",
        ],
    ]
    assert lines[5:] == ["", "(BertModel; a processor, 2 threads, torch 2.13.0; rounds: 20)"]


def test_json(result):
    again = json.loads(json.dumps(result.to_dict()))
    assert again["measured"][2]["latency"]["1x128"] == {"p50": 10.0, "p95": 11.0} and again["threads"] == 2
    assert set(again) == {field.name for field in dataclasses.fields(Bench)}


def test_figure(result, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra peft-pst[plot]")
    figure = plot_bench(result, tmp_path / "new" / "bench.png")
    drawn = {axes.get_title(): [bar.get_width() for bar in axes.patches] for axes in figure.axes if axes.patches}
    assert drawn == {
        "1x128, p50 (ms)": [50, 40, 20, 20, 11, 10],
        "decoding (tokens/s)": [20, 20, 30, 30, 50, 50],
        "resident memory (MB)": [100, 100, 50, 50, 60, 60],
        "file (MB)": [90, 90, 45, 45, 9, 9],
    }
    points = {
        tuple(point) for axes in figure.axes for drawn in axes.collections for point in drawn.get_offsets().tolist()
    }
    assert points == {(1, 97.5), (2, 97), (4, 80)}
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_memory_in_a_process_of_its_own(classifier):
    dense = variants.write_variants(variants.open_model(classifier), classifier, classifier.parent / "work")[0]
    with tqdm(disable=True) as progress:
        assert 0 <= RESIDENT_BYTES(dense, (1, 8), progress) < 100e6
        gone = dense._replace(folder=classifier / "gone")
        with pytest.raises(RuntimeError, match="memory of dense fp32.*(?s:.*)gone"):
            RESIDENT_BYTES(gone, (1, 8), progress)


def test_what_that_process_does(classifier, monkeypatch, capsys, accelerated):
    seen = []

    def run(command, **kwargs):
        assert command[:5] == [sys.executable, "-W", "ignore", "-m", "peft_pst.bench.memory"]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command[4:]])
        torch.set_num_threads(2)  # of a new process
        memory.main()
        seen.append((torch.get_num_threads(), len(accelerated)))
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out)

    forward, shapes = BertForSequenceClassification.forward, []

    def counted(self, input_ids, **inputs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", counted)
    monkeypatch.setattr(subprocess, "run", run)
    written = variants.write_variants(variants.open_model(classifier), classifier, classifier.parent / "work")
    with timing.threads_of_torch(1), tqdm(disable=True) as progress:
        for variant in written:
            RESIDENT_BYTES(variant, (2, 8), progress)
    assert seen == [(1, 0), (1, 0), (1, 1)]  # the last one through accelerate_sparse
    assert shapes == [(2, 8)] * 3


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; its exit status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peft-pst", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        printed = capsys.readouterr()
        return exit.value.code or 0, printed.out + printed.err

    return run


def test_the_command(classifier, run, tmp_path):
    code, printed = run(
        classifier, "--shapes", "1x8,2x4", "--threads", 1, "--repeats", 2, "--json", tmp_path / "new" / "bench.json"
    )
    assert code == 0 and "| 2x4, p95" in printed and "1 thread," in printed
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert found["repeats"] == 2 and list(found["measured"][0]["latency"]) == ["1x8", "2x4"]
    assert found["measured"][2]["file_bytes"] == file_bytes(classifier)


def test_the_command_draws(classifier, run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra peft-pst[plot]")
    assert run(classifier, "--shapes", "1x8", "--repeats", 1, "--figure", tmp_path / "bench.svg")[0] == 0
    assert "<svg" in (tmp_path / "bench.svg").read_text()


def test_help_shows_an_example(run):
    code, printed = run("--help")
    assert code == 0 and "peft-pst bench " in printed.split("Example:")[1]


def test_what_a_user_can_mend_is_one_line(classifier, run, llama, tmp_path):
    def error(*arguments):
        code, printed = run(*arguments)
        assert code == 1 and "Error: " in printed
        return " ".join(printed.split())

    assert "The shapes '1x8,2' are not sequences x tokens" in error(classifier, "--shapes", "1x8,2")
    assert "shapes=[(0, 8)]: expected at least one" in error(classifier, "--shapes", "0x8")
    assert "repeats=0" in error(classifier, "--repeats", 0) and "threads=0" in error(classifier, "--threads", 0)
    assert "reads 16 tokens, but 17 are to be measured" in error(classifier, "--shapes", "1x8,1x17")
    assert "reads 64 tokens, but 96 are" in error(llama(max_position_embeddings=64), "--shapes", "1x8")
    (tmp_path / "empty").mkdir()
    assert "holds neither config.json nor adapter_config.json" in error(tmp_path / "empty")


def test_other_models_are_refused(bert, tmp_path):
    config = T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration: expected an encoder, a classifier of texts or a"
    ):
        bench(tmp_path / "t5")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    bert().save_pretrained(base)
    get_peft_model(type(bert()).from_pretrained(base), PSTConfig(task_type="SEQ_CLS")).save_pretrained(adapter)
    with pytest.raises(ValueError, match="has an adapter that is not merged"):
        bench(adapter)
