"""Tensors of every affine format with random codes, and the native backend put back as it was after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fewbit.formats import parse
from fewbit.formats._ggml_block import GgmlFormat
from fewbit.formats.integer import IntegerFormat
from fewbit.kernels import cpu
from fewbit.qtensor import QTensor

MakeTensor = Callable[..., QTensor]


def _integer(fmt: IntegerFormat, rows: int, columns: int, dtype: torch.dtype, g: torch.Generator) -> QTensor:
    codes = torch.randint(0, 2**fmt.bits, (rows, columns), generator=g, dtype=torch.uint8)
    shape = (rows, fmt.groups(columns))
    params = {"scale": (torch.rand(shape, generator=g) + 0.1).to(dtype)}
    if fmt.asymmetric:
        params["zero"] = torch.randint(0, 2**fmt.bits, shape, generator=g, dtype=torch.uint8)
    return fmt.pack(codes, params)


# where the halves of a block of ggml lie
HALVES = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    **dict.fromkeys(("iq4_nl", "iq4_xs"), (0,)),
    **dict.fromkeys(("iq1_m", "mxfp4", "nvfp4"), ()),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
GGML = [f"gguf:{name}" for name in HALVES]


def _ggml(spec: str, rows: int, columns: int, g: torch.Generator) -> QTensor:
    fmt, name = parse(spec), spec.removeprefix("gguf:")
    assert isinstance(fmt, GgmlFormat)
    blocks = torch.randint(0, 256, (rows, columns // fmt.block, fmt.block_bytes), generator=g, dtype=torch.uint8)
    for at in HALVES[name]:
        halves = (torch.rand(rows, blocks.shape[1], 1, generator=g) + 0.1).half()
        blocks[..., at : at + 2] = halves.view(torch.uint8)
    if name == "mxfp4":
        blocks[..., 0] = blocks[..., 0] % 8 + 122
    if name == "iq1_m":
        # the scale's four nibbles, lowest first: between 1/4 and 1
        blocks[..., 53] = blocks[..., 53] & 15 | 0x40
        blocks[..., 55] = blocks[..., 55] & 15 | 0x30
    return QTensor(spec, (rows, columns), {"blocks": blocks.reshape(rows, -1)})


def fitting(spec: str, columns: int) -> int:
    """The next number of columns that `spec` takes."""
    fmt = parse(spec)
    return columns + -columns % fmt.block if isinstance(fmt, GgmlFormat) else columns


@pytest.fixture
def make_tensor() -> MakeTensor:
    """make_tensor(spec, rows, columns, dtype=bfloat16): random codes, scales between 0.1 and 1.1."""

    def make(spec: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> QTensor:
        g = torch.Generator().manual_seed(rows * 1000 + columns)
        fmt = parse(spec)
        if isinstance(fmt, IntegerFormat):
            return _integer(fmt, rows, columns, dtype, g)
        if spec.startswith("gguf:"):
            return _ggml(spec, rows, columns, g)
        return fmt.pack(fmt.round(torch.randn(rows, columns, generator=g), {}), {})

    return make


@pytest.fixture
def native() -> Iterator[cpu.Cpu]:
    """The native backend; its threads and instruction set are put back afterwards."""
    backend = cpu.backend()
    if backend is None:
        pytest.skip("fewbit._cpu is not built")
    threads, isa = backend.threads, backend.isa
    yield backend
    backend.set_threads(threads)
    backend.set_isa(isa)


@pytest.fixture(params=["scalar", "avx2", "avx512vnni", "neon-dotprod", "neon-i8mm"])
def each_isa(request: pytest.FixtureRequest, native: cpu.Cpu) -> cpu.Cpu:
    """The native backend on one instruction set after the other."""
    if reason := native.instruction_sets()[request.param]:
        pytest.skip(reason)
    native.set_isa(request.param)
    assert native.isa == request.param
    return native


@pytest.fixture
def nan_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory from torch.empty holds NaN, so what a kernel leaves unwritten shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def random() -> Callable[..., Tensor]:
    """random(*shape, seed=0): normal float32 whose magnitude varies from row to row and column to column."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=g) * torch.rand(*shape, generator=g).mul(4).exp()

    return make
