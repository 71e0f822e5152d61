"""λ-GELU on numbers and tensors that are none of the usual: NaN, inf, other devices, dtypes, layouts and shapes."""

from __future__ import annotations

import pytest
import torch
from support.references import each_base

import hf_lambda_gelu as hlg

# sign, quiet or signalling, and mantissas that carry over when they are rounded to bf16
NANS = (0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0xFF800001, 0x7FFF8000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ONES = torch.ones(3, 4)


def of_bits(bits: int) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)


@each_base
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_nan_stays_nan(base: str, dtype: torch.dtype, kernels: str) -> None:
    """A NaN λ spoils everything, whatever its bits; a NaN x its own element, and λ's gradient."""
    before = hlg.set_kernels(kernels)
    try:
        for bits in NANS:
            for size, many in ((1, False), (64, False), (1000, False), (1000, True)):
                hardness = of_bits(bits).repeat(size if many else 1).requires_grad_()
                x = torch.linspace(-4, 4, size).to(dtype).requires_grad_()
                out = hlg.lambda_gelu(x, hardness, base)
                out.sum().backward()
                assert out.isnan().all()
                assert x.grad.isnan().all()
                assert hardness.grad.isnan().all()
            x = torch.cat([of_bits(bits), torch.ones(63)]).to(dtype).requires_grad_()
            hardness = torch.tensor([2.0], requires_grad=True)
            out = hlg.lambda_gelu(x, hardness, base)
            out.sum().backward()
            assert out.isnan().tolist() == x.grad.isnan().tolist() == [True] + [False] * 63
            assert hardness.grad.isnan().all()
    finally:
        hlg.set_kernels(before)


@each_base
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_infinite_hardness_is_relu(base: str, dtype: torch.dtype, kernels: str) -> None:
    """At 0 too, where inf · 0 would be NaN; and λ gets no gradient there."""
    before = hlg.set_kernels(kernels)
    try:
        x = torch.tensor([-3.0, -1e-3, 0.0, 1e-3, 2.0], dtype=dtype, requires_grad=True)
        for size in (1, 5):
            hardness = torch.full((size,), torch.inf, requires_grad=True)
            out = hlg.lambda_gelu(x, hardness, base)
            grad_x, grad_hardness = torch.autograd.grad(out.sum(), (x, hardness))
            assert torch.equal(out, x.detach().relu())
            assert grad_x.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
            assert not grad_hardness.any()
    finally:
        hlg.set_kernels(before)


@pytest.mark.parametrize(
    "hardness", [torch.ones(1, device="meta"), torch.ones((), device="meta"), torch.ones(4, device="meta")]
)
def test_values_never_come_from_the_meta_device(hardness: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"hardness is on device 'meta', x is on device 'cpu'"):
        hlg.lambda_gelu(ONES, hardness)
    with pytest.raises(ValueError, match=r"hardness is on device 'cpu', x is on device 'meta'"):
        hlg.lambda_gelu(ONES.to("meta"), torch.ones(1))
    assert hlg.lambda_gelu(ONES.to("meta"), hardness).is_meta  # both there: shapes are inferred


def test_a_module_on_the_meta_device_says_so() -> None:
    with pytest.raises(ValueError, match="load the weights"):
        hlg.LambdaGELU().to("meta")(torch.full((1000,), 5.0))


@pytest.mark.filterwarnings("ignore")  # torch on what its sparse, nested and quantised tensors will become
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: ONES.to(torch.float8_e4m3fn), r"torch.float8_e4m3fn: convert it with .float\(\) first"),
        (lambda: ONES.to(torch.float8_e5m2), "torch.float8_e5m2"),
        (lambda: ONES.to_sparse(), r"torch.sparse_coo: call .to_dense\(\) first"),
        (lambda: ONES.to_sparse_csr(), "torch.sparse_csr"),
        (lambda: ONES.to_mkldnn(), "torch._mkldnn"),
        (lambda: torch.nested.nested_tensor([ONES, ONES[:2]], layout=torch.jagged), "torch.float32 in a nested tensor"),
        (lambda: torch.nested.nested_tensor([ONES, ONES[:2]]), "torch.float32 in a nested tensor"),
        (lambda: torch.quantize_per_tensor(ONES, 0.1, 0, torch.quint8), r"torch.quint8: call .dequantize\(\) first"),
        (lambda: ONES.to(torch.complex128), "torch.complex128: take its real part"),
        (lambda: ONES.int(), "torch.int32"),
        (lambda: ONES > 0, "torch.bool"),
    ],
)
def test_other_tensors(make, got: str) -> None:  # type: ignore[no-untyped-def]
    """As x and as λ."""
    with pytest.raises(TypeError, match=f"expects a floating point tensor, got .*{got}"):
        hlg.lambda_gelu(make(), 2.0)
    with pytest.raises(TypeError, match=f"expects hardness as a number or a floating point tensor, got .*{got}"):
        hlg.lambda_gelu(ONES, make())


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 1, 4), (4, 1), (2, 3, 4)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hardness of shape .* does not broadcast to x of shape \(3, 4\)"):
        hlg.lambda_gelu(ONES, torch.ones(shape))


def test_no_neurons_need_no_hardness() -> None:
    assert hlg.lambda_gelu(torch.ones(3, 0), torch.ones(0)).shape == (3, 0)


@pytest.mark.parametrize("hardness", ["2", None, [1.0, 2.0], 1j])
def test_what_is_no_number(hardness: object) -> None:
    with pytest.raises(TypeError, match=f"hardness must be a number.*got {type(hardness).__name__}"):
        hlg.lambda_gelu(ONES, hardness)
    with pytest.raises(TypeError, match="hardness must be a number"):
        hlg.LambdaGELU(hardness)


def test_transforms_see_the_same_checks() -> None:
    batched = torch.func.vmap(lambda x, hardness: hlg.lambda_gelu(x, hardness))
    assert batched(ONES, torch.full((3,), torch.nan)).isnan().all()
    with pytest.raises(ValueError, match="on device 'meta'"):
        torch.func.grad(lambda x: hlg.lambda_gelu(x, torch.ones(1, device="meta")).sum())(ONES)
    with pytest.raises(TypeError, match=r"got torch.int64"):
        torch.func.vmap(lambda x: hlg.lambda_gelu(x, 2.0))(ONES.long())
