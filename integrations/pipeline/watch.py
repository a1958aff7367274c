"""A stage that dies or hangs ends the run on all the others, with an error that names it.

Each process shows every now and then that it is alive, in the store that torch.distributed keeps, and looks after the
others. It acts only while its main thread waits for them: who is done with a training may go.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from select import select

import torch.distributed as dist

BEATS = 10
"""Signs of life in the time after which a process counts as lost."""
MISSED = 3
"""Signs of life that may fail to come once something else says that a process died."""


class StageError(RuntimeError):
    """A process of the pipeline was killed or hangs."""


class Watch:
    """Watches over the processes of a pipeline, from two threads of its own.

    torchrun ends the other processes as soon as one has died. So that they can say which, this class listens to
    SIGTERM, unless the program does so itself.

    Args:
        stages: what each process has, by its rank, such as `"stage 1 (layers 4-7)"`.
        timeout: seconds without a sign of life after which a process counts as lost.
    """

    def __init__(self, stages: Sequence[str], timeout: float) -> None:
        self.timeout, self.beat = timeout, timeout / BEATS
        self.advice = "No checkpoint was saved: start all processes again."
        """What to do after an error."""
        place = f"rank {dist.get_rank()}, process {os.getpid()} on {socket.gethostname()}"
        places = [""] * len(stages)
        # a connection of its own: the main thread's is busy while that thread waits for a key
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._key = _key(dist.get_rank())
        self._store.set(self._key, "0")
        dist.all_gather_object(places, place)  # afterwards the key of each process is there
        self._names = [f"{stage} of {place}" for stage, place in zip(stages, places, strict=True)]
        self._others = [rank for rank in range(len(stages)) if rank != dist.get_rank()]
        self._forget()
        self._waiting = self._stopped = False
        self._reader, self._writer = socket.socketpair()
        self._listens = self._listen()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._show_life, self._look)]
        if self._others:
            for thread in self._threads:
                thread.start()
            atexit.register(self.stop)

    def stop(self) -> None:
        """Let go of the other processes, from the main thread."""
        if self._stopped:
            return
        self._stopped = True
        if self._listens:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._writer.send(b"\0")
        for thread in self._threads:
            if thread.is_alive():
                thread.join(2 * self.beat)  # one that the store does not answer stays

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what needs the other processes.

        Raises:
            StageError: if it failed and one of them is lost. Where it does not come back because one is lost, the
                process ends with the same message.
        """
        self._waiting = True
        try:
            yield
        except RuntimeError as error:  # gloo and nccl raise nothing narrower
            lost = self._find_lost()
            if lost:
                raise StageError(self._describe(lost)) from error
            raise
        finally:
            self._waiting = False

    def _listen(self) -> bool:
        """Have SIGTERM come to the threads here, since the main thread may be busy far from Python."""
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return False
        self._writer.setblocking(False)
        if (before := signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)) != -1:
            signal.set_wakeup_fd(before)
            return False
        signal.signal(signal.SIGTERM, lambda *_: None)
        return True

    def _show_life(self) -> None:
        last: dict[int, bytes] = {}
        try:
            while not self._stopped:
                self._store.set(self._key, repr(time.monotonic()))
                found = self._store.multi_get([_key(rank) for rank in self._others])
                self._answered = time.monotonic()
                for rank, value in zip(self._others, found, strict=True):
                    if last.get(rank) != value:
                        last[rank], self._seen[rank] = value, self._answered
                time.sleep(self.beat)
        except RuntimeError:
            pass  # the store is gone: nobody answers from now on

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._stopped:
            ready, _, _ = select([self._reader], [], [], self.beat)
            if time.monotonic() - looked > self.timeout / 2:  # this process stood still itself, perhaps all did
                self._forget()
            looked = time.monotonic()
            if ready and signal.SIGTERM in self._reader.recv(64):
                self._end(self._find_lost(), 128 + signal.SIGTERM)
            if self._waiting and (lost := self._lost(self.timeout)):
                self._end(lost, 1)

    def _end(self, lost: list[str], code: int) -> None:
        """End the process, whatever its main thread does."""
        if lost:
            print(f"\nStageError: {self._describe(lost)}", file=sys.stderr, flush=True)  # below a progress bar
        os._exit(code)

    def _forget(self) -> None:
        self._answered = time.monotonic()
        self._seen = dict.fromkeys(self._others, self._answered)

    def _lost(self, limit: float) -> list[str]:
        """The names of those who have shown no sign of life for so many seconds."""
        now = time.monotonic()
        if now - self._answered > limit:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return ["the launcher on the machine of rank 0"]
            return [self._names[0]]  # it keeps the store
        return [self._names[rank] for rank, seen in self._seen.items() if now - seen > limit]

    def _find_lost(self) -> list[str]:
        """Those who are lost, after something has said that there may be one."""
        end = time.monotonic() + (MISSED + 2) * self.beat
        while self._others and time.monotonic() < end:
            if lost := self._lost(MISSED * self.beat):
                return lost
            time.sleep(self.beat / 4)
        return []

    def _describe(self, lost: list[str]) -> str:
        return (
            f"The pipeline has lost {' and '.join(lost)}: it was killed, ended with an error of its own or hangs. "
            f"{self.advice}"
        )


def _key(rank: int) -> str:
    return f"pipeline/alive/{rank}"
