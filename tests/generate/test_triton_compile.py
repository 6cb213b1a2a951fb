"""The Triton kernels compile for an H100, which needs no device: the interpreter accepts more than the compiler."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: the compilation of its kernels is not tested")

PROGRAM = """
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from igpt_ray.generate import triton_kernels, triton_linear, triton_sampler


def compile(kernel, types, default, **constants):
    signature = {name: types.get(name, default) for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))


for dtype, (width, padded), (splits, overlap) in product(
    ["*bf16", "*fp32"], [(64, 64), (96, 128)], [(1, True), (4, False)]
):
    parts = {"out": "*fp32", "statistics": "*fp32"} if splits > 1 else {}
    integers = dict.fromkeys(("cache_values", "q_slot", "k_slot", "v_slot"), "i32")
    shape = {"WIDTH": width, "PADDED": padded, "SPLITS": splits, "OVERLAP": overlap}
    compile(triton_kernels._attend_split, {"positions": "*i64", **integers, **parts}, dtype, POSITIONS=1024, **shape)
    if splits > 1:
        compile(triton_kernels._combine, {"parts": "*fp32", "statistics": "*fp32"}, dtype, **shape)
for dtype, weight, rows in [("*bf16", "*bf16", 1), ("*bf16", "*bf16", 32), ("*bf16", "*i8", 32), ("*fp32", "*fp32", 8)]:
    shape = {"INPUTS": 512, "ROWS": rows, "DOT": rows == 32, "BLOCK_OUT": 16, "BLOCK_IN": 256, "WIDEN": False}
    shape["OVERLAP"] = weight == "*bf16"
    flags = {"SCALE": weight == "*i8", "NORM": True, "RESIDUAL": True, "GELU": True}
    one = {"rows": 1} if rows == 1 else {}  # Triton makes an argument of 1 a constant
    types = {"weight": weight, "rows": "i32", "OUTPUTS": "i32", "eps": "fp32"}
    compile(triton_linear._linear, types, dtype, **shape, **flags, **one)
state = {"uniforms": "*fp64", "temperature": "*fp64", "prompt_mask": "*i1"}
state |= dict.fromkeys(("tokens", "positions", "active"), "*i64")
for dtype in ("*bf16", "*fp32"):
    compile(triton_sampler._sample, state, dtype, POSITIONS=1024, COLOURS=512, PADDED=512)
    compile(triton_sampler._embed, state, dtype, POSITIONS=1024, WIDTH=1536, PADDED=2048)
"""


@pytest.mark.slow
def test_the_kernels_compile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
