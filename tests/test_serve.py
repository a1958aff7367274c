import argparse
import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

import peft_pst
from peft_pst import PSTConfig

httpx = pytest.importorskip("httpx", reason="the server is asked over HTTP: peft-pst[test]")
pytest.importorskip("fastapi", reason="the example is a FastAPI server: peft-pst[demo]")
pytest.importorskip("uvicorn", reason="the example is a FastAPI server: peft-pst[demo]")
pytest.importorskip("numba", reason="the server runs on the kernels: peft-pst[cpu]")

SCRIPT = Path(__file__).parents[1] / "examples" / "serve.py"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
POSITIONS = 64
WORDS = 97
"""The models know `word0` to `word96`; the tokenizers know more, and on those a forward fails."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models are slower by many threads, in this process and in the servers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer(**special):
    words = ["[PAD]", "[UNK]", *(f"word{i}" for i in range(WORDS + 9))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)


def pruned(model):
    return get_peft_model(model, PSTConfig(initial_sparsity=0.9)).merge_and_unload().eval()


def texts(lengths, seed=0):
    rng = random.Random(seed)
    return [" ".join(f"word{rng.randrange(WORDS)}" for _ in range(length)) for length in lengths]


@contextlib.contextmanager
def serving(folder, log, **options):
    command = [sys.executable, SCRIPT, folder, "--port", "0"]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    with (
        open(log, "w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process,
    ):
        try:
            assert until(lambda: "Uvicorn running" in log.read_text() or process.poll() is not None)
            found = re.search(r"running on (http://127\.0\.0\.1:(\d+))", log.read_text())
            assert found, log.read_text()
            yield SimpleNamespace(url=found[1], port=int(found[2]), process=process, log=log)
        finally:
            process.kill()


def until(true, seconds=60):
    """Whether it becomes true; so long only where something hangs."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def waiting(server):
    with urllib.request.urlopen(f"{server.url}/health", timeout=60) as response:  # quicker than httpx
        return json.load(response)["waiting"]


def post(server, path, **body):
    return httpx.post(server.url + path, json=body, timeout=60)


def connect(server, sent):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    client.sendall(sent)
    return client


def answer(client):
    """All that the server sends until it closes the connection."""
    found = b""
    with client, contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            found += chunk
    return found


def head(length):
    return f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


HALF = head(100) + b'{"text": "wo'


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a sparse classifier, and a function that gives the logarithms of its scores for one text."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS + 2, num_labels=3, max_position_embeddings=POSITIONS, initializer_range=0.2, **SIZES
    )
    model, words = pruned(BertForSequenceClassification(config)), tokenizer(pad_token="[PAD]")
    folder = tmp_path_factory.mktemp("classifier")
    peft_pst.save_pretrained(model, folder, tokenizer=words)

    @functools.cache
    @torch.no_grad()
    def expected(text):
        return model(**words(text, return_tensors="pt")).logits[0].log_softmax(-1)

    return SimpleNamespace(folder=folder, expected=expected)


@pytest.fixture(scope="module")
def server(classifier, tmp_path_factory):
    with serving(classifier.folder, tmp_path_factory.mktemp("server") / "log", timeout=3) as running:
        yield running


def check(classifier, text, response):
    assert response.status_code == 200, response.text
    found, expected = response.json(), classifier.expected(text)
    torch.testing.assert_close(torch.tensor(list(found["scores"].values())).log(), expected, rtol=0, atol=1e-4)
    assert found["label"] == f"LABEL_{int(expected.argmax())}"


def test_two_hundred_at_once_among_clients_that_hang(classifier, server):
    sentences = texts([1 + i % POSITIONS for i in range(200)])
    assert torch.stack([classifier.expected(text) for text in sentences]).std(0).min() > 0.1  # answers differ
    halves = [connect(server, HALF) for _ in range(20)]
    silent = [connect(server, sent) for sent in (b"", b"POST /classify HTT", HALF[:30])]
    unread = connect(server, HALF.replace(b"classify", b"generate"))  # is answered, and goes on
    trickling = connect(server, HALF)
    stop = threading.Event()

    def trickle():
        with contextlib.suppress(OSError):
            while not stop.wait(0.2):
                trickling.sendall(b" ")
                unread.sendall(b" ")

    async def ask():
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as client:
            bad = [client.post(f"{server.url}/classify", content=b"{" + b" " * size) for size in (10, 10**6) * 10]
            good = [client.post(f"{server.url}/classify", json={"text": text}) for text in sentences]
            return await asyncio.gather(*good, *bad)

    thread = threading.Thread(target=trickle)
    thread.start()
    responses = asyncio.run(ask())
    for text, response in zip(sentences, responses, strict=False):
        check(classifier, text, response)
    assert [response.status_code for response in responses[200:]] == [422, 413] * 10
    assert all(answer(client).startswith(b"HTTP/1.1 408 ") for client in halves)
    assert [answer(client) for client in silent] == [b""] * 3
    assert answer(trickling).startswith(b"HTTP/1.1 408 ")
    assert answer(unread).startswith(b"HTTP/1.1 404 ")
    stop.set()
    thread.join()
    assert waiting(server) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_body_that_is_too_large_is_not_read_to_its_end(server):
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    for begun in (
        head(10**9) + b"x" * 70_000,
        chunked + b"1000\r\n" + b"x" * 4096 + b"\r\n" + b"FFFF\r\n" + b"x" * 65535,
    ):
        found = answer(connect(server, begun))
        assert found.startswith(b"HTTP/1.1 413 ") and b"more than 65536 bytes" in found
    whole = json.dumps({"text": "word1"}).encode()
    whole += b" " * (65536 - len(whole))
    assert httpx.post(f"{server.url}/classify", content=whole).status_code == 200
    assert httpx.post(f"{server.url}/classify", content=whole + b" ").status_code == 413


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Invalid JSON"),
        (b'{"text": ', "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"text": "\xff"}', "Invalid JSON"),
        (b'{"text": "\\ud800"}', "Invalid JSON"),
        (b"[" * 60_000, "Invalid JSON"),
        (b"null", "should be an object"),
        (b'["word1"]', "should be an object"),
        (b"{}", "Field required"),
        (b'{"text": NaN}', "valid string"),
        (b'{"text": 1}', "valid string"),
        (b'{"text": ["word1"]}', "valid string"),
        (b'{"text": "word1", "txet": 1}', "Extra inputs are not permitted"),
        (b'{"text": "  "}', "The text has 0 tokens: BertForSequenceClassification reads 1 to 64"),
        (json.dumps({"text": "word1 " * 65}).encode(), "The text has 65 tokens: BertForSequenceClassification reads"),
    ],
)
def test_what_cannot_be_read_is_refused(server, body, said):
    response = httpx.post(f"{server.url}/classify", content=body)
    assert response.status_code == 422 and said in response.text


def test_what_the_folder_holds(server):
    expected = {"status": "ok", "model": "BertForSequenceClassification", "serves": "/classify", "waiting": 0}
    assert httpx.get(f"{server.url}/health").json() == expected
    response = post(server, "/generate", prompt="word1")
    assert response.status_code == 404
    assert "The folder holds a BertForSequenceClassification, which serves POST /classify." in response.text


def test_a_forward_that_fails(classifier, server):
    response = post(server, "/classify", text=f"word1 word{WORDS + 1}")
    assert response.status_code == 500 and "The model failed on this batch" in response.text
    assert "IndexError" in server.log.read_text()
    check(classifier, "word1 word2", post(server, "/classify", text="word1 word2"))


def test_a_full_queue_slow_clients_and_the_end(classifier, tmp_path):
    options = {"queue": 3, "max_wait_ms": 2500, "timeout": 5, "connections": 8}
    with serving(classifier.folder, tmp_path / "log", **options) as server, ThreadPoolExecutor() as threads:
        body = json.dumps({"text": "word3"}).encode()
        leaving = connect(server, head(len(body)) + body)
        assert until(lambda: waiting(server) == 1)
        staying = [threads.submit(post, server, "/classify", text=text) for text in ("word1", "word1 word2")]
        assert until(lambda: waiting(server) == 3)
        response = post(server, "/classify", text="word4")
        assert response.status_code == 503 and response.headers["Retry-After"] == "1"
        assert "3 requests wait already" in response.text
        leaving.close()
        left = []
        assert until(lambda: left.append(waiting(server)) or left[-1] != 3)
        assert left[-1] == 2  # of what is computed none stays
        for text, future in zip(("word1", "word1 word2"), staying, strict=True):
            check(classifier, text, future.result())

        slow = []
        while httpx.get(f"{server.url}/health").status_code == 200:
            slow.append(connect(server, HALF))
            assert len(slow) <= 8
        assert until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        assert all(answer(client).startswith(b"HTTP/1.1 408 ") for client in slow)

        staying = [threads.submit(post, server, "/classify", text=text) for text in ("word5", "word5 word6")]
        assert until(lambda: waiting(server) == 2)
        server.process.send_signal(signal.SIGTERM)
        for text, future in zip(("word5", "word5 word6"), staying, strict=True):
            check(classifier, text, future.result())
        assert server.process.wait(60) == 0
        with pytest.raises(urllib.error.URLError):
            waiting(server)
        assert "Traceback" not in server.log.read_text()


def test_generation(tmp_path):
    words = tokenizer()
    assert words.pad_token_id is None
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS + 2, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, initializer_range=0.3
    )
    config.bos_token_id = config.eos_token_id = None
    model = pruned(AutoModelForCausalLM.from_config(config))
    asked = [(text, 8) for text in texts([1, 2, 3, 5, 8, 13, 21, 34])] + [(text, 20) for text in texts([2, 40], 1)]
    asked += [(texts([POSITIONS - 4], 2)[0], 4), (texts([4], 3)[0], POSITIONS - 4)]  # both fill all the positions

    def alone(prompt, length, stop=None):
        inputs = words(prompt, return_tensors="pt")
        found = model.generate(
            **inputs, max_new_tokens=length, do_sample=False, eos_token_id=stop, pad_token_id=0
        )  # fmt: skip
        return [token for token in found[0, inputs["input_ids"].shape[1] :].tolist() if token != stop]

    def answers(row):
        return {"text": words.decode(row, skip_special_tokens=True), "tokens": len(row)}

    first = [alone(*one) for one in asked]
    stop = first[3][2]
    expected = [alone(*one, stop) for one in asked]
    assert sum(map(len, expected)) < sum(map(len, first)) and len({tuple(row) for row in expected}) > 8
    model.generation_config.eos_token_id = model.config.eos_token_id = stop
    peft_pst.save_pretrained(model, tmp_path / "model", tokenizer=words)

    with serving(tmp_path / "model", tmp_path / "log", max_wait_ms=2000, timeout=600) as server:
        hanging = connect(server, HALF.replace(b"classify", b"generate"))
        with ThreadPoolExecutor(16) as threads:
            futures = [threads.submit(post, server, "/generate", prompt=p, max_new_tokens=n) for p, n in asked]
            assert post(server, "/classify", text="word1").status_code == 404
            response = post(server, "/generate", prompt="word1 " * 60, max_new_tokens=10)
            assert response.status_code == 422
            assert "60 tokens and max_new_tokens is 10: GPT2LMHeadModel reads at most 64 together" in response.text
            assert post(server, "/generate", prompt="word1", max_new_tokens=0).status_code == 422
            for row, future in zip(expected, futures, strict=True):
                assert future.result().json() == answers(row)

            futures = [threads.submit(post, server, "/generate", prompt=p, max_new_tokens=n) for p, n in asked[:4]]
            assert until(lambda: waiting(server) == 4)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
            for row, future in zip(expected, futures, strict=False):
                assert future.result().json() == answers(row)
        hanging.close()
        assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requests_are_computed_together_one_batch_at_a_time(example):
    batches, running = [], 0

    def compute(batch):
        nonlocal running
        running += 1
        assert running == 1 and torch.is_inference_mode_enabled()
        batches.append([work.inputs[0] for work in batch])
        time.sleep(0.02)
        running -= 1
        return [-work.inputs[0] for work in batch]

    async def ask(max_wait):
        batcher = example.Batcher(compute, max_batch=4, max_wait=max_wait, queue=10)
        task = asyncio.create_task(batcher.run())
        request = SimpleNamespace(receive=lambda: asyncio.sleep(60))
        found = await asyncio.gather(*(batcher.submit(example.Work([i]), request) for i in range(10)))
        task.cancel()
        return found

    assert asyncio.run(ask(0.01)) == [-i for i in range(10)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_classifier_without_padding_token_goes_text_by_text(example, tmp_path):
    config = GPT2Config(vocab_size=WORDS + 2, n_embd=32, n_layer=1, n_head=2, num_labels=3)
    for name, words in (("without", tokenizer()), ("with", tokenizer(pad_token="[PAD]"))):
        model = pruned(GPT2ForSequenceClassification(config))
        peft_pst.save_pretrained(model, tmp_path / name, tokenizer=words)
        served = example.Model(tmp_path / name)
        assert served.can_batch == (name == "with")
        for batch in [["word1", "word2 word3 word4"]] if served.can_batch else [["word1"], ["word2 word3 word4"]]:
            found = served.classify([SimpleNamespace(inputs=words(text)) for text in batch])
            for text, scores in zip(batch, found, strict=True):
                logits = model(**words(text, return_tensors="pt")).logits[0]
                torch.testing.assert_close(torch.tensor(list(scores["scores"].values())), logits.softmax(-1))


def test_folders_that_cannot_be_served(example, tmp_path):
    model = pruned(BertForTokenClassification(BertConfig(vocab_size=WORDS + 2, **SIZES)))
    peft_pst.save_pretrained(model, tmp_path / "tagger", tokenizer=tokenizer())
    with pytest.raises(ValueError, match="holds a BertForTokenClassification: expected a classifier of one label"):
        example.Model(tmp_path / "tagger")
    peft_pst.save_pretrained(model, tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no tokenizer: save the model with tokenizer=... beside it"):
        example.Model(tmp_path / "bare")
    dense = BertForSequenceClassification(BertConfig(vocab_size=WORDS + 2, **SIZES))
    peft_pst.save_pretrained(dense, tmp_path / "dense", "dense", tokenizer=tokenizer())
    with pytest.raises(ValueError, match="no linear layer with enough zeros"):
        example.Model(tmp_path / "dense")
    with pytest.raises(ValueError, match="holds neither config.json nor adapter_config.json"):
        tokenizer().save_pretrained(tmp_path / "words")
        example.Model(tmp_path / "words")
    for text in ("0", "-1", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a positive whole number"):
            example.positive(text)
