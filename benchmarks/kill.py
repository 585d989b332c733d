"""The kill test: kill -9 at random moments of a quantization, until enough of them hit it at work; the same command
goes on each time, and every file must be what an uninterrupted run writes. Exits non-zero where a byte differs.

    python benchmarks/kill.py [MODEL] [--kills 20] [--method gptq] [--format int4g64] [-- OPTIONS OF fewbit quantize]

Without MODEL a random one of 8 blocks is made. Kills before the first block (while Python starts, the text is read, or
the embedding is written) do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

START = "import sys; from fewbit.cli import main; sys.exit(main(sys.argv[1:]))"
# a random Llama that takes seconds a block, so that kills find it in the middle of things
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def digest(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def made(folder: Path) -> Path:
    """The random model."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.conftest import write_folder

    return write_folder(folder / "model", **SIZES)


def command(model: str | Path, out: Path, args: argparse.Namespace) -> list[str]:
    options = ["--method", args.method, "--format", args.format, *args.options]
    return [sys.executable, "-c", START, "quantize", str(model), "-o", str(out), *options]


def units(out: Path) -> list[str]:
    """What is committed now."""
    journal = out.parent / f".{out.name}.partial" / "journal.json"
    try:
        found: list[str] = json.loads(journal.read_text())["done"]
    except FileNotFoundError:
        return []
    return found


def killed(line: list[str], wait: float) -> bool:
    """Start the command, kill it `wait` seconds after its walk went on; False where it was done before that."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for text in process.stderr:
        # the preflight's figures: from here on blocks are quantized
        if text.startswith("about "):
            time.sleep(wait)
            break
    process.kill()
    rest = process.communicate()[1]
    if process.returncode > 0:
        raise SystemExit(f"the command failed by itself:\n{text}{rest}")
    return process.returncode < 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--format", default="int4g64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    known = parser.parse_args(argv[:cut])
    known.options = argv[cut + 1 :]
    with tempfile.TemporaryDirectory(prefix="fewbit-kill-") as temporary:
        return compare(Path(temporary), known)


def compare(folder: Path, args: argparse.Namespace) -> int:
    model = args.model or made(folder)
    whole, out = folder / "whole", folder / "killed" / "q"
    out.parent.mkdir()
    start = time.monotonic()
    subprocess.run(command(model, whole, args), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    blocks = sum(name.startswith("block ") for name in _all_units(model))
    moments, hits, starts = random.Random(args.seed), Counter[str](), 0
    while sum(hits.values()) < args.kills:
        if starts > 10 * args.kills:
            raise SystemExit(f"only {sum(hits.values())} of {starts} kills hit: the model is too small")
        starts += 1
        # a block and a half at most: every run gets a little further, and ends anywhere in a block
        left = 1.5 if sum(hits.values()) < args.kills / 2 else 1.0
        at_work = killed(command(model, out, args), moments.uniform(0, left * seconds / blocks))
        if out.exists():
            # it was faster: compared, and the next run begins anew
            if differences(whole, out):
                break
            print("finished, equal", flush=True)
            _remove(out)
            continue
        done = units(out)
        if not at_work or not done:
            raise SystemExit(f"the command ended by itself with {len(done)} units")
        hits[f"after {done[-1]}"] += 1
        print(f"kill {sum(hits.values())}: {len(done)} units are kept", flush=True)
    if not out.exists():
        subprocess.run(command(model, out, args), check=True, stdout=subprocess.DEVNULL)
    wrong = differences(whole, out)
    beside = sorted(p.name for p in out.parent.iterdir() if p != out)
    print(f"uninterrupted in {seconds:.1f} s; {sum(hits.values())} kills: {dict(sorted(hits.items()))}")
    print(f"files that differ: {wrong or 'none'}; left beside: {beside or 'nothing'}")
    if args.json:
        args.json.write_text(json.dumps({"kills": dict(hits), "differ": wrong, "beside": beside}, indent=1) + "\n")
    return 1 if wrong or beside else 0


def differences(whole: Path, out: Path) -> list[str]:
    """Names of files that are not the same in both."""
    expected, found = digest(whole), digest(out)
    return sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))


def _all_units(model: str | Path) -> set[str]:
    from fewbit.source import open_source

    return {f"block {w.block}" if w.block is not None else w.role for w in open_source(model).weights}


def _remove(out: Path) -> None:
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


if __name__ == "__main__":
    sys.exit(main())
