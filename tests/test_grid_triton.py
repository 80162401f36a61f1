"""The CUDA kernels: under Triton's interpreter on any machine, on a GPU where there is one."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIZES = [(2, 3.0), (5, 1.0), (20, 3.0), (37, 3.0), (64, 10.0)]
FORMATS = (  # shape, memory format; 130 channels, last, are two groups; images of 128 places are whole tiles
    ((9, 4, 5, 7), torch.contiguous_format), ((9, 4, 5, 7), torch.channels_last), ((70, 2), torch.contiguous_format),
    ((2, 130, 1, 2), torch.channels_last), ((3, 2, 16, 16), torch.contiguous_format),
    ((0, 3, 2), torch.contiguous_format),
)  # fmt: skip
TYPES = (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)  # and tolerances


def drawn(shape, memory_format, dtype, scale):
    """x with the largest numbers of its type in it, and g; the format is kept by ``to``."""
    x, g = (scale * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    if x.numel():
        x.view(-1)[0], x.view(-1)[-1] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    return x.contiguous(memory_format=memory_format), g


def assert_near(got, wants, names, rtol, case):
    """Within rtol of the largest value; what is summed over images, in float32, within 1e-5."""
    for a, b, name in zip(got, wants, names, strict=True):
        top = max(b.abs().max().item(), 1e-3) if b.numel() else 1
        error = (a.cpu().double() - b).abs().max().item() if b.numel() else 0
        tolerance = (rtol if name in ("f", "dx") else 1e-5) * top
        assert a.shape == b.shape and error <= tolerance, (*case, name, error, top)


def check(device, sizes=SIZES, formats=FORMATS):
    """Forward and backward of the kernels against operations on whole tensors in float64."""
    from kafnb import KAF
    from kafnb.kaf import compiled, walk
    from kafnb.kaf import fused as grid_triton

    walk.EACH, walk.LEAST = 1, 8  # several programs of several tiles, the last of them not full
    for size, boundary in sizes:
        every = size == 20  # the interpreter is slow, and so is the compiler
        for shape, memory_format in formats if every or device == "cuda" else formats[1::2]:
            for dtype, rtol in TYPES if size in (20, 37) else TYPES[:1]:  # one centre, and several that add up
                torch.manual_seed(size)
                kaf = KAF(shape[1], size, boundary)
                x, g = drawn(shape, memory_format, dtype, boundary / 2)
                alpha = kaf.alpha.detach()
                x64, g64, a64 = x.double(), g.double(), alpha.double()
                want, slope = compiled.forward(x64, a64, kaf.grid)
                wants = want, g64 * slope, compiled.correlation(x64, g64, kaf.grid, torch.float64)
                x, g, alpha = (t.to(device) for t in (x, g, alpha))
                got = grid_triton.forward(x, alpha, kaf.grid), *grid_triton.gradients(g, x, alpha, kaf.grid)
                assert all(t.is_contiguous(memory_format=memory_format) for t in got[:2])
                assert_near(got, wants, ("f", "dx", "dalpha"), rtol, (size, shape, memory_format, dtype))
                far = (boundary + 30 * kaf.grid.spacing) * torch.ones_like(x).copysign(x)  # there all is nothing
                assert (grid_triton.forward(far, alpha * 1e30, kaf.grid) == 0).all()
                alone = grid_triton.gradients(g, x, alpha, kaf.grid, need_alpha=False)
                assert torch.equal(alone[0], got[1]) and alone[1] is None


FREE = list(zip([(20, False), (7, True), (37, False), (5, False), (3, False), (80, False)], FORMATS, strict=True))


def check_free(device, cases=FREE):
    """The same for any dictionary, one a channel or one for all."""
    from kafnb.kaf import free, fused_free, walk

    fused_free.FORWARD = fused_free.BACKWARD = walk.EACH = 1
    for i, ((size, shared), (shape, memory_format)) in enumerate(cases):
        every = device == "cuda" or size == 20  # the interpreter is slow: of the half types one a format
        for dtype, rtol in TYPES if every else (TYPES[0], TYPES[1 + i % 2]):
            torch.manual_seed(size)
            c, rows = shape[1], 1 if shared else shape[1]
            x, g = drawn(shape, memory_format, dtype, 3)
            tables = torch.randn(c, size), 3 * torch.randn(rows, size), 0.1 + torch.rand(rows)
            x64, g64, *t64 = (t.double() for t in (x, g, *tables))
            want, slope = free.forward(x64, *t64, True)
            sums = free.sums(x64, g64, *t64[1:])
            wants = want, g64 * slope, *free.of_parameters(sums, *t64), sums[0]
            x, g, *tables = (t.to(device) for t in (x, g, *tables))
            got = fused_free.forward(x, *tables), *fused_free.gradients(g, x, *tables)
            assert all(t.is_contiguous(memory_format=memory_format) for t in got[:2])
            got = *got, fused_free.correlation(x, g, *tables[1:])
            case = size, shape, memory_format, dtype
            assert_near(got, wants, ("f", "dx", "dalpha", "dd", "dgamma", "h"), rtol, case)
            assert fused_free.gradients(g, x, *tables, need_parameters=False)[1:] == (None, None, None)


def check_nan(device):
    """What is not a number stays none: a training that diverges must be seen."""
    from kafnb import KAF
    from kafnb.kaf import fused, fused_free

    kaf, none = KAF(4).to(device), torch.full((2, 4, 3), float("nan"), device=device)
    tables = kaf.alpha.detach(), kaf.dictionary.expand(4, -1), torch.ones(1, device=device)
    for kernels, described in ((fused, (tables[0], kaf.grid)), (fused_free, tables)):
        f, dx = kernels.forward(none, *described), kernels.gradients(torch.ones_like(none), none, *described)[0]
        assert f.isnan().all() and dx.isnan().all(), kernels.__name__


@pytest.mark.slow
@pytest.mark.parametrize("checked", ["check", "check_free", "check_nan"])
def test_interpreted(checked):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", f"import test_grid_triton; test_grid_triton.{checked}('cpu')"],
        cwd=os.path.dirname(__file__), env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_compiles_for_a_gpu_that_is_not_here(tmp_path):
    """Ahead of time for an H100: what the interpreter accepts the compiler may not; and no registers spill."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    from kafnb.kaf import fused, fused_free, walk

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    types = dict.fromkeys(("a_ptr", "w_ptr", "m_ptr", "h_ptr", "d_ptr", "exponents"), "*fp32")
    types |= dict.fromkeys(("x_ptr", "g_ptr", "f_ptr", "dx_ptr"), "*fp16")
    types |= dict.fromkeys(("k", "total"), "i32")
    types |= dict.fromkeys(("first", "spacing", "gamma", "kappa", "slope"), "fp32")
    types["root"], types["gammas"] = "fp32", "*fp32"
    needs = dict(C=16, L=1024, D=20, STEP=20, MIDDLE=10, WHOLE=True, ADD=False) | dict.fromkeys(
        ("NEED_X", "NEED_ALPHA", "NEED_SUMS"), True
    )
    last = dict(LAST=True, VECTOR=1, LANES=8, WIDTH=16), dict(LAST=False, VECTOR=8, LANES=128, WIDTH=1)
    kernels = [(m, k) for m in (fused, fused_free) for k in ("_forward_kernel", "_backward_kernel")]
    each = dict(zip(kernels, (walk.EACH, walk.EACH, fused_free.FORWARD, fused_free.BACKWARD), strict=True))
    for (module, name), layout in itertools.product(kernels, last):
        kernel, shape = getattr(module, name), needs | layout
        shape["ROWS"] = each[module, name] // layout["VECTOR"]
        names = kernel.arg_names
        source = compiler.ASTSource(
            fn=kernel,
            signature={n: types.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): v for n, v in shape.items() if n in names},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr")},
        )
        assembly = triton.compile(source, target=target).asm["ptx"]
        assert "ex2.approx" in assembly
        if layout["VECTOR"] > 1:  # 16 bytes at once
            assert "ld.global.v4.b32" in assembly and "st.global.v4.b32" in assembly
        (tmp_path / "kernel.ptx").write_text(assembly)
        command = [assembler, "-v", "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        assert " 0 bytes spill stores" in said, said
        registers = int(re.search(r"Used (\d+) registers", said)[1])
        assert registers <= 168, registers  # three programs fit on a processor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", FORMATS)  # one a test: what takes long is compiling, which several workers share
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu(size, form):
    check("cuda", [size], [form])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", FREE)
def test_free_on_a_gpu(case):
    check_free("cuda", [case])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nan_on_a_gpu():
    check_nan("cuda")
