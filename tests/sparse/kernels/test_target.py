import platform
import re

import pytest

pytest.importorskip("numba", reason="the kernels need the extra peft-pst[cpu]")

import llvmlite.binding as llvm
from llvmlite import ir

from peft_pst.sparse.kernels import emit
from peft_pst.sparse.kernels.layer import machine_code
from peft_pst.sparse.kernels.layout import Kind

HOST = {name for name, has in llvm.get_host_cpu_features().items() if has}
X86 = platform.machine() in ("x86_64", "AMD64")
GENERIC = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+64bit,+sse2"}
HASWELL = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+64bit,+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,"
    "+sse4.1,+sse4.2,+ssse3",
}


def assembly(monkeypatch, triple, cpu, features, lanes, kind, width):
    """Of the loop over a segment, for a processor that need not be this one."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError as problem:
        pytest.skip(f"this LLVM makes no code for {triple}: {problem}")
    monkeypatch.setattr(emit, "LANES", lanes)
    monkeypatch.setattr(emit, "REGISTERS", 16 if lanes == 8 else 32)
    monkeypatch.setattr(emit, "HAS_HALF", "avx512fp16" in features)
    monkeypatch.setattr(emit, "FEATURES", frozenset(features))
    module = ir.Module()
    module.triple = triple
    emit.segment(module, kind, False, width).linkage = "external"
    machine = target.create_target_machine(cpu, ",".join(f"+{name}" for name in features), opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return machine.emit_assembly(parsed)


def test_fp16_of_avx512(monkeypatch):
    features = ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512fp16"]
    code = assembly(monkeypatch, "x86_64-linux-gnu", "sapphirerapids", features, 16, Kind.FP16, 32)
    products = re.findall(r"vfmadd\w+ph\s.*", code)
    assert len(products) >= 8 and all("%zmm" in product for product in products)
    assert "call" not in code and not re.search(r"vfmadd\w+ps", code)


@pytest.mark.parametrize("kind", [Kind.FP32, Kind.BF16, Kind.INT8, Kind.FP16])
def test_neon(kind, monkeypatch):
    code = assembly(monkeypatch, "aarch64-linux-gnu", "neoverse-n1", ["neon"], 4, kind, 16)
    assert len(re.findall(r"fmla\s+v\d+\.4s", code)) >= 8
    assert not re.search(r"\bbl\b", code) and "prfm" in code


@pytest.mark.parametrize("kind", [Kind.FP32, Kind.BF16, Kind.INT8, Kind.FP16])
def test_avx2(kind, monkeypatch):
    features = ["avx2", "fma", "f16c"]
    code = assembly(monkeypatch, "x86_64-linux-gnu", "haswell", features, 8, kind, 32)
    assert len(re.findall(r"vfmadd\w+ps.*%ymm", code)) >= 8
    assert "call" not in code and "zmm" not in code
    inner = [block for block in re.split(r"^\.L\w+:", code, flags=re.M) if "vfmadd" in block]
    assert inner and not any(re.search(r"\(%rsp\), %ymm|%ymm\d+, .*\(%rsp\)", block) for block in inner)  # no spills


@pytest.mark.skipif(not X86 or not {"avx2", "fma", "f16c"} <= HOST, reason="this processor cannot run AVX2")
def test_avx2_runs(alone, tmp_path):
    """With products in fp16, as of AVX512-FP16: each goes by way of fp32 and is rounded."""
    done = alone("one_source", **HASWELL, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.stdout.split("\n")[:4] == ["compiled True lanes 8", "zmm False", "fma True", "right"]
    assert "Compiling the sparse CPU kernels" in done.stderr


@pytest.mark.skipif(not X86, reason="for x86")
def test_a_processor_without_fp16(alone, tmp_path):
    """LLVM would leave its conversions to functions that do not exist, and end the process."""
    done = alone("without_fp16", **GENERIC, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.stdout == "lanes 4 right\n"


def test_cache(alone):
    """What this process compiled or found another one finds, without a word, but not after an edit of any file."""
    machine_code()
    files = ["emit.py", "activations.py", "layout.py", "program.py", "target.py"]  # numba looks at worker.py
    done = alone("edited", *files)
    assert done.stdout.split("\n")[:-1] == ["found 1", *files] and "Compiling" not in done.stderr


def test_where_no_cache_can_be_written(alone):
    assert alone("without_a_cache").stdout == "['NUMBA_CACHE_DIR']\n"
