"""Serve a sparse model over HTTP on a CPU: text classification or generation, whichever the folder can do.

    python examples/serve.py outputs/demo/small
    curl localhost:8000/health
    curl localhost:8000/classify -d '{"text": "Shares fell after the news."}'
    curl localhost:8000/generate -d '{"prompt": "Once", "max_new_tokens": 20}'

The folder is what `peft_pst.save_pretrained` wrote, or a merged model with its zeros, with its tokenizer. Requests
that come together are computed together; the answers are those of each text alone. Generation is greedy.

A text longer than the model reads is refused (422), never clipped. A full queue answers 503, a body that is too large
413, and a client that does not send its request in time is cut (408). SIGTERM finishes what waits, and exits with 0.
"""

import argparse
import asyncio
import contextlib
import functools
import inspect
import logging
import math
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from uvicorn.protocols.http.h11_impl import H11Protocol

from peft_pst import accelerate_sparse, open_model


class Text(BaseModel, extra="forbid"):
    text: str


class Prompt(BaseModel, extra="forbid"):
    prompt: str
    max_new_tokens: int = Field(default=32, ge=1)


@dataclass(eq=False)
class Work:
    """What one request waits for. It is made inside the event loop."""

    inputs: dict[str, list[int]]
    max_new_tokens: int = 0
    arrived: float = field(default_factory=time.monotonic)
    result: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Model:
    """A model with its tokenizer: what it can do, what it reads, and a batch of it."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer_config.json").is_file():
            raise ValueError(f"{str(folder)!r} holds no tokenizer: save the model with tokenizer=... beside it.")
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = accelerate_sparse(open_model(folder))
        config, self.name = self.model.config, type(self.model).__name__
        self.limit = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
        self.reads = inspect.signature(self.model.forward).parameters
        self.pad, self.can_batch = self.tokenizer.pad_token_id, True
        one_label = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
        if self.name.endswith("ForSequenceClassification") and one_label:
            self.path, self.compute = "/classify", self.classify
            # a decoder finds the end of a text by the padding; without a token for it, texts go one by one
            self.can_batch = self.pad is not None
            config.pad_token_id = self.pad if self.can_batch else config.pad_token_id
        elif self.model.can_generate() and not config.is_encoder_decoder:
            self.path, self.compute = "/generate", self.generate
            stop = self.model.generation_config.eos_token_id
            self.stop = stop if isinstance(stop, list) else [stop]
            # greedy, whatever the folder's generation_config.json asks for
            self.model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=self.pad or 0)
        else:
            expected = "a classifier of one label a text, or a causal language model"
            raise ValueError(f"{str(folder)!r} holds a {self.name}: expected {expected}.")

    def encode(self, text: str, max_new_tokens: int = 0) -> Work:
        found = self.tokenizer(text, return_attention_mask=True, verbose=False)
        tokens = len(found["input_ids"])
        if not 0 < tokens <= self.limit - max_new_tokens:
            new = f" and max_new_tokens is {max_new_tokens}" if max_new_tokens else ""
            limit = f"at most {self.limit} together" if new else f"1 to {self.limit}"
            raise HTTPException(422, f"The text has {tokens} tokens{new}: {self.name} reads {limit}.")
        return Work({name: row for name, row in found.items() if name in self.reads}, max_new_tokens)

    def classify(self, batch: list[Work]) -> list[dict[str, Any]]:
        scores = self.model(**self.padded(batch, "right")).logits.float().softmax(-1)
        named = [{self.model.config.id2label[i]: score for i, score in enumerate(row)} for row in scores.tolist()]
        return [{"label": max(row, key=row.get), "scores": row} for row in named]

    def generate(self, batch: list[Work]) -> list[list[int]]:
        found = {}
        for length in {work.max_new_tokens for work in batch}:  # together none goes past the positions that it has
            works = [work for work in batch if work.max_new_tokens == length]
            inputs = self.padded(works, "left")
            new = self.model.generate(**inputs, max_new_tokens=length)[:, inputs["input_ids"].shape[1] :].tolist()
            for work, row in zip(works, new, strict=True):
                found[work] = row[: next((i for i, token in enumerate(row) if token in self.stop), length)]
        return [found[work] for work in batch]

    def padded(self, batch: list[Work], side: str) -> dict[str, torch.Tensor]:
        """What the tokenizer makes of each text, int64 [texts, tokens of the longest]."""
        fill = {"input_ids": self.pad or 0}  # the mask and the rest are filled up with 0
        columns = {name: [torch.tensor(work.inputs[name]) for work in batch] for name in batch[0].inputs}
        return {name: pad_sequence(column, True, fill.get(name, 0), side) for name, column in columns.items()}


class Batcher:
    """Collects requests, and computes them in one thread: torch has the threads that the processor has."""

    def __init__(self, compute: Callable[[list[Work]], list], max_batch: int, max_wait: float, queue: int) -> None:
        self.compute = torch.inference_mode()(compute)
        self.max_batch, self.max_wait, self.queue = max_batch, max_wait, queue
        self.waiting: deque[Work] = deque()
        self.changed = asyncio.Event()
        self.worker = ThreadPoolExecutor(1)

    async def submit(self, work: Work, request: Request) -> Any:
        """The result; what waits for a client that went away is dropped."""
        if len(self.waiting) >= self.queue:
            raise HTTPException(503, f"{self.queue} requests wait already: try again.", {"Retry-After": "1"})
        self.waiting.append(work)
        self.changed.set()
        gone = asyncio.ensure_future(request.receive())  # after the body, only the end of the connection comes
        await asyncio.wait([work.result, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.result.done():
            with contextlib.suppress(ValueError):  # it is being computed
                self.waiting.remove(work)
            raise HTTPException(499, "The client went away.")
        return work.result.result()

    async def run(self) -> None:
        while True:
            batch = await self.next_batch()
            try:
                results = await asyncio.get_running_loop().run_in_executor(self.worker, self.compute, batch)
            except Exception:
                logging.getLogger("uvicorn.error").exception("A batch of %d failed", len(batch))
                for work in batch:
                    work.result.set_exception(HTTPException(500, "The model failed on this batch."))
            else:
                for work, result in zip(batch, results, strict=True):
                    work.result.set_result(result)

    async def next_batch(self) -> list[Work]:
        """As soon as max_batch requests wait, or the first has waited for max_wait."""
        while len(self.waiting) < self.max_batch:
            left = self.waiting[0].arrived + self.max_wait - time.monotonic() if self.waiting else None
            if left is not None and left <= 0:
                break
            self.changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), left)
        return [self.waiting.popleft() for _ in range(min(self.max_batch, len(self.waiting)))]


async def read(request: Request, schema: type[BaseModel], limit: int) -> Any:
    """The body, of which no more is read than the limit (and a chunk), whether or not it says its length."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, f"The body has more than {limit} bytes.", {"Connection": "close"})
        return schema.model_validate_json(body)
    except ClientDisconnect as error:
        raise HTTPException(499, "The client went away.") from error
    except ValidationError as error:  # what was sent is not sent back: not all of it can be JSON
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        raise HTTPException(422, wrong) from error


class Connection(H11Protocol):
    """uvicorn's connection, which waits forever for a request that was begun: this one waits for `timeout` seconds."""

    def __init__(self, *args: Any, timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout = timeout

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.timer = self.loop.call_later(self.timeout, self.cut)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.timer.cancel()
        self.timer = self.loop.call_later(self.timeout, self.cut)  # for the next request

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        super().connection_lost(exc)

    def cut(self) -> None:
        """Close the connection, unless the request is whole and being answered."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            if self.conn.our_state is h11.SEND_RESPONSE:
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()

    def shutdown(self) -> None:
        self.cut()  # who sends now is not waited for
        super().shutdown()


def make_app(model: Model, batcher: Batcher, max_body: int) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "model": model.name, "serves": model.path, "waiting": len(batcher.waiting)}

    async def classify(request: Request) -> dict:
        body = await read(request, Text, max_body)
        return await batcher.submit(model.encode(body.text), request)

    async def generate(request: Request) -> dict:
        body = await read(request, Prompt, max_body)
        tokens = await batcher.submit(model.encode(body.prompt, body.max_new_tokens), request)
        return {"text": model.tokenizer.decode(tokens, skip_special_tokens=True), "tokens": len(tokens)}

    async def other() -> None:
        raise HTTPException(404, f"The folder holds a {model.name}, which serves POST {model.path}.")

    for path, endpoint in (("/classify", classify), ("/generate", generate)):
        app.post(path)(endpoint if path == model.path else other)
    return app


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a sparse model with its tokenizer")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one")
    parser.add_argument("--max-batch", type=positive, default=16, help="requests that are computed together")
    parser.add_argument("--max-wait-ms", type=float, default=5, help="how long the first of a batch waits for others")
    parser.add_argument("--queue", type=positive, default=256, help="requests that may wait")
    parser.add_argument("--connections", type=positive, default=512, help="clients at a time; more are answered 503")
    parser.add_argument("--max-body", type=positive, default=65536, help="bytes of a request's body")
    parser.add_argument("--timeout", type=positive, default=30, help="seconds to send a request in, and to finish in")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # uvicorn raises the signal again when it has finished
    try:
        model = Model(args.folder)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"Error: {error}") from error
    batcher = Batcher(model.compute, args.max_batch if model.can_batch else 1, args.max_wait_ms / 1000, args.queue)
    uvicorn.run(
        make_app(model, batcher, args.max_body),
        host=args.host,
        port=args.port,
        http=functools.partial(Connection, timeout=args.timeout),
        limit_concurrency=args.connections + 1,  # uvicorn refuses at this many
        timeout_graceful_shutdown=args.timeout,
    )


if __name__ == "__main__":
    main()
