"""What the tests do in processes of their own: python alone.py FUNCTION ARGUMENTS."""

import ctypes
import mmap
import os
import sys
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


def import_kernels_only():
    """Importing all of the library takes longer than what is done here. Seeded, as conftest.py seeds every test."""
    package = types.ModuleType("peft_pst")
    package.__path__ = [str(ROOT / "peft_pst")]
    sys.modules["peft_pst"] = package
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    torch.manual_seed(0)


def protected(size, at_end):
    """The address of so many bytes that end where a page begins that nothing may touch, or begin where one ends."""
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    protected.memory.append(memory)
    return start + PAGE + (pages * PAGE - size if at_end else 0)


protected.memory = []


def placed(tensor, at_end):
    """A copy of a tensor between such pages."""
    if tensor is None or not tensor.numel():
        return tensor
    address = protected(tensor.nbytes, at_end)
    ctypes.memmove(address, tensor.contiguous().data_ptr(), tensor.nbytes)
    flat = torch.frombuffer((ctypes.c_char * tensor.nbytes).from_address(address), dtype=tensor.dtype)
    return flat.view(tensor.shape)


def bounds(where):
    """Compute with every buffer next to a page that nothing may touch."""
    from sparse.kernels.cases import allowed_error, error, make

    from peft_pst.sparse.kernels import layer as module
    from peft_pst.sparse.kernels.layout import Kind

    at_end = where == "end"

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, **kwargs):
            count = torch.Size(shape).numel()
            # what is computed with starts at the next multiple of 64 bytes
            return placed(torch.empty(count, dtype=torch.float32), at_end).view(shape)

    module.torch = Torch()

    def packed(weight):
        parts = weight.pack()
        return parts._replace(
            **{name: placed(part, at_end) for name, part in parts._asdict().items() if isinstance(part, torch.Tensor)}
        )

    for kind in Kind:
        for density in (0.05, 0.4):
            for blocks in (False, True):
                for tokens in (1, 3, 7, 15, 16, 40, 65):
                    for out, size in ((1, 1), (37, 129), (512, 40), (8, 512)):
                        module._local.space = None
                        weight = make(out, size, density, kind, blocks)
                        x = torch.randn(tokens, size)
                        layer = module.Layer(packed(weight))
                        y = layer(placed(x, at_end))
                        assert float((y - weight.reference(x)).abs().max()) <= weight.allowed(x, layer._made_from[0])
                        if tokens == 1:
                            layer(placed(x / 0, at_end))
                    module._local.space = None
                    first, gate = make(75, 129, density, kind, blocks), make(75, 129, density, kind, blocks, seed=1)
                    last, x = make(21, 75, density, kind, blocks, seed=2), torch.randn(tokens, 129)
                    weights = [packed(weight) for weight in (last, first, gate)]
                    y = module.Layer(*weights)(placed(x, at_end))
                    expected = last.reference(first.reference(x) * torch.relu(gate.reference(x)))
                    found, allowed = error(y, expected), allowed_error(tokens, *weights, exact=3e-4)
                    assert found <= allowed, (kind, density, blocks, tokens, found)
                    protected.memory.clear()
    print("within bounds")


def touch(where):
    """Read the first byte of the page that nothing may touch."""
    at_end = where == "end"
    address = protected(100, at_end)
    ctypes.string_at(address + 99 if at_end else address, 1)
    print("the buffer itself is readable", flush=True)
    ctypes.string_at(address + 100 if at_end else address - 1, 1)
    print("and so is the page")


def count_threads():
    """How many threads the process has after an operation of torch on two, and after the kernels."""
    from sparse.kernels.cases import error, make

    from peft_pst.sparse.kernels.layer import Layer, machine_code

    torch.set_num_threads(2)
    weight, x = make(512, 512, 0.2), torch.randn(200, 512)
    layer = Layer(weight.pack())
    expected = weight.reference(x)
    machine_code()  # tqdm has a thread of its own
    torch.rand(2**20).add_(1)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        assert error(layer(x), expected) <= 1e-6
    print(before, len(os.listdir("/proc/self/task")))


def one_source():
    """Compile for products in fp16 too, compare with float64, and print what came of it. Few widths, for speed."""
    from peft_pst.sparse.kernels import target

    target.WIDTHS, target.WIDEST, target.HAS_HALF = (1, 32), 32, True
    from sparse.kernels.cases import error, make

    from peft_pst.sparse.kernels import layer as module
    from peft_pst.sparse.kernels.layout import Kind

    worker = module.machine_code().worker
    lines = worker._library.get_asm_str().splitlines()
    print("compiled", worker.cache_hits == 0, "lanes", target.LANES)
    print("zmm", any("%zmm" in line for line in lines))
    print("fma", any("vfmadd" in line and "%ymm" in line for line in lines))

    def check(y, expected, kind, tokens):
        low, high = (1e-5, 2e-3) if kind is Kind.FP16 and tokens > 1 else (0, 2e-6)
        assert low <= error(y, expected) <= high, (kind, tokens, error(y, expected))

    for kind in Kind:
        for blocks in (False, True):
            weight = make(205, 333, 0.3, kind, blocks)
            for tokens in (1, 3, 32, 33, 70):
                x = torch.randn(tokens, 333)
                check(module.Layer(weight.pack())(x), weight.reference(x), kind, tokens)
        first, gate, last = make(205, 333, 0.2, kind), make(205, 333, 0.2, kind, seed=1), make(90, 205, 0.3, kind)
        for tokens in (1, 3, 40):
            x = torch.randn(tokens, 333) / 4
            hidden = first.reference(x) * torch.nn.functional.gelu(gate.reference(x))
            y = module.Layer(last.pack(), first.pack(), gate.pack(), "gelu")(x)
            check(y, last.reference(hidden), kind, tokens)
    for density in (0.2, 0.1, 0.05):
        for out, size in ((3072, 768), (768, 3072)):
            weight, x = make(out, size, density, Kind.FP16), torch.randn(32, size)
            check(module.Layer(weight.pack())(x), weight.reference(x), Kind.FP16, 32)
    print("right")


def edited(*names):
    """Whether what was compiled is found, and after which edits of a file it is not."""
    from numba.core.ccallback import CFunc

    from peft_pst.sparse.kernels import worker

    class CompilesError(Exception):
        pass

    def compile_anew(self):
        raise CompilesError

    CFunc._compile_uncached = compile_anew
    print("found", worker.compile_worker().cache_hits)
    read_bytes = Path.read_bytes
    for name in names:
        Path.read_bytes = lambda path, name=name: read_bytes(path) + (b"\n" if path.name == name else b"")
        try:
            worker.compile_worker()
        except CompilesError:
            print(name)


def without_a_cache():
    """Compute where numba finds no folder that it can write to."""
    import warnings

    from numba.core.caching import CacheImpl
    from sparse.kernels.cases import allowed_error, error, make

    from peft_pst.sparse.kernels import layer
    from peft_pst.sparse.kernels.layout import Kind

    CacheImpl._locator_classes = []
    weight, x = make(48, 64, 0.3, Kind.FP32), torch.randn(3, 64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = layer.Layer(weight.pack())(x)
    assert error(y, weight.reference(x)) < allowed_error(3)
    print([str(one.message).split(" name")[0][-15:] for one in said])


def without_fp16():
    """Make all fp16 of a processor that has no instruction for it, and read every number."""
    import numpy as np
    from numba import njit, types

    from peft_pst.sparse.kernels import emit, target, worker
    from peft_pst.sparse.kernels.layout import Kind

    @worker._machine(types.none, types.int64, types.int64)
    def widen(builder, source, where):
        halves = emit.load(builder, source, emit.ir.VectorType(emit.F16, target.LANES))
        emit.store(builder, emit.widen(builder, halves, Kind.FP16), where)

    @njit
    def widen_all(source, where, count):
        for i in range(0, count, target.LANES):
            widen(source + 2 * i, where + 4 * i)

    @njit
    def never_called(source, where):
        worker.store_half(where, np.float32(1))
        worker.halve_vector(source, where)
        worker.transpose_to_half(source, 64, where, 64)

    never_called.compile("(int64, int64)")
    halves = np.arange(2**16, dtype=np.uint16)
    y = np.zeros(2**16, np.float32)
    widen_all(halves.ctypes.data, y.ctypes.data, 2**16)
    expected = torch.from_numpy(halves.view(np.float16)).float().numpy()
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.isnan(y), ~numbers)
    assert np.array_equal(y.view(np.int32)[numbers], expected.view(np.int32)[numbers])
    print("lanes", target.LANES, "right")


if __name__ == "__main__":
    import_kernels_only()
    globals()[sys.argv[1]](*sys.argv[2:])
