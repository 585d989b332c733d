"""Whether the tests of the methods notice errors: each known way to get a method wrong must turn one of them red.

    python benchmarks/mutations.py [--only WORD] [--list]

Every mutation replaces one piece of source text in a copy of the package that lies in a temporary folder, and runs the
tests of that method on the copy. Prints a table; exits with 1 where a mutation stays green, no longer fits the source,
or breaks the tests otherwise than by a failed one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "gptq": "tests/pure/test_gptq.py",
    "_second_order": "tests/pure/test_gptq.py",
    "_refine": "tests/pure/test_refine.py",
    "awq": "tests/pure/test_awq.py",
    "tuned": "tests/pure/test_tuned.py",
    "calibrated": "tests/pure/test_awq.py tests/models/test_sensitivity.py",
    "sensitivity": "tests/models/test_sensitivity.py",
    "llama": "tests/pure/test_awq.py",
}
TIMEOUT_S = 600.0
# an editable install answers imports before the path is looked at: its finders are taken away, and what was imported
# is checked to be the copy
START = """
import sys
from pathlib import Path
copy = Path(sys.argv.pop(1))
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__.lower()]
sys.path.insert(0, str(copy))
import fewbit
if not Path(fewbit.__file__).resolve().is_relative_to(copy.resolve()):
    sys.exit(f"fewbit was imported from {fewbit.__file__}, not from the copy")
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Mutation:
    """`old`, which must occur exactly once in the file (below src/fewbit), becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    @property
    def tests(self) -> str:
        """The test file that must notice."""
        return TESTS[Path(self.file).stem]


GPTQ, ORDER, REFINE = "methods/gptq.py", "methods/_second_order.py", "methods/_refine.py"
AWQ, TUNED, BLOCK = "methods/awq.py", "methods/tuned.py", "calibrated.py"
SENSITIVITY = "sensitivity.py"
_SQUARES = "            found.append(torch.stack([g.square().mean(1) for g in squares]).cpu())\n"
_BACK = "            gradient[part] = back.to(gradient)\n"
_SWAPPED = (_SQUARES + _BACK, _BACK + _SQUARES)
MUTATIONS = [
    Mutation(
        "statistics: true and own inputs exchanged",
        BLOCK,
        "(y_in * weigh).to(products[i]), weighted)",
        "weighted, (y_in * weigh).to(products[i]))",
    ),
    Mutation(
        "statistics: the Hessian of the true inputs", BLOCK, "weighted = (x_in * weigh)", "weighted = (y_in * weigh)"
    ),
    Mutation("statistics: only the upper half", BLOCK, "upper + upper.triu(1).t()", "upper"),
    Mutation("statistics: the diagonal twice", BLOCK, "upper + upper.triu(1).t()", "upper + upper.t()"),
    Mutation("statistics: strips start a column late", BLOCK, "range(0, columns, strip)", "range(1, columns, strip)"),
    Mutation("statistics: sums, not means", BLOCK, "total /= tokens", "total /= 1"),
    Mutation(
        "gptq: errors reach one column late",
        GPTQ,
        't["free"][:, j:] -= error @ t["factor"][i:j, j:]',
        't["free"][:, j + 1 :] -= error @ t["factor"][i:j, j + 1 :]',
    ),
    Mutation(
        "gptq: errors passed on twice",
        GPTQ,
        't["free"][:, j:] -= error @ t["factor"][i:j, j:]',
        't["free"][:, j:] -= 2 * error @ t["factor"][i:j, j:]',
    ),
    Mutation("gptq: no update within a block", GPTQ, 't["free"][:, j:] -= error @ t["factor"][i:j, j:]', "pass"),
    Mutation("gptq: no update of later blocks", GPTQ, "free[:, stop:] -= errors @ factor[start:stop, stop:]", "pass"),
    Mutation(
        "gptq: later blocks' update from the wrong rows",
        GPTQ,
        "free[:, stop:] -= errors @ factor[start:stop, stop:]",
        "free[:, stop:] -= errors @ factor[: stop - start, stop:]",
    ),
    Mutation(
        "gptq: the factor transposed",
        GPTQ,
        "inner = factor[start:stop, start:stop]",
        "inner = factor.t()[start:stop, start:stop]",
    ),
    Mutation("gptq: errors added", GPTQ, 't["free"][:, j:] -= error @', 't["free"][:, j:] += error @'),
    Mutation("gptq: errors not divided by the diagonal", GPTQ, "return difference / corner", "return difference"),
    Mutation("gptq: the codes stay in the loop's order", GPTQ, "back[:, order] = codes", "back.copy_(codes)"),
    Mutation("gptq: the order applied instead of undone", GPTQ, "back[:, order] = codes", "back = codes[:, order]"),
    Mutation(
        "gptq: the Hessian in the stored order",
        GPTQ,
        "inverse_factor(hessian, target.note, order)",
        "inverse_factor(hessian, target.note)",
    ),
    Mutation(
        "second order: only the Hessian's rows in order",
        ORDER,
        "hessian[order[start : start + STRIP]][:, order]",
        "hessian[order[start : start + STRIP]]",
    ),
    Mutation("gptq: the weights in the stored order", GPTQ, "column_major(w[:, order])", "column_major(w)"),
    Mutation(
        "gptq: the scales in the stored order", GPTQ, "fmt.at(params, order)", "fmt.at(params, order.sort().values)"
    ),
    Mutation(
        "gptq: the least active column first", GPTQ, "descending=True, stable=True", "descending=False, stable=True"
    ),
    Mutation("gptq: scales fitted without the inputs", GPTQ, "fmt.fit(w, importance(hessian), ", "fmt.fit(w, None, "),
    Mutation("gptq: the drift forgotten", GPTQ, 'if "cross" in stats:', 'if "crossing" in stats:'),
    Mutation("gptq: no refinement", GPTQ, "ROUNDS = (0, 0, 2, 4)", "ROUNDS = (0, 0, 0, 0)"),
    Mutation("second order: the lower factor", ORDER, "_inverted(lower).flip(0, 1)", "_inverted(lower)"),
    Mutation("second order: the Hessian's factor, not its inverse's", ORDER, "_inverted(lower)", "lower"),
    Mutation("second order: columns not in reverse", ORDER, "order.flip(0)", "order"),
    Mutation("second order: blocks below not turned", ORDER, "@ below) @ -inverse", "@ below) @ inverse"),
    Mutation(
        "second order: damping one column on",
        ORDER,
        "torch.where(diagonal <= 0, mean, damp * mean)",
        "torch.where(diagonal <= 0, mean, damp * mean).roll(1)",
    ),
    Mutation("second order: whole rows damped", ORDER, "diagonal += torch.where(", "h += torch.where("),
    Mutation(
        "second order: dead columns damped like others",
        ORDER,
        "torch.where(diagonal <= 0, mean, damp * mean)",
        "damp * mean",
    ),
    Mutation("second order: damping that doesn't grow", ORDER, "damp *= 10", "damp *= 1"),
    Mutation("second order: a silent fallback", ORDER, "if damp != DAMP:", "if damp < DAMP:"),
    Mutation(
        "second order: the drift transposed", ORDER, "(w @ (cross - hessian)).t()", "(w @ (cross.t() - hessian)).t()"
    ),
    Mutation("second order: the drift's sign", ORDER, "w + change", "w - change"),
    Mutation("refine: no update within a block", REFINE, 't["pull"] += move @ t["h"][i : i + 1]', "pass"),
    Mutation("refine: no update of later blocks", REFINE, 'pull += part["moves"] @ h[start:stop]', "pass"),
    Mutation(
        "refine: later blocks' update from the wrong rows",
        REFINE,
        'part["moves"] @ h[start:stop]',
        'part["moves"] @ h[: stop - start]',
    ),
    Mutation("refine: the wrong diagonal", REFINE, '/ t["h"][i, i]', '/ t["h"][0, 0]'),
    Mutation("refine: uphill", REFINE, 'best = old - t["pull"]', 'best = old + t["pull"]'),
    Mutation("refine: the Hessian in the stored order", REFINE, "h = hessian[order][:, order]", "h = hessian"),
    Mutation("refine: codes not put back in order", REFINE, "back[:, order] = found", "back.copy_(found)"),
    Mutation(
        "refine: other scales' moves unseen", REFINE, "pull += (levels * move[:, None]) @ hessian[columns]", "pass"
    ),
    Mutation(
        "refine: a group's own diagonal only",
        REFINE,
        "((levels @ hessian[columns, columns]) * levels)",
        "(levels * hessian.diagonal()[columns] * levels)",
    ),
    Mutation(
        "refine: a worse stored scale taken", REFINE, "torch.where(gain < 0, move, torch.zeros_like(move))", "move"
    ),
    Mutation("awq: readers divided as well", AWQ, "w *= applied", "w /= applied"),
    Mutation(
        "awq: the search divides the weights",
        AWQ,
        "scaled = w if s is None else w * s",
        "scaled = w if s is None else w / s",
    ),
    Mutation(
        "awq: the search forgets to scale back", AWQ, "(rounded if s is None else rounded / s) - w", "rounded - w"
    ),
    Mutation("awq: the ratio of largest error", AWQ, "if error < least:", "if error > least:"),
    Mutation("awq: the mean square instead of its root", AWQ, ".log().mean().exp()).sqrt()", ".log().mean().exp())"),
    Mutation("awq: half of the ratios", AWQ, "range(1, RATIOS)", "range(1, RATIOS // 2)"),
    Mutation(
        "awq: only the first of the readers is searched",
        AWQ,
        "for w in feed.linears:\n        scaled",
        "for w in feed.linears[:1]:\n        scaled",
    ),
    Mutation("awq: factors asked for, not those applied", AWQ, "w *= applied", "w *= best"),
    Mutation("awq: statistics scaled on one side", AWQ, "(applied[:, None] * applied)", "applied"),
    Mutation("awq: statistics left as they were", AWQ, 'for name in ("hessian", "cross"):', "for name in ():"),
    Mutation("awq: scales searched without the inputs", AWQ, 'importance(stats["hessian"])', "None"),
    Mutation(
        "awq: a norm's rounding not made good", BLOCK, "torch.where(kept == 0, torch.ones_like(norm), norm / kept)", "s"
    ),
    Mutation("awq: a norm multiplied", BLOCK, "smaller = (norm / s)", "smaller = (norm * s)"),
    Mutation(
        "awq: heads that share a channel scaled apart",
        BLOCK,
        "return (total / count.clamp(min=1)).exp()[channel]",
        "return s",
    ),
    Mutation("awq: a bias forgotten", BLOCK, "found.append(linear.bias[rows])", "pass"),
    Mutation(
        "awq: the wrong rows of a stack",
        BLOCK,
        "first = sum(linear.splits[:at])",
        "first = sum(linear.splits[: at - 1])",
    ),
    Mutation(
        "awq: value heads taken in turn",
        "models/llama.py",
        "torch.arange(heads) // (heads // kv)",
        "torch.arange(heads) % kv",
    ),
    Mutation(
        "tuned: rounding stops gradients",
        TUNED,
        "self.level + (self.level.detach().round() - self.level.detach())",
        "self.level.round()",
    ),
    Mutation(
        "tuned: the forward pass doesn't round",
        TUNED,
        "self.level + (self.level.detach().round() - self.level.detach())",
        "self.level",
    ),
    Mutation(
        "tuned: no clipping", TUNED, "rounded.clamp(self.low, self.high) * self._spread", "rounded * self._spread"
    ),
    Mutation(
        "tuned: scales don't move",
        TUNED,
        "* self._spread(self.base * (1 + self.change))",
        "* self._spread(self.base + 0 * self.change)",
    ),
    Mutation(
        "tuned: scales stored as they were",
        TUNED,
        "with_scale(self.params, self.base * (1 + self.change))",
        "with_scale(self.params, self.base)",
    ),
    Mutation("tuned: levels stored by truncation", TUNED, "levels = self.level.round()", "levels = self.level.trunc()"),
    Mutation("tuned: levels start on the codes", TUNED, "(found.levels + inside)", "(found.levels + 0 * inside)"),
    Mutation("tuned: levels drift away", TUNED, "f.clip()", "pass"),
    Mutation(
        "tuned: what got worse is kept",
        TUNED,
        "return stored if _loss(part) < before else [q for _, q in part.solved]",
        "return stored",
    ),
    Mutation(
        "tuned: what got better is thrown away",
        TUNED,
        "return stored if _loss(part) < before else [q for _, q in part.solved]",
        "return [q for _, q in part.solved]",
    ),
    Mutation("tuned: no steps", TUNED, "x.sub_(g.sign(), alpha=", "x.sub_(0 * g.sign(), alpha="),
    Mutation("tuned: uphill", TUNED, "x.sub_(g.sign(), alpha=", "x.add_(g.sign(), alpha="),
    Mutation("tuned: steps do not shrink", TUNED, " * (1 - step / steps))", ")"),
    Mutation("weights: squared", BLOCK, ".sqrt().to(block.device)", ".to(block.device)"),
    Mutation("weights: of the linear before", BLOCK, "roots[i].repeat", "roots[i - 1].repeat"),
    Mutation("weights: the gradient is written over first", SENSITIVITY, *_SWAPPED),
    Mutation(
        "weights: labels are the likeliest", SENSITIVITY, "torch.searchsorted(p.cumsum(1), draws)", "p.argmax(1, True)"
    ),
    Mutation("weights: gradient without the label", SENSITIVITY, "draws, -1.0", "draws, 0.0"),
    Mutation("weights: octaves of three", SENSITIVITY, "stop, 2 * stop", "stop, 3 * stop"),
    Mutation("weights: blocks in reverse", SENSITIVITY, "tokens.insert(0, ", "tokens.append("),
    Mutation("weights: blocks' inputs a block late", SENSITIVITY, "inputs[i] = hidden", "inputs[i - 1] = hidden"),
    Mutation("tuned: levels are not trained", TUNED, "[LEVEL_REACH] *", "[0.0] *"),
]


def run_tests(copy: Path, tests: list[str]) -> tuple[int, str]:
    """Exit code of pytest on the copy of the package in `copy`, and the tail of what it said."""
    command = [sys.executable, "-c", START, str(copy), "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, f"longer than {TIMEOUT_S:.0f} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-3:])


def outcome(mutation: Mutation, copy: Path) -> tuple[str, str]:
    """(`red`, `GREEN` or `ERROR`, what the tests said last)."""
    path = copy / "fewbit" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return "ERROR", f"the text occurs {text.count(mutation.old)} times in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, said = run_tests(copy, mutation.tests.split())
    finally:
        path.write_text(text, encoding="utf-8")
    # pytest's exit codes: 0 all passed, 1 some failed, anything else is no verdict
    return {0: "GREEN", 1: "red"}.get(code, "ERROR"), said


def copied(folder: Path) -> Path:
    """The package's sources in `folder`, compiled kernels beside them where they were built."""
    shutil.copytree(ROOT / "src" / "fewbit", folder / "fewbit", ignore=shutil.ignore_patterns("__pycache__"))
    native = find_spec("fewbit._cpu")
    if native is not None and native.origin is not None:
        (folder / "fewbit" / Path(native.origin).name).symlink_to(native.origin)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose name has this in it")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.only in m.name]
    if args.list or not chosen:
        print("\n".join(f"{m.name:60} {m.file}" for m in chosen))
        sys.exit(not chosen)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        code, said = run_tests(copy, sorted({file for m in chosen for file in m.tests.split()}))
        if code:
            sys.exit(f"The tests fail without any mutation:\n{said}")
        for m in chosen:
            start = time.perf_counter()
            found, said = outcome(m, copy)
            bad += found != "red"
            print(f"{found:6} {m.name:60} {m.file:26} {time.perf_counter() - start:5.1f} s", flush=True)
            if found == "ERROR":
                print("       " + said.replace("\n", "\n       "))
    print(f"{len(chosen) - bad} of {len(chosen)} mutations turn a test red")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
