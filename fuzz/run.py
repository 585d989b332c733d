"""Coverage-guided fuzzing of what reads files from elsewhere, with atheris (`make fuzz`).

    python fuzz/run.py [TARGET ...] [--seconds 600] [--keep]

Each target runs for its share of the seconds, from the kept corpus and from seeds made anew; inputs that reach new
code are gathered in build/fuzz/TARGET. A crash, a hang of 20 seconds, or more than 2 GiB ends it with exit code 1, and
the input lies in build/fuzz. --keep then adds what was found to the kept corpus, as far as it may grow.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS, WORK = HERE / "corpus", HERE.parent / "build" / "fuzz"
# a kept corpus is test data: small files, and not too many
KEPT_FILE, KEPT_ALL = 8 << 10, 64 << 10
LIMITS = ["-timeout=20", "-rss_limit_mb=2048", "-max_len=65536", "-print_final_stats=1"]


def fuzz(target: str, options: list[str]) -> int:
    """One run of libFuzzer in a process of its own; its exit code."""
    return subprocess.run([sys.executable, __file__, "--inside", target, *options], check=False).returncode


def inside(target: str, options: list[str]) -> None:
    """Within that process: only fewbit's own code is watched for coverage."""
    import atheris

    sys.path.insert(0, str(HERE))
    # loaded before anything is watched, so that it runs at its own speed
    import tokenizers  # noqa: F401
    import torch

    torch.set_num_threads(1)
    watched = ["fewbit.checkpoint", "fewbit.formats", "fewbit.gguf_parts", "fewbit.config_values", "fewbit.tokenizer"]
    with atheris.instrument_imports(include=watched):
        from targets import TARGETS
    atheris.Setup([sys.argv[0], *options], TARGETS[target])
    atheris.Fuzz()


def keep(target: str) -> None:
    """Found inputs beside the kept ones, the smallest first until there is no more room. Each once reached something
    new: libFuzzer gathers no others, and replaces one by a smaller one that reaches the same.
    """
    kept = {file.read_bytes() for file in (CORPUS / target).iterdir()}
    room = KEPT_ALL - sum(map(len, kept))
    for file in sorted((WORK / target).iterdir(), key=lambda f: f.stat().st_size):
        data = file.read_bytes()
        if data in kept or not 0 < len(data) <= min(room, KEPT_FILE):
            continue
        room -= len(data)
        (CORPUS / target / file.name[:16]).write_bytes(data)


def main() -> None:
    targets = sorted(p.name for p in CORPUS.iterdir())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(targets)} (default: all)")
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="add what was found to the kept corpus")
    args = parser.parse_args()
    chosen = args.targets or targets
    if unknown := sorted(set(chosen) - set(targets)):
        parser.error(f"there is no target {', '.join(unknown)}; known: {', '.join(targets)}")
    failed = []
    for target in chosen:
        (WORK / target).mkdir(parents=True, exist_ok=True)
        limit = f"-max_total_time={max(1, args.seconds // len(chosen))}"
        options = [*LIMITS, limit, f"-artifact_prefix={WORK}/{target}-", str(WORK / target), str(CORPUS / target)]
        if fuzz(target, options):
            failed.append(target)
        elif args.keep:
            keep(target)
    if failed:
        sys.exit(f"Findings in {', '.join(failed)}: the inputs lie in {WORK}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], sys.argv[3:])
    else:
        main()
