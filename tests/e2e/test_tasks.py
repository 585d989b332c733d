"""The evaluation harness's questions, answered as a plain loop over transformers answers them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbit
from fewbit.errors import FewbitError
from fewbit.runtime.engine import LanguageModel
from fewbit.tasks import Scorer, rolling, run_tasks
from tests.conftest import write_folder

SHOTS = "Q: two and two?\nA: four\n\n" * 6


@dataclass
class Asked:
    """What the harness hands over."""

    args: tuple[Any, ...]


class Plain:
    """Every request alone, the whole text at once, through transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = fewbit.load(folder, exact=True, context=8).tokenizer

    @torch.inference_mode()
    def logs(self, ids: list[int]) -> torch.Tensor:
        found: torch.Tensor = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return found

    def after(self, ids: list[int], scored: int) -> tuple[float, bool]:
        logs, value, greedy = self.logs(ids[:-1]), 0.0, True
        for i in range(len(ids) - scored, len(ids)):
            value += float(logs[i - 1, ids[i]])
            greedy &= int(logs[i - 1].argmax()) == ids[i]
        return value, greedy

    def pair(self, context: str, continuation: str) -> tuple[float, bool]:
        # spaces between the two belong to the second, as the harness has it
        before = self.tokenizer.encode(context.rstrip(), bos=False) or [256]
        after = self.tokenizer.encode(context[len(context.rstrip()) :] + continuation, bos=False)
        return self.after(before + after, len(after))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "m", dtype="float32")


def scorer(folder: Path, **settings: Any) -> Scorer:
    return Scorer(fewbit.load(folder, exact=True, **settings))


def ask(*pairs: tuple[Any, ...]) -> list[Asked]:
    return [Asked(pair) for pair in pairs]


def counted(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each step that the model runs."""
    steps: list[int] = []
    forward = model.forward

    def counting(asked: Any, wanted: Any = None) -> torch.Tensor:
        steps.append(sum(len(new) for _, new in asked))
        return forward(asked, wanted)

    monkeypatch.setattr(model, "forward", counting)
    return steps


def test_likelihoods_equal_a_plain_loop(folder: Path) -> None:
    plain = Plain(folder)
    pairs = [(f"{SHOTS}Q: {q}?\nA:", a) for q in ("one", "ten") for a in (" x", " yes", " a long answer", " y")]
    pairs += [("", "a text alone"), ("ends with spaces  ", "word"), (" ", "b"), ("c" * 700, "d" * 30), ("ü…", "漢字")]
    pairs += [(f"{SHOTS}Q: one?\nA:", " yes")]
    found = scorer(folder).loglikelihood(ask(*pairs))
    expected = [plain.pair(*pair) for pair in pairs]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-3)


def test_a_continuation_that_is_the_likeliest_is_said_to_be(folder: Path) -> None:
    plain, text = Plain(folder), None
    for start in range(33, 127):
        best = int(plain.logs([start])[-1].argmax())
        if best < 256 and "\ufffd" not in plain.tokenizer.decode([best]) and plain.tokenizer.decode([best]).strip():
            text = (plain.tokenizer.decode([start]), plain.tokenizer.decode([best]))
            if len(plain.tokenizer.encode(text[0] + text[1])) == 2:
                break
    assert text is not None
    other = "!" if text[1] != "!" else "?"
    after = int(plain.logs(plain.tokenizer.encode("".join(text)))[-1].argmax())
    unlikely = next(c for c in "xyz" if plain.tokenizer.encode(c) != [after])
    found = scorer(folder).loglikelihood(ask(text, (text[0], other), (text[0], text[1] + unlikely)))
    assert [greedy for _, greedy in found] == [True, False, False]


def test_what_requests_share_is_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(*((f"{SHOTS}Q: {q}?\nA:", f" {a}") for q in ("one", "ten", "six") for a in "abcd"))
    ours = scorer(folder)
    steps = counted(ours.model, monkeypatch)
    shared = ours.loglikelihood(asked)
    whole = sum(len(ours.tokenizer.encode("".join(request.args))) for request in asked)
    assert sum(steps) < whole / 5
    # each alone, on a model that has cached nothing of it
    alone = [scorer(folder).loglikelihood([request])[0] for request in asked]
    assert [v for v, _ in shared] == pytest.approx([v for v, _ in alone], abs=1e-3)


def test_answers_of_one_token_share_a_single_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = scorer(folder)
    steps = counted(ours.model, monkeypatch)
    found = ours.loglikelihood(ask(*(("Answer:", letter) for letter in "ABCD")))
    assert len(steps) == 1
    plain = Plain(folder)
    assert [v for v, _ in found] == pytest.approx([plain.pair("Answer:", a)[0] for a in "ABCD"], abs=1e-3)


def test_a_context_too_long_loses_its_beginning(folder: Path) -> None:
    context, answer = "".join(chr(97 + i % 26) for i in range(100)), " end"
    value, _ = scorer(folder, context=40).loglikelihood(ask((context, answer)))[0]
    plain = Plain(folder)
    ids = plain.tokenizer.encode(context + answer)[-41:]
    assert value == pytest.approx(plain.after(ids, 4)[0], abs=1e-3)
    with pytest.raises(FewbitError, match="does not fit the context"):
        scorer(folder, context=40).loglikelihood(ask(("a", "b" * 41)))


def test_an_answer_that_merges_with_its_context_is_scored(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["vocab"]["ab"] = 258
    settings["model"]["merges"] = [["a", "b"]]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    plain = Plain(folder)
    encode = plain.tokenizer.encode
    assert len(encode("x a")) == len(encode("x ab")) == 3
    found = scorer(folder).loglikelihood(ask(("x a", "b"), ("a", "b"), ("x a", "bc"), ("x a", "")))
    # at least one token, which is then seen behind another
    expected = [plain.after(ids, 1) for ids in (encode("x ab"), [256, *encode("ab")], encode("x abc"))]
    assert [value for value, _ in found[:3]] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found[:3]] == [greedy for _, greedy in expected]
    assert all(value < -0.01 for value, _ in found[:3])
    assert found[3] == (0.0, True)


def test_a_continuation_without_tokens_is_an_error(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(FewbitError, match="no tokens"):
        scorer(folder).loglikelihood(ask(("", "~~")))


@pytest.mark.parametrize(("prompt", "wanted", "kept", "room"), [(200, 256, 30, 10), (10, 256, 10, 30), (200, 5, 35, 5)])
def test_a_long_answer_leaves_most_of_the_question(
    folder: Path, monkeypatch: pytest.MonkeyPatch, prompt: int, wanted: int, kept: int, room: int
) -> None:
    ours, seen = scorer(folder, context=40), []
    generate = ours.model.generate

    def watched(ids: list[int], **settings: Any) -> Any:
        seen.append((ids, settings["max_tokens"]))
        return generate(ids, **settings)

    monkeypatch.setattr(ours.model, "generate", watched)
    text = (SHOTS * 2)[:prompt]
    ours.generate_until([Asked((text, {"max_gen_toks": wanted}))])
    assert seen == [(ours.tokenizer.encode(text)[-kept:], room)]


def test_nothing_to_score_is_certain(folder: Path) -> None:
    assert scorer(folder).loglikelihood(ask(("abc", ""), ("", ""))) == [(0.0, True), (0.0, True)]


def test_texts_are_scored_in_windows(folder: Path) -> None:
    texts = ["short", "".join(chr(97 + i * i % 26) for i in range(100)), ""]
    found = scorer(folder, context=32).loglikelihood_rolling([Asked((text,)) for text in texts])
    plain = Plain(folder)
    ids = [256, *plain.tokenizer.encode(texts[1])]
    # 100 tokens: three windows of 32 new ones, then the last 4 after 28 they have been seen with
    expected = sum(plain.after(ids[start : start + 33], 32)[0] for start in (0, 32, 64))
    expected += plain.after(ids[-33:], 4)[0]
    assert found == pytest.approx([plain.after([256, *plain.tokenizer.encode("short")], 5)[0], expected, 0], abs=2e-3)


@given(n=st.integers(1, 200), context=st.integers(1, 50))
def test_windows_predict_every_token_once_in_sight_of_what_fits(n: int, context: int) -> None:
    ids, predicted = list(range(n)), []
    for window, scored in rolling(ids, context):
        assert 1 <= scored < len(window) <= context + 1
        assert window == ids[window[0] : window[0] + len(window)]
        predicted += window[-scored:]
        assert len(window) == min(context + 1, window[-1] + 1)
    assert predicted == ids[1:]


def test_answers_equal_transformers_and_end_at_a_stop(folder: Path) -> None:
    plain, prompts = Plain(folder), ["Q: one?", "Q: two?", "something else", SHOTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([plain.tokenizer.encode(prompt)])
        out = plain.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected.append(plain.tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    ours = scorer(folder)
    asked = [Asked((prompt, {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False})) for prompt in prompts]
    assert ours.generate_until(asked) == expected
    stop = next(text for text in expected if len(text) > 4)
    cut = ours.generate_until([Asked((prompts[expected.index(stop)], {"until": stop[3:5], "max_new_tokens": 12}))])
    assert cut == [stop[: stop.index(stop[3:5])]]
    # a context that leaves no room for the answer loses its beginning
    assert len(scorer(folder, context=20).generate_until([Asked((SHOTS, {"max_gen_toks": 8}))])) == 1


def test_sampling_is_only_done_where_it_is_asked_for(folder: Path) -> None:
    ours = scorer(folder)
    greedy, cold, hot, again = ours.generate_until(
        [
            Asked(("abc", {"max_gen_toks": 20} | more))
            for more in ({}, {"do_sample": False, "temperature": 2.0}, *[{"do_sample": True, "temperature": 2.0}] * 2)
        ]
    )
    assert greedy == cold != hot == again


def test_a_model_without_a_first_token_says_so(folder: Path) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        settings = json.loads((folder / name).read_text())
        kept = {k: v for k, v in settings.items() if not k.startswith(("bos_", "eos_"))}
        (folder / name).write_text(json.dumps(kept))
    with pytest.raises(FewbitError, match="no token to begin"):
        scorer(folder).loglikelihood(ask(("", "abc")))


def test_broken_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_folder(tmp_path / "n")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, path / "model.safetensors")
    with pytest.raises(FewbitError, match="not a number"):
        scorer(path).loglikelihood(ask(("abc", "def")))


def test_without_the_harness_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(FewbitError, match=r"lm-eval") as caught:
        run_tasks(folder, ["arc_easy"])
    assert "fewbit[tasks]" in caught.value.next_step


@pytest.mark.parametrize(("names", "limit"), [([], None), (["arc_easy"], 0)])
def test_questions_that_make_no_sense(folder: Path, names: list[str], limit: int | None) -> None:
    with pytest.raises(FewbitError):
        run_tasks(folder, names, limit=limit)


QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "made of wood", "a"], "answer": 0},
    {"question": "Two and two make", "choices": ["five", "four", "b"], "answer": 1},
    {"question": "Water is", "choices": ["dry", "wet", "c"], "answer": 2},
    {"question": "A dog", "choices": ["barks", "sings", "d"], "answer": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TEXTS = """
task: local_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
ANSWERS = """
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
# the harness and what it imports warn of their own
needs_harness = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """YAML files of three small tasks on one file of questions."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'fewbit[tasks]')")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    files = []
    for i, text in enumerate((CHOICE, TEXTS, ANSWERS)):
        file = tmp_path / f"task{i}.yaml"
        file.write_text(text.format(data=json.dumps(str(tmp_path / "questions.jsonl"))))
        files.append(str(file))
    return files


@needs_harness
def test_figures_of_the_harness(folder: Path, local: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int, str]] = []
    found = run_tasks(folder, local, exact=True, progress=lambda *note: told.append(note))
    plain = Plain(folder)
    right = 0
    for q in QUESTIONS:
        values = [plain.pair(str(q["question"]), f" {choice}")[0] for choice in q["choices"]]
        right += values.index(max(values)) == q["answer"]
    assert found["local_choice"]["acc"] == right / 4
    assert found["local_choice"]["acc_stderr"] >= 0
    loss, size = 0.0, 0
    for q in QUESTIONS:
        ids = plain.tokenizer.encode(str(q["question"]))
        loss -= plain.after([256, *ids], len(ids))[0]
        size += len(str(q["question"]).encode())
    assert found["local_texts"]["byte_perplexity"] == pytest.approx(float(torch.tensor(loss / size).exp()), rel=1e-4)
    assert found["local_answers"]["exact_match"] == 0
    assert all(isinstance(v, float) for figures in found.values() for v in figures.values())
    assert {text for _, _, text in told} >= {"scoring answers", "scoring texts", "answering"}
    assert capsys.readouterr().out == ""


@needs_harness
def test_a_limit_and_a_group(folder: Path, local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    found = run_tasks(folder, local[:1], limit=1, exact=True)
    assert found["local_choice"]["acc"] in (0, 1)
    (tmp_path / "group.yaml").write_text("group: both\ntask: [local_choice, local_answers]\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("fewbit.tasks._harness", lambda **_: (evaluator, manager))
    found = run_tasks(folder, ["both"], limit=2, exact=True)
    assert {"local_choice", "local_answers"} <= found.keys()
    with pytest.raises(FewbitError, match="'local_choise'") as caught:
        run_tasks(folder, ["local_choise"])
    assert "local_choice" in caught.value.facts


@needs_harness
def test_missing_files_and_missing_data(folder: Path, local: list[str], tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match="no task"):
        run_tasks(folder, [str(tmp_path / "nowhere.yaml")])
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(FewbitError, match="can't be loaded"):
        run_tasks(folder, local[:1])
