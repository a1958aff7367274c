import ctypes
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")

from sparse.kernels.cases import error, make

from peft_pst.sparse.kernels import threads
from peft_pst.sparse.kernels.layer import Layer
from peft_pst.sparse.kernels.layout import Kind

needs_openmp = pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is another one elsewhere")


@pytest.fixture(autouse=True)
def number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layers():
    """Each with the number of tokens, and enough work for several threads."""
    square = make(1000, 1100, 0.3, Kind.INT8)
    first, gate, last = make(700, 300, 0.2), make(700, 300, 0.2, seed=1), make(300, 700, 0.2)
    yield square.pack(), None, None, 1
    yield square.pack(), None, None, 65
    yield make(500, 400, 0.2).pack(), None, None, 7
    yield make(500, 400, 0.2, Kind.BF16).pack(), None, None, 300
    yield make(64, 4000, 0.002).pack(), None, None, 1000  # almost all of it is to write panels
    yield last.pack(), first.pack(), gate.pack(), 5
    yield last.pack(), first.pack(), None, 150


@needs_openmp
def test_runs_on_as_many_as_asked_for():
    together, seen = threading.Barrier(3, timeout=60), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def callback(program):
        together.wait()
        seen.append((threading.get_native_id(), program))

    threads.run(callback, 1234, 3)
    assert len({thread for thread, _ in seen}) == 3 and {program for _, program in seen} == {1234}


def test_asks_for_more_threads_when_there_is_more_to_do(monkeypatch):
    asked = []
    monkeypatch.setattr(threads, "run", lambda callback, program, count: asked.append(count) or callback(program))
    torch.set_num_threads(3)
    for out, tokens in ((16, 1), (1500, 100)):
        weight, x = make(out, 1000, 0.2), torch.randn(tokens, 1000)
        assert error(Layer(weight.pack())(x), weight.reference(x)) <= 1e-6
    assert asked == [3]  # the first was not worth it


def test_the_same_bits_on_any_number_of_threads():
    """Other tokens in each call: what the last one left behind is not what another thread has yet to do."""
    for last, first, gate, tokens in layers():
        layer, xs = Layer(last, first, gate, "gelu"), torch.randn(5, tokens, (first or last).shape[1])
        torch.set_num_threads(1)
        alone = [layer(x) for x in xs]
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for x, expected in zip(xs, alone, strict=True):
                assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_calls_from_several_threads_at_once(count):
    made = [(Layer(last, first, gate), (first or last).shape[1], tokens) for last, first, gate, tokens in layers()]
    inputs = [[torch.randn(tokens, size) for _ in range(4)] for _, size, tokens in made]
    torch.set_num_threads(1)
    expected = [[layer(x) for x in xs] for (layer, _, _), xs in zip(made, inputs, strict=True)]
    start = threading.Barrier(4, timeout=60)

    def work(number):
        torch.set_num_threads(count)
        start.wait()
        for repeat in range(3):
            for i in range(len(made)):
                i = (i + number * repeat) % len(made)  # now the same layer in all threads, now another in each
                assert torch.equal(made[i][0](inputs[i][number]), expected[i][number])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@needs_openmp
def test_shares_the_threads_of_torch(alone):
    before, after = map(int, alone("count_threads").stdout.split())
    assert before == after >= 2


def test_without_openmp(monkeypatch):
    """It runs on one thread, and says so once."""
    threads._openmp.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    torch.set_num_threads(2)
    try:
        weight, x = make(500, 400, 0.2), torch.randn(100, 400)
        layer = Layer(weight.pack())
        with pytest.warns(UserWarning, match="one thread"):
            assert error(layer(x), weight.reference(x)) <= 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(x)
    finally:
        threads._openmp.cache_clear()
