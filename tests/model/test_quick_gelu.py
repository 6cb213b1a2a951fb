"""GELU equals its formula, forward and backward, and saves only its input."""

import importlib.util
import logging
from types import ModuleType

import pytest
import torch
from torch import Tensor

from igpt_ray.model import quick_gelu as module
from igpt_ray.model.quick_gelu import quick_gelu


def formula(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def inputs(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values of both tails and of the middle, and a gradient."""
    x, grad = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, 8 * x, torch.tensor([0.0, -0.0, 100.0, -100.0])])
    return x.to(dtype), torch.cat([grad, grad, torch.ones(4)]).to(dtype)


def exact(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64, by autograd of the formula."""
    x = x.double().requires_grad_()
    y = formula(x)
    y.backward(grad.double())
    assert x.grad is not None
    return y.detach(), x.grad


def test_gradients_equal_finite_differences() -> None:
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick_gelu, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_computes_the_bits_of_autograd(dtype: torch.dtype) -> None:
    """A run of an earlier version continues with the same bits."""
    value, grad = inputs(1000, dtype)
    results = []
    for f in (quick_gelu, formula):
        x = value.clone().requires_grad_()
        y = f(x)
        y.backward(grad)
        results.append((y, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(x, value)


def test_only_the_input_is_saved() -> None:
    saved = []
    x = torch.randn(5, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda _: None):
        quick_gelu(x)
    assert saved == [x.data_ptr()]


def test_gradients_may_be_expanded_and_inputs_strided() -> None:
    """`sum` has a gradient of stride 0."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).T.requires_grad_()
    quick_gelu(x).sum().backward()
    torch.testing.assert_close(x.grad, exact(x.detach(), torch.ones(4, 6))[1].float())


# ------------------------------------------------------------------------------------------------ Triton


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels, run by Triton's interpreter on the CPU: a second copy of the module."""
    pytest.importorskip("triton", reason="the Triton kernels of GELU need the package triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is decorated
    spec = importlib.util.find_spec("igpt_ray.model.quick_gelu_triton")
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    return kernels


TOLERANCES = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2**-7, 1e-6), torch.float16: (2**-10, 1e-6)}
"""Relative and absolute."""


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", [1, 1024, 1500])
def test_triton_kernels_equal_float64(interpreted: ModuleType, dtype: torch.dtype, n: int) -> None:
    """Also at the end of a block that is not full."""
    x, grad = inputs(n, dtype)
    rtol, atol = TOLERANCES[dtype]
    y, gradient = exact(x, grad)
    torch.testing.assert_close(interpreted.forward(x).double(), y, rtol=rtol, atol=atol)
    torch.testing.assert_close(interpreted.backward(x, grad).double(), gradient, rtol=rtol, atol=4 * rtol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
def test_a_gpu_equals_float64(dtype: torch.dtype) -> None:
    """With Triton's kernels, which must have been built, and with torch's operators in float64."""
    assert module.triton_kernels() is not None
    value, grad = inputs(100_000, dtype)
    rtol, atol = TOLERANCES.get(dtype, (1e-12, 1e-12))
    expected, gradient = exact(value, grad)
    x = value.detach().cuda().requires_grad_()
    y = quick_gelu(x)
    y.backward(grad.cuda())
    assert y.dtype == dtype
    assert x.grad is not None
    torch.testing.assert_close(y.double().cpu(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(x.grad.double().cpu(), gradient, rtol=rtol, atol=4 * rtol)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_machine_without_kernels_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    module.triton_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert module.triton_kernels() is None
        assert module.triton_kernels() is None
    assert [record.message[:26] for record in caplog.records] == ["GELU runs without Triton, "]
