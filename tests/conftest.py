"""Tiny random models that every test can have without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fewbit.models import find_model
from fewbit.runtime import placement
from fewbit.store import cache_dir

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "dtype": "bfloat16",
}


def byte_tokenizer() -> Tokenizer:
    """Every byte a token, and two special ones: no text is unknown to it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return tokenizer


def random_weights(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights of a config's model, scaled so that activations neither die nor grow."""
    module = find_model(config["model_type"])
    random = torch.Generator().manual_seed(seed)
    found = {}
    for w in module.weights(module.args(config)):
        noise = torch.randn(w.shape, generator=random)
        scale = 0.2 if w.role == "embedding" else w.shape[-1] ** -0.5
        found[w.name] = (1 + 0.1 * noise if w.role == "norm" else noise * scale).to(dtype)
    return found


def write_folder(path: Path, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A Hugging Face folder of a tiny random Llama; `changes` go into its config."""
    config = CONFIG | changes
    path.mkdir(parents=True)
    save_file(weights or random_weights(config), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test writes lands in the user's list of models or among the cached evaluations; fetched models are
    shared.
    """
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "fewbit").mkdir()
    (cache / "fewbit" / "models").symlink_to(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))


@pytest.fixture(autouse=True)
def _no_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's models and token are none of a test's business, and nothing is asked of the real hub: a test that
    wants one points at its own (`tests._hub`).
    """
    home = tmp_path_factory.mktemp("hub")
    # read when the library is first imported, which may have been long ago
    settings = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture(autouse=True)
def _models_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a card too, unless a test names it: results must not depend on the machine."""
    monkeypatch.setattr(placement, "_automatic", lambda *args: placement.place("cpu", *args))


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny random Llama with tied embeddings in bf16."""
    return write_folder(tmp_path / "tiny")
