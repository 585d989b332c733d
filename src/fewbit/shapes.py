"""Shapes of well-known models, as their own config.json say: nothing of them but numbers."""

from __future__ import annotations

from typing import Any

Shape = dict[str, Any]


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _decoder(model_type: str, *sizes: float, **more: Any) -> Shape:
    """SIZES in their order, without the last where it is 1e-5."""
    found = dict(zip(SIZES, (*sizes, 1e-5), strict=False))
    return {"model_type": model_type, "dtype": "bfloat16"} | found | more


def _llama(*sizes: int, **more: Any) -> Shape:
    return _decoder("llama", *sizes, **more)


def _stretched(factor: float) -> Shape:
    return {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def _qwen2(*sizes: int, tied: bool = False) -> Shape:
    return _decoder("qwen2", *sizes, 32768, 1e-6, rope_theta=1e6, tie_word_embeddings=tied)


def _qwen3(*sizes: int, tied: bool = False) -> Shape:
    return _decoder("qwen3", *sizes, 151936, 40960, 1e-6, head_dim=128, rope_theta=1e6, tie_word_embeddings=tied)


def _gemma2(*sizes: int, scalar: int, head: int = 256) -> Shape:
    return _decoder(
        "gemma2", *sizes, 256000, 8192, 1e-6, head_dim=head, query_pre_attn_scalar=scalar, sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    )  # fmt: skip


def _gemma3(*sizes: int, vocab: int = 262208, scalar: int = 256, head: int = 256, **more: Any) -> Shape:
    return _decoder(
        "gemma3_text", *sizes, vocab, more.pop("context", 131072), 1e-6, head_dim=head, query_pre_attn_scalar=scalar,
        hidden_activation="gelu_pytorch_tanh", rope_theta=1e6, rope_local_base_freq=1e4, tie_word_embeddings=True,
        **{"sliding_window": 1024} | more,
    )  # fmt: skip


_BY_8: Shape = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_TIED: Shape = {"tie_word_embeddings": True}

SHAPES: dict[str, Shape] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192, rope_theta=500000.0),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, 131072, **_stretched(8.0)),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256, 131072, **_stretched(8.0)),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, **_TIED, **_stretched(32.0)),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, **_TIED, **_stretched(32.0)),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, rope_theta=100000.0, **_TIED),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, 8192, rope_theta=130000.0, **_TIED),
    "smollm3-3b": _decoder("smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, 1e-6, rope_theta=5e6, **_TIED),
    "mistral-7b": _decoder("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, rope_theta=1e6, sliding_window=None),
    "mixtral-8x7b": _decoder(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, 32768, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "qwen3-30b-a3b": _decoder(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 40960, 1e-6, head_dim=128, rope_theta=1e6, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4, scalar=256),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8, scalar=256),
    "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, scalar=144, head=128),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, vocab=262144, context=32768, sliding_window=512),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, **_BY_8),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, **_BY_8),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, scalar=168, head=128, **_BY_8),
    "phi-3-mini": _decoder(
        "phi3", 3072, 8192, 32, 32, 32, 32064, 4096, sliding_window=2047, original_max_position_embeddings=4096
    ),
    "phi-4": _decoder("phi3", 5120, 17920, 40, 40, 10, 100352, 16384, rope_theta=250000.0),
    "olmo-2-7b": _decoder("olmo2", 4096, 11008, 32, 32, 32, 100352, 4096, 1e-6, rope_theta=500000.0),
}  # fmt: skip
