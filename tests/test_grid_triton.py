"""The CUDA kernels: under Triton's interpreter on any machine, on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch

SIZES = [(2, 3.0), (5, 1.0), (20, 3.0), (37, 3.0), (64, 10.0)]


def check(device):
    """Forward and backward of the kernels against the eager evaluation in float64."""
    from kafnb import KAF
    from kafnb.kaf import eager as grid_eager
    from kafnb.kaf import fused as grid_triton

    grid_triton.BLOCK = 64  # several blocks, the last of them not full
    for size, boundary in SIZES:
        for shape in ((3, 4, 5, 7), (70, 2), (0, 3, 2)):
            for dtype, rtol in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
                torch.manual_seed(size)
                kaf = KAF(shape[1], size, boundary)
                x = (torch.randn(shape) * boundary / 2).to(dtype)
                g = torch.randn(shape).to(dtype)
                if x.numel():
                    x.view(-1)[0], x.view(-1)[-1] = torch.finfo(dtype).max, -torch.finfo(dtype).max
                alpha = kaf.alpha.detach()
                x64, g64, a64 = x.double(), g.double(), alpha.double()
                want, slope = grid_eager.forward(x64, a64, kaf.grid, True)
                wants = want, g64 * slope, grid_eager.correlation(x64, g64, kaf.grid, torch.float64)
                f = grid_triton.forward(x.to(device), alpha.to(device), kaf.grid)
                got = f, *grid_triton.gradients(g.to(device), x.to(device), alpha.to(device), kaf.grid)
                for a, b, name in zip(got, wants, ("f", "dx", "dalpha"), strict=True):
                    top = max(b.abs().max().item(), 1e-3) if b.numel() else 1
                    tolerance = (rtol if name != "dalpha" else 1e-5) * top
                    error = (a.cpu().double() - b).abs().max().item() if b.numel() else 0
                    assert a.shape == b.shape and error <= tolerance, (size, shape, dtype, name, error, top)


def test_interpreted():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", "import test_grid_triton; test_grid_triton.check('cpu')"],
        cwd=os.path.dirname(__file__), env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_compiles_for_a_gpu_that_is_not_here():
    """Ahead of time for an H100: what the interpreter accepts the compiler may not; and no registers spill."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    from kafnb.kaf import fused as grid_triton

    pointers = dict.fromkeys(("a_ptr", "m_ptr", "h_ptr", "centres"), "*fp32") | dict.fromkeys(
        ("middles", "sizes"), "*i64"
    )
    types = pointers | dict.fromkeys(("x_ptr", "g_ptr", "f_ptr", "dx_ptr"), "*fp16")
    types |= dict.fromkeys(("k", "middle", "groups", "total"), "i32")
    types |= dict.fromkeys(("gamma", "kappa", "centre", "slope_scale"), "fp32")
    constants = dict(C=16, L=1024, CHUNKS=1, GROUPS=8, BLOCK=128, NEED_X=True, NEED_ALPHA=True, ADD=False)
    for kernel in (grid_triton._forward_kernel, grid_triton._backward_kernel):
        names = kernel.arg_names
        source = compiler.ASTSource(
            fn=kernel,
            signature={n: types.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): v for n, v in constants.items() if n in names},
        )
        assembly = triton.compile(source, target=target).asm["ptx"]
        assert "ex2.approx" in assembly and ".local" not in assembly


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    check("cuda")
