"""Kernels for sparse weights on a CPU, in machine code that Numba makes at first use: the extra `cpu`.

`layout.py` packs a weight; `emit.py` and `activations.py` emit the inner loops, for the processor that `target.py`
finds; `worker.py` is what a thread does with them, on the records of `program.py`; `threads.py` runs it on torch's
threads; `layer.py` is what the rest of the library calls. Nothing here is imported without Numba.
"""
