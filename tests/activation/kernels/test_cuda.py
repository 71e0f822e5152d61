"""The kernels for CUDA on a CPU: Triton's interpreter against torch in float64, and its compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.processes import in_fork, in_fresh_process


def test_triton() -> None:
    """The kernel for CUDA, run by Triton's interpreter on a CPU: every base, dtype and view, against torch in float64."""
    pytest.importorskip("triton")
    code = """
        import torch
        from hf_lambda_gelu.activation.kernels import cuda, eager
        from hf_lambda_gelu.activation.bases import BASES

        def never(*_):
            raise AssertionError("the kernel waits for the device")

        torch.manual_seed(0)
        views = [((3000,), (1,)), ((70, 9), (9,)), ((130, 600), (600,)), ((2, 3, 5), (3, 1)), ((2, 3, 4100), (3, 1))]
        views += [((0,), ()), ((), ())]
        for dtype, unit in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
            for name, base in BASES.items():
                for shape, own in views if name == "gelu" else views[:2]:
                    x, grad = 3 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
                    hardness = 1 + 4 * torch.rand(own)
                    x.view(-1)[:1] = torch.finfo(dtype).max
                    torch.Tensor.item, kept = never, torch.Tensor.item
                    out = cuda.forward(x, hardness, name)
                    by_x, by_hardness = cuda.backward(grad, x, hardness, name)
                    torch.Tensor.item = kept
                    wide = [t.double() for t in (grad, x, hardness)]
                    exact_x, exact_hardness = eager.gradients(*wide, base)
                    for got, exact in ((out, eager.value(*wide[1:], base)), (by_x, exact_x)):
                        assert got.dtype is dtype and got.shape == x.shape
                        # a unit, not half of one: the interpreter cuts bfloat16 off where a device rounds
                        torch.testing.assert_close(got.double(), exact, rtol=unit, atol=unit)
                    assert by_hardness.dtype is torch.float32
                    torch.testing.assert_close(by_hardness.double(), exact_hardness, rtol=1e-5, atol=2e-5)
        nan = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
        for name in BASES:
            nan_value, largest, least, zero = cuda.forward(nan, torch.tensor(2.0), name).tolist()
            assert nan_value != nan_value and (largest, least, zero) == (float("inf"), 0.0, 0.0), name
        x, grad, one = torch.randn(5000), torch.randn(5000), torch.tensor(3.0)
        first, second = (cuda.backward(grad, x, one, "gelu")[1] for _ in range(2))
        assert torch.equal(first, second)
    """
    in_fresh_process(code, TRITON_INTERPRET="1")


def test_triton_for_a_device() -> None:
    """Triton's own compiler, which needs no device, takes every kernel to machine code; loads are 16 bytes wide."""
    pytest.importorskip("triton", minversion="3.3")  # whose compiler takes constants under another name
    code = """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from hf_lambda_gelu.activation.kernels import cuda_programs

        kernels = ["forward_runs", "backward_runs", "forward_columns", "backward_columns", "sum_runs", "sum_columns"]
        sizes = {"BASE": 0, "WIDTH": 512, "ROWS": 8}
        for name in kernels:
            kernel = getattr(cuda_programs, name)
            types = {"hardness_ptr": "*fp32", "sum_ptr": "*fp32"}
            types |= dict.fromkeys(("outer", "channels", "inner", "shares"), "i32")
            names = kernel.arg_names
            signature = {n: "constexpr" if n in sizes else types.get(n, "*bf16") for n in names}
            # what the launcher finds out by itself: addresses and sizes that 16 divides
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in sizes}
            constants = {n: v for n, v in sizes.items() if n in names}
            if name.endswith("_runs"):
                constants["WIDTH"] = 4096
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
            built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
            assert built.asm["cubin"]
            print(name, "ld.global.v4.b32" in built.asm["ptx"])
    """
    done = in_fork(code)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[:4] == [f"{name} True" for name in ("forward_runs", "backward_runs", "forward_columns", "backward_columns")]
    assert len(lines) == 6


class Recorder:
    """In the place of the programs: which are launched, over what grid."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Recorder:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.grids.append(grid)


@pytest.mark.parametrize(
    ("shape", "own"),
    [((2**31 + 5000,), (1,)), ((2**23, 300), (300,)), ((3, 2**20, 64, 64), (2**20, 1, 1)), ((2**22, 3, 200), (3, 1))],
    ids=str,
)
def test_grids_of_large_tensors(shape: tuple[int, ...], own: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes 2³¹ − 1 programs along the first axis of a grid and 65,535 along the others; nothing is run here."""
    pytest.importorskip("triton")
    from hf_lambda_gelu.activation.kernels import cuda

    recorder = Recorder()
    monkeypatch.setattr(cuda, "programs", recorder, raising=False)
    x, hardness = torch.empty(shape, device="meta", dtype=torch.bfloat16), torch.empty(own, device="meta")
    cuda.forward(x, hardness, "gelu")
    cuda.backward(x, x, hardness, "gelu")
    assert len(recorder.grids) == 3
    assert all(len(grid) == 1 and 0 < grid[0] < 2**31 for grid in recorder.grids), recorder.grids
