"""Chat templates, configs and tokenizer files that attack or are broken: bounded work, errors in three parts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.checkpoint import _folder
from fewbit.checkpoint._safetensors import Shards
from fewbit.errors import FewbitError
from fewbit.models import llama
from fewbit.rotary import RopeArgs
from fewbit.source import open_source
from fewbit.tokenizer.chat_template import ChatTemplate
from tests.conftest import CONFIG

USER = [{"role": "user", "content": "x" * 2000}]
NS = "{% set ns = namespace(x='ab', n=2, l=[1]) %}"


def looped(body: str, times: int = 40) -> str:
    return NS + "{% for i in range(" + str(times) + ") %}" + body + "{% endfor %}"


COSTLY = {
    "doubled by ~": looped("{% set ns.x = ns.x ~ ns.x %}"),
    "doubled by +": looped("{% set ns.x = ns.x + ns.x %}"),
    "doubled by a block": looped("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "doubled by join": looped("{% set ns.x = [ns.x, ns.x]|join %}"),
    "doubled by a method": looped("{% set ns.x = ns.x.replace('a', 'aa').replace('b', 'bb') %}"),
    "doubled by %": looped("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "squared": looped("{% set ns.n = ns.n * ns.n %}"),
    "subtracted up": looped("{% set ns.n = ns.n - (0 - ns.n) %}", 1_000_000),
    "nested lists": looped("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
    "nested tuples compared": looped("{% set ns.l = (ns.l, ns.l) %}") + "{{ ns.l == ns.l }}",
    "nested dicts by call": looped("{% set ns.l = dict(a=ns.l, b=ns.l) %}") + "{{ ns.l|tojson }}",
    "nested namespaces": looped("{% set ns.l = namespace(a=ns.l, b=ns.l) %}") + "{{ ns.l }}",
    "added lists": looped("{% set ns.l = ns.l + ns.l %}"),
    "many large texts": looped("{% set ns.l = ns.l + ['a' * 1000000 ~ i] %}", 1000),
    "a list of one text": "{% set l = ['a' * 10000000] * 1000 %}{{ l }}",
    "center": "{{ 'a'|center(8000000000) }}",
    "method center": "{{ 'a'.center(8000000000) }}",
    "method ljust": "{{ 'a'.ljust(8000000000) }}",
    "method zfill": "{{ 'a'['zfill'](8000000000) }}",
    "map to a method": "{{ ['{:>1000000000}']|map(attribute='format')|first }}{{ ('a'|attr('center'))(8000000000) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "filter format": "{{ '%1000000000d'|format(1) }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% with a star": "{{ '%*d' % (1000000000, 1) }}",
    "% with a precision": "{{ '%.1000000000f' % 1 }}",
    "expandtabs": "{{ '\\t'.expandtabs(8000000000) }}",
    "to_bytes": "{{ (1).to_bytes(8000000000, 'big') }}",
    "indent": "{{ 'a\\nb'|indent(8000000000) }}",
    "indent of tojson": "{{ [[1]]|tojson(indent=8000000000) }}",
    "batch": "{{ [1]|batch(8000000000, 0)|list }}",
    "round": "{{ 5|round(8000000000, 'ceil') }}{{ 5|round(0 - 8000000000) }}",
    "replace nothing": "{% set x = 'a' * 100000 %}{{ x|replace('', x) }}",
    "replace undefined": "{% set x = 'a' * 100000 %}{{ x|replace(nothing, x) }}",
    "method replace": "{% set x = 'a' * 100000 %}{{ x.replace('', x) }}",
    "join with a long glue": "{% set x = 'a' * 100000 %}{{ x|join(x) }}",
    "method join": "{% set x = 'a' * 100000 %}{{ x.join(x) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "cycler": "{{ cycler(1, 2).next() }}",
    "wide time": "{{ strftime_now('%1000000000Y') }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "range as a list": "{% for i in range(1000000) %}{{ range(1000000)|list|length }}{% endfor %}",
    "string loops": "{% set s = messages[0].content %}" + "{% for a in s %}" * 4 + "." + "{% endfor %}" * 4,
    "string loops, empty": "{% set s = messages[0].content %}" + "{% for a in s %}" * 4 + "{% endfor %}" * 4,
    "loops that choose nothing": "{% set s = messages[0].content %}"
    "{% for a in s %}{% for b in s %}{% for c in s if c == 'y' %}{% endfor %}{% endfor %}{% endfor %}",
    "long comparisons": "{% set a = 'a' * 8000000 ~ 'b' %}{% set b = 'a' * 8000000 ~ 'b' %}"
    "{% for i in range(1000000) %}{% if a == b and a in b %}{% endif %}{% endfor %}",
    "long slices": "{% set a = 'a' * 8000000 %}{% for i in range(100000) %}{% set b = a[1:] %}{% endfor %}",
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for i in 'ab' recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "filters in a loop": "{% for i in range(1000000) %}{% set l = range(2000)|map('string')|list %}{% endfor %}",
    "many blocks": "{% for i in range(1) %}" * 30 + "{% endfor %}" * 30,
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long source": "a" * 300_000,
}


@pytest.mark.parametrize("source", COSTLY.values(), ids=COSTLY.keys())
def test_templates_that_eat_time_or_memory_are_stopped(source: str) -> None:
    start = time.process_time()
    with pytest.raises(FewbitError, match="chat template") as caught:
        ChatTemplate(source).render(messages=USER)
    assert time.process_time() - start < 20
    assert len(str(caught.value)) < 2000
    # stopped by the sandbox, not by the machine
    assert "MemoryError" not in str(caught.value)


REAL = """{%- set ns = namespace(last=-1, system='') -%}
{%- macro block(role, text) -%}<|{{ role }}|>{{ text | trim }}<|end|>{%- endmacro -%}
{%- if messages[0]['role'] == 'system' %}{% set ns.system = messages[0].content %}{% set messages = messages[1:] %}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif -%}
{%- endfor -%}
{{ bos_token ~ 'Date: ' + strftime_now('%d %b %Y')|length|string }}
{%- for m in messages -%}
  {%- if m.role == 'skip' %}{% continue %}{% endif -%}
  {%- if m.role == 'stop' %}{% break %}{% endif -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
  {%- if loop.first %}[first {{ loop.length }} {{ loop.revindex }}]{% endif -%}
  {{ block(m['role'], m.content.split('</think>')[-1].lstrip('\\n')) }}
  {%- if m.tool_calls is defined and m.tool_calls %}{% for t in m.tool_calls %}{{ t.function | tojson }}{% endfor %}
  {%- endif -%}
  {%- if loop.last %}[last]{% endif -%}
{%- endfor -%}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }},
{{- messages | map(attribute='role') | join('/') }},
{%- for role, group in messages | groupby('role') %}{{ role }}{{ group | length }}{% endfor -%},
{%- for k, v in {'a': [1, 2]}.items() %}{{ k }}={{ v | tojson(indent=1) | replace('\\n', '') }}{% endfor -%},
{{- '%s-%02d' % ('x', 3) }},{{ ns.last }},{{ ns.system | upper | default('none', true) }}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_a_template_with_everything_real_ones_use_renders() -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "<think>a</think>\nyes", "tool_calls": [{"function": {"name": "ü<f>"}}]},
        {"role": "user", "content": "ok"},
    ]
    text = ChatTemplate(REAL).render(messages=messages, bos_token="<s>", add_generation_prompt=True)  # noqa: S106
    assert text == (
        "<s>Date: 11[first 3 3]<|user|>hi<|end|><|assistant|>yes<|end|>"
        '{"name": "ü<f>"}<|user|>ok<|end|>[last]2,user/assistant/user,assistant1user2,a=[ 1, 2],x-03,2,'
        "BE KIND<|assistant|>"
    )
    with pytest.raises(FewbitError, match="roles must alternate"):
        ChatTemplate(REAL).render(messages=messages[2:])


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(1000)]
    text = ChatTemplate(REAL).render(messages=messages, bos_token="", add_generation_prompt=True)
    assert text.count("<|end|>") == 1000


def test_a_template_renders_again_and_again() -> None:
    template = ChatTemplate("{% for i in range(100000) %}{% endfor %}{{ messages|length }}")
    assert {template.render(messages=USER) for _ in range(40)} == {"1"}


# Configs


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        *(({"rms_norm_eps": v}, "rms_norm_eps") for v in (None, "x", float("nan"), float("inf"), -1e-5, True, 10**400)),
        *(({"rope_theta": v, "rope_parameters": None}, "rope_theta") for v in ("x", 0, -1.0, None, [1])),
        ({"rope_parameters": [1]}, "rotary parameters"),
        ({"rope_parameters": "llama3"}, "rotary parameters"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "Rotary scaling"),
        *(({"rope_parameters": {"rope_type": "linear", "factor": v}}, "factor") for v in (0, None, "2", -2)),
        *(
            ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0} | odd}, next(iter(odd)))
            for odd in (
                {"original_max_position_embeddings": "a"},
                {"original_max_position_embeddings": 0},
                {"low_freq_factor": "a"},
                {"high_freq_factor": 1.0},
            )
        ),
        *(({key: 2**31 - 1}, key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")),
        ({"num_attention_heads": [4]}, "num_attention_heads"),
        ({"head_dim": 10**5000}, "head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": {"a": 1}}, "activation"),
    ],
)
def test_values_of_a_config_are_checked_before_use(changes: dict[str, Any], key: str) -> None:
    start = time.process_time()
    with pytest.raises(FewbitError, match=key) as caught:
        llama.weights(llama.args(CONFIG | changes))
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 600


def test_null_stands_for_the_default_where_configs_use_it() -> None:
    args = llama.args(CONFIG | {"head_dim": None, "rope_parameters": None, "num_key_value_heads": None})
    assert (args.head_dim, args.num_key_value_heads, args.rope) == (16, 4, RopeArgs(10000.0))


GGUF: dict[str, Any] = {
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 160,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.context_length": 64,
    "llama.vocab_size": 10,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope.freq_base": "x"},
        {"rope.freq_base": [1.0]},
        {"rope.scaling.type": "linear", "rope.scaling.factor": "x"},
        {"rope.scaling.type": ["linear"]},
        {"attention.head_count": [4, 4]},
        {"attention.layer_norm_rms_epsilon": "x"},
        {"block_count": "many"},
        {"rope.dimension_count": 1.5},
    ],
)
def test_metadata_of_a_gguf_file_is_checked(changes: dict[str, Any]) -> None:
    metadata = GGUF | {f"llama.{key}": value for key, value in changes.items()}
    with pytest.raises(FewbitError):
        llama.args(llama.gguf_config(metadata, set(), lambda _: torch.ones(8)))


@pytest.mark.parametrize(
    "factors", [torch.ones(8, 2), torch.ones(7), torch.zeros(8), torch.full((8,), float("nan")), torch.arange(1.0, 9)]
)
def test_rotary_factors_of_a_gguf_file_are_checked(factors: torch.Tensor) -> None:
    with pytest.raises(FewbitError, match="rotary"):
        llama.gguf_config(GGUF, {"rope_freqs.weight"}, lambda _: factors)


# Folders


def put(name: str, content: str | bytes | None) -> Callable[[Path], None]:
    """Write a file, or make a folder of its name."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def change(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | changes))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (put("chat_template.jinja", b"caf\xe9"), "not UTF-8"),
        (put("chat_template.jinja", None), "can't be read"),
        (put("tokenizer_config.json", None), "can't be read"),
        (put("generation_config.json", b"\xff"), "not UTF-8"),
        (change("tokenizer_config.json", bos_token=["a"]), "bos_token"),
        (change("tokenizer_config.json", eos_token={"content": 5}), "eos_token"),
        (change("tokenizer.json", added_tokens=5), "added_tokens"),
        (change("tokenizer.json", added_tokens=[5]), "added_tokens"),
        (change("tokenizer.json", added_tokens=[{"content": ["a"], "id": 1}]), "added_tokens"),
        (put("generation_config.json", '{"eos_token_id": "2"}'), "eos_token_id"),
        (put("generation_config.json", '{"eos_token_id": 99999999999999999999}'), "eos_token_id"),
        (put("model.safetensors.index.json", '{"weight_map": {"a": "a\\u0000b"}}'), "missing"),
        (put("model.safetensors", None), "can't be read|not a whole"),
    ],
)
def test_a_tokenizer_or_index_that_is_broken(tiny_folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(tiny_folder)
    with pytest.raises(FewbitError, match=words) as caught:
        fewbit.load(tiny_folder)
    assert all(caught.value.to_dict().values())


def test_the_tokenizer_is_read_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    true_read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, *a, **k: read.append(p.name) or true_read(p, *a, **k))
    _folder.tokenizer_data(tiny_folder)
    assert read.count("tokenizer.json") == 1


UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def rewrite(folder: Path, weights: dict[str, Any], specs: dict[str, Any]) -> None:
    """Replace tensors (None removes one) and entries of the noted specs."""
    file = folder / "model.safetensors"
    metadata = Shards([file]).metadata[file.name]
    facts = json.loads(metadata["fewbit"])
    tensors = {k: v for k, v in (load_file(file) | weights).items() if v is not None}
    save_file(tensors, file, metadata | {"fewbit": json.dumps(facts | {"specs": facts["specs"] | specs})})


@pytest.mark.parametrize(
    ("weights", "specs", "words"),
    [
        ({f"{UP}_shape": torch.tensor(5)}, {}, "does not fit together"),
        ({f"{UP}_shape": torch.tensor([160.0, 64.0])}, {}, "does not fit together"),
        ({f"{UP}_shape": torch.tensor([2**62, 2**62])}, {}, "does not fit together"),
        ({f"{UP}_packed": torch.tensor(5, dtype=torch.int32)}, {}, "does not fit together"),
        ({f"{UP}_scale": torch.tensor(5.0)}, {}, "does not fit together"),
        ({NORM: torch.ones(64, dtype=torch.int32)}, {NORM: "int4g64"}, "is stored as"),
        ({}, {UP: "f32"}, "not an integer one"),
        ({}, {UP: "gguf:q4_0"}, "not an integer one"),
        ({}, {UP: "junk"}, "not a format"),
        ({}, {UP: ["int4g64"]}, "not an integer one"),
        ({}, {UP: None}, "Nothing says"),
        ({UP: torch.ones(160, 64)}, {}, "stored twice"),
    ],
)
def test_packed_tensors_that_contradict_themselves(
    tiny_folder: Path, tmp_path: Path, weights: dict[str, Any], specs: dict[str, Any], words: str
) -> None:
    fewbit.quantize(tiny_folder, tmp_path / "q", format="int4g32")
    rewrite(tmp_path / "q", weights, specs)
    with pytest.raises(FewbitError, match=words):
        fewbit.load(tmp_path / "q")


@pytest.mark.parametrize(
    "groups",
    [
        {"a": 5},
        [1],
        {"a": {"targets": [5]}},
        {"a": {"targets": 5}},
        {"a": {"targets": ["Linear"], "weights": 5}},
        {"a": {"targets": ["Linear"], "weights": {"type": "int", "num_bits": [4], "strategy": {}}}},
        {"a": {"targets": ["re:("]}},
        {"a": {"targets": ["re:(a+)+$"]}},
        {"a": {"targets": ["re:" + "a?" * 2000]}},
        {"a": {"targets": ["re:[z-a]"]}},
    ],
)
def test_config_groups_that_are_broken(tiny_folder: Path, tmp_path: Path, groups: Any) -> None:
    fewbit.quantize(tiny_folder, tmp_path / "q", format="int4g32", head="16bit")
    file = tmp_path / "q" / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["config_groups"] = groups
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FewbitError):
        open_source(tmp_path / "q")


def test_a_weight_file_is_answered_with_its_folder(tiny_folder: Path) -> None:
    with pytest.raises(FewbitError) as caught:
        open_source(tiny_folder / "model.safetensors")
    assert repr(str(tiny_folder)) in caught.value.next_step
