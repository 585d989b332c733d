"""A block at a time equals transformers' hidden states, and what calibration collects equals hooks on transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit import passes
from fewbit.blocks import FloatBlock, FloatLinear, embed, fast_product
from fewbit.checkpoint import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.passes import collect, propagate
from fewbit.source import Source, open_source
from tests.conftest import CONFIG, random_weights, write_folder
from tests.models.test_llama import CONFIGS

CPU = torch.device("cpu")
LENGTH = 24
WINDOWS = torch.randint(256, (5, LENGTH), generator=torch.Generator().manual_seed(1))


def written(tmp_path: Path, **changes: Any) -> Path:
    config = CONFIG | {"dtype": "float32", "num_hidden_layers": 3} | changes
    return write_folder(tmp_path / "m", random_weights(config, torch.float32), **config)


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def block(source: Source, index: int, **options: Any) -> FloatBlock:
    return FloatBlock(source, index, LENGTH, CPU, **options)


def seen_by(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Inputs [tokens, in] of every linear of the blocks, by name."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:

            def keep(module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = args[0].flatten(0, 1)

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.inference_mode():
        model(windows)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_chain_of_blocks_equals_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = written(tmp_path, **changes)
    with torch.inference_mode():
        output = transformers_model(folder).model(WINDOWS, output_hidden_states=True)
    source = open_source(folder)
    hidden = torch.cat(list(embed(source, WINDOWS, slice_windows=2)))
    assert torch.equal(hidden, output.hidden_states[0])
    for i in range(2):
        propagate(block(source, i), hidden)
        torch.testing.assert_close(hidden, output.hidden_states[i + 1], rtol=1e-4, atol=1e-4)
    propagate(block(source, 2), hidden)
    norm = source.read("model.norm.weight").parts["weight"]
    last = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], norm, CONFIG["rms_norm_eps"])
    torch.testing.assert_close(last, output.last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_hessians_equal_a_sum_over_hooked_inputs(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # batches of two windows, the last of one
    monkeypatch.setattr(passes, "BATCH_TOKENS", 2 * LENGTH)
    folder = written(tmp_path, **changes)
    inputs = seen_by(transformers_model(folder), WINDOWS)
    source = open_source(folder)
    hidden = torch.cat(list(embed(source, WINDOWS)))
    for i in range(3):
        part = block(source, i)
        found = collect(part, hidden, None)
        names = [linear.names for linear in part.linears]
        # tensors that share an input share one product and one Hessian
        assert [len(n) for n in names] == [3, 1, 2, 1]
        for linear, stats in zip(part.linears, found, strict=True):
            assert set(stats) == {"hessian"}
            for name in linear.names:
                x = inputs[name].double()
                expected = (x.t() @ x / len(x)).float()
                torch.testing.assert_close(stats["hessian"], expected, rtol=1e-4, atol=1e-5)
        propagate(part, hidden)


def test_a_quantized_prefix_is_what_later_blocks_see(tmp_path: Path) -> None:
    folder = written(tmp_path)
    out = tmp_path / "q"
    fewbit.quantize(folder, out, method="rtn", format="int3g32", head="16bit")
    source, checkpoint = open_source(folder), open_checkpoint(out)
    # what the file holds, put into the model of transformers
    model = transformers_model(folder)
    ours = model.state_dict()
    original = seen_by(model, WINDOWS)
    for w in source.weights:
        if w.block == 0 or w.role == "embedding":
            ours[w.name].copy_(parse(checkpoint.spec(w.name)).dequantize(checkpoint.read(w.name)))
    drifted = seen_by(model, WINDOWS)

    hidden = torch.cat(list(embed(source, WINDOWS, read=checkpoint.read)))
    reference = torch.cat(list(embed(source, WINDOWS)))
    propagate(block(source, 0, read=checkpoint.read), hidden)
    propagate(block(source, 0), reference)
    part = block(source, 1)
    for linear, stats in zip(part.linears, collect(part, hidden, reference), strict=True):
        x, y = drifted[linear.names[0]].double(), original[linear.names[0]].double()
        torch.testing.assert_close(stats["hessian"], (x.t() @ x / len(x)).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats["cross"], (y.t() @ x / len(x)).float(), rtol=1e-4, atol=1e-5)
        # the test would not see a transposed or a swapped pair otherwise
        assert not torch.allclose(stats["cross"], stats["cross"].t(), rtol=1e-2, atol=1e-3)
        assert not torch.allclose(stats["cross"], stats["hessian"], rtol=1e-2, atol=1e-3)


def test_windows_know_nothing_of_each_other(tmp_path: Path) -> None:
    part = block(open_source(written(tmp_path)), 0)
    x = torch.randn(3, LENGTH, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(2))
    whole = part(x)
    for i in range(3):
        torch.testing.assert_close(part(x[i : i + 1])[0], whole[i])
    # nor a token of those that follow it
    changed = x.clone()
    changed[:, LENGTH // 2 :] = 0
    torch.testing.assert_close(part(changed)[:, : LENGTH // 2], whole[:, : LENGTH // 2])


def test_gradients_reach_every_weight(tmp_path: Path) -> None:
    part = block(open_source(written(tmp_path)), 0)
    x = torch.randn(2, LENGTH, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(2))
    for linear in part.linears:
        linear.weight = linear.weight.clone().requires_grad_(True)
    part(x).square().mean().backward()
    step = 1e-2
    for linear in part.linears:
        gradient = linear.weight.grad
        assert gradient is not None
        place = divmod(int(gradient.abs().argmax()), gradient.shape[1])
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                linear.weight[place] += sign * step
                losses.append(float(part(x).double().square().mean()))
                linear.weight[place] -= sign * step
        assert float(gradient[place]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.05)


def test_watchers_are_shown_inputs_and_go_away(tmp_path: Path) -> None:
    part = block(open_source(written(tmp_path)), 0)
    shown: list[tuple[FloatLinear, Tensor]] = []
    given: list[Tensor] = []
    x = torch.zeros(1, LENGTH, CONFIG["hidden_size"])

    def watch(linear: FloatLinear, seen: Tensor) -> None:
        shown.append((linear, seen))

    with part.watched(watch, lambda _, y: given.append(y)):
        part(x)
    assert [linear for linear, _ in shown] == part.linears
    for (linear, seen), y in zip(shown, given, strict=True):
        assert seen.shape == (LENGTH, linear.weight.shape[1])
        torch.testing.assert_close(y, seen @ linear.weight.t())
    part(x)
    assert len(shown) == 4
    with pytest.raises(ZeroDivisionError), part.watched(watch):
        raise ZeroDivisionError
    part(x)
    assert len(shown) == 4


def test_a_faster_product_is_near_the_definition(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path / "m"))
    x = torch.randn(2, LENGTH, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(2))
    exact = block(source, 0)(x)
    near = block(source, 0, product=torch.bfloat16)(x)
    assert near.dtype == torch.float32
    assert float((near - exact).norm() / (exact - x).norm()) < 0.01
    assert not torch.equal(near, exact)
    wide, narrow = (collect(block(source, 0, product=p), x, None) for p in (torch.float32, torch.bfloat16))
    for a, b in zip(wide, narrow, strict=True):
        assert b["hessian"].dtype == torch.float32
        assert float((a["hessian"] - b["hessian"]).norm() / a["hessian"].norm()) < 0.01
        assert not torch.equal(a["hessian"], b["hessian"])
    # a model made in float32 is calibrated in float32, whatever the processor can do
    assert fast_product(open_source(written(tmp_path / "wide")), CPU) == torch.float32


def test_attention_runs_in_the_products_type_but_for_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's fast kernels take 16 bits only; their gradients differ from run to run."""
    source, seen = open_source(write_folder(tmp_path / "m")), list[torch.dtype]()
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(q: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(q.dtype)
        return real(q, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    x = torch.randn(1, LENGTH, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        block(source, 0)(x)
        block(source, 0, product=torch.bfloat16)(x)
    block(source, 0, product=torch.bfloat16)(x.requires_grad_()).sum().backward()
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_said(tmp_path: Path, value: float) -> None:
    part = block(open_source(written(tmp_path)), 1)
    hidden = torch.zeros(3, LENGTH, CONFIG["hidden_size"])
    hidden[2, 5, 7] = value
    with pytest.raises(FewbitError, match="NaN or infinity in block 1") as caught:
        propagate(part, hidden.clone())
    assert "in the windows from" in caught.value.facts
    with pytest.raises(FewbitError, match="NaN or infinity in block 1") as caught:
        collect(part, hidden, None)
    assert "self_attn.q_proj" in caught.value.facts
