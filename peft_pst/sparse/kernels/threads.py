"""Running a C callback on the threads that torch already has."""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch


def run(callback: ctypes._CFuncPtr, program: int, threads: int) -> None:
    """Call it with the address of a program, on so many threads of torch's OpenMP at once; returns when all are done.

    They are the threads that torch's own operations use, so the two never compete for the cores.
    """
    parallel = _openmp()
    if parallel is None:
        callback(program)
    else:
        parallel(callback, program, threads, 0)


@functools.cache
def _openmp() -> ctypes._CFuncPtr | None:
    """The entry point by which gcc's and LLVM's OpenMP start a parallel region, in the library that torch loaded."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        library = Path(torch.__file__).parent / "lib" / name
        if library.exists():
            try:
                parallel = ctypes.CDLL(str(library)).GOMP_parallel
            except AttributeError:
                break
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
            return parallel
    warnings.warn(
        "This build of torch has no OpenMP that the sparse kernels can use, so they run on one thread: install torch "
        "from PyPI to use more.",
        stacklevel=2,
    )
    return None
