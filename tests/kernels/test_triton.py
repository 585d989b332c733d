"""The Triton products against float64: by Triton's interpreter on a CPU, and as they are on a card."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit.formats import parse
from fewbit.kernels import triton
from fewbit.qtensor import QTensor

CASES = [
    *((f"int{bits}g32", 50, 200) for bits in range(2, 9)),
    *((spec, 70, 100) for spec in ("int3g64a", "int4g48", "int5a", "int8", "int4g16a")),
    *((spec, 33, 96) for spec in ("gguf:q4_0", "gguf:q4_1", "gguf:q8_0")),
    ("int4g128", 3, 700),
    ("int4", 1, 1),
]
TOKENS = [1, 4, 5, 40]


def errors(tensors: list[QTensor], device: torch.device) -> list[float]:
    """For each count of tokens the largest error, in units of what float32 lets expect."""
    backend = triton.Triton()
    # several slices
    triton.SLICE_WEIGHTS = 17 * tensors[0].shape[1]
    assert all(backend.refuses(q) is None for q in tensors)
    packed = backend.prepare([QTensor(q.spec, q.shape, {n: p.to(device) for n, p in q.parts.items()}) for q in tensors])
    w = torch.cat([parse(q.spec).dequantize(q) for q in tensors]).double()
    ids = torch.tensor([len(w) - 1, 0, len(w) // 2])
    assert torch.allclose(backend.rows(packed, ids.to(device)).cpu().double(), w[ids], rtol=1e-6)
    assert backend.rows(packed, torch.tensor([len(w), -1], device=device)).isnan().all()
    g, found = torch.Generator().manual_seed(0), []
    for tokens in TOKENS:
        x = torch.randn(tokens, w.shape[1], generator=g)
        y = backend.matmul(x.to(device), packed).cpu().double()
        assert y.shape == (tokens, len(w))
        # a sum's terms, each rounded; an offset and scale times code may cancel
        size = x.double().abs() @ torch.cat([_sizes(q) for q in tensors]).T
        found.append(float(((y - x.double() @ w.T).abs() / size).max()) / 1e-5)
    assert backend.matmul(torch.empty(0, w.shape[1], device=device), packed).shape == (0, len(w))
    return found


def _sizes(q: QTensor) -> torch.Tensor:
    a = parse(q.spec).affine(q)
    centre = float(a.zero or 0) if a.offset is None else 0.0
    scale = a.scale.double().abs().repeat_interleave(a.span, 1)[:, : q.shape[1]]
    if a.offset is None:
        return (a.codes.double() - centre).abs() * scale
    return a.codes.double() * scale + a.offset.double().abs().repeat_interleave(a.span, 1)[:, : q.shape[1]]


def test_products_by_the_interpreter(make_tensor, tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a card to run them as they are")
    stacks = [[make_tensor(*case)] for case in CASES]
    # matrices of several kinds in one stack
    stacks.append([make_tensor("int4g32", 20, 96), make_tensor("int3g32a", 37, 96), make_tensor("gguf:q4_1", 5, 96)])
    torch.save([[(q.spec, q.shape, q.parts) for q in stack] for stack in stacks], tmp_path / "stacks.pt")
    # the interpreter is chosen when triton is imported
    code = (
        f"import sys, json, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_triton as t\n"
        f"stacks = torch.load({str(tmp_path / 'stacks.pt')!r})\n"
        "print(json.dumps([t.errors([t.QTensor(*q) for q in stack], torch.device('cpu')) for stack in stacks]))"
    )
    home = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=home, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(stacks)
    for stack, worst in zip(stacks, found, strict=True):
        assert max(worst) <= 1, ([q.spec for q in stack], worst)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_products_on_a_card(case, make_tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA card")
    if triton.backend() is None:
        pytest.skip(triton.missing() or "the card is older than sm_80")
    assert max(errors([make_tensor(*case)], torch.device("cuda", torch.cuda.current_device()))) <= 1


def test_scattered_groups_are_refused(make_tensor) -> None:
    q = make_tensor("int4g32", 16, 64)
    scattered = QTensor(q.spec, q.shape, q.parts | {"g_idx": torch.arange(64, dtype=torch.int32) % 2})
    assert "neighbours" in (triton.Triton().refuses(scattered) or "")
