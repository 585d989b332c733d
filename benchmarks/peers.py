"""What other quantizers reach on the same model, calibration tokens and windows: the peers' part of docs/benchmarks.md.

    python benchmarks/peers.py MODEL_FOLDER TEXT CALIBRATION --rows autoround-int4 llmcompressor-gptq-int3 ...
        [--output peers.npz] [--jobs 1] [--timeout 36000] [--python PACKAGE=INTERPRETER ...]

Rows are METHOD-int{2,3,4,8}, symmetric in groups of 64, or with a trailing `a` asymmetric; the methods are
autoround (tuned, 200 iterations), autoround-rtn (its iters=0), llmcompressor-gptq, llmcompressor-awq, gptqmodel and
gptqmodel-actorder. Each peer keeps its own defaults; only linears of the body are quantized. Calibration: the first
128 windows of 512 tokens of CALIBRATION, tokenized whole.

Measured with auto-round 0.16.1, llmcompressor 0.14.0.1 (with compressed-tensors 0.19.0) and GPTQModel 7.7.0, on
transformers 5.17 and torch 2.11 (CUDA) or 2.13 (CPU). Their pins clash: give each an environment of its own and name
its interpreter, as in `--python llmcompressor=venv/bin/python`; without that the running interpreter is used.
llm-compressor's AWQ pins memory and so wants a GPU; a tuned row takes minutes there and hours on two cores.

A peer's folder is read from its bits, and both models run in transformers, float32, by the protocol of
docs/architecture.md: 512-token windows, predictions at positions 256 to 510. No line of fewbit takes part.
OUTPUT (.npz) gets each row's mean KL of every window, and the .json beside it the figures; both are rewritten after
every row, and rows of earlier calls stay.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _clusters import by_window, clustered_error
from _peer_folders import read_folder
from _peer_quantizers import Row
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

WINDOW, FIRST_SCORED, CALIBRATION_WINDOWS = 512, 256, 128
QUANTIZER = Path(__file__).with_name("_peer_quantizers.py")


def windows(model: Path, text: Path, count: int) -> Tensor:
    """The first `count` consecutive windows of a text tokenized whole, int64 [count, 512]."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < count * WINDOW:
        raise SystemExit(f"{text} holds {len(ids)} tokens; {count} windows need {count * WINDOW}")
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


class Measure:
    """The full-precision model and the windows that candidates are compared on."""

    def __init__(self, model: Path, text: Path, count: int, device: str) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.path, self.device = model, device
        self.windows = windows(model, text, count).to(device)
        self.reference = self.load()
        self.linears = {
            f"{name}.weight"
            for name, module in self.reference.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }

    def load(self) -> PreTrainedModel:
        """The full-precision model in float32."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        return model.to(self.device).eval()

    def candidate(self, folder: Path) -> tuple[PreTrainedModel, float]:
        """The model with a quantized folder's weights, and the bits stored a weight; ValueError unless exactly the
        body is quantized and the embeddings are the original's."""
        weights, quantized, stored = read_folder(folder)
        found = {f"{name}.weight" for name in quantized}
        if found != self.linears:
            raise ValueError(f"not quantized: {sorted(self.linears - found)}; too much: {sorted(found - self.linears)}")
        model = self.load()
        own = model.state_dict()
        for name, tensor in own.items():
            if "embed" in name or name.startswith("lm_head"):
                if name in weights and not torch.equal(weights[name], tensor.cpu()):
                    raise ValueError(f"{name} was changed")
            else:
                # a name or a shape that differs is an error here
                tensor.copy_(weights[name])
        return model, 8 * stored / sum(own[name].numel() for name in found)

    @torch.inference_mode()
    def score(self, candidate: PreTrainedModel) -> dict[str, np.ndarray]:
        """Per scored token, window by window: kl (nats), agrees (same top token), loss and reference_loss."""
        parts: list[Tensor] = []
        for window in self.windows[:, None]:
            kept = WINDOW - FIRST_SCORED
            p, q = (m(window, logits_to_keep=kept).logits[0, :-1].log_softmax(-1) for m in (self.reference, candidate))
            target = window[0, FIRST_SCORED + 1 :, None]
            kl = (p.double().exp() * (p.double() - q.double())).sum(-1)
            agrees = p.argmax(-1) == q.argmax(-1)
            parts.append(torch.stack([kl.float(), agrees, -q.gather(1, target)[:, 0], -p.gather(1, target)[:, 0]]))
        names = ("kl", "agrees", "loss", "reference_loss")
        return dict(zip(names, torch.cat(parts, 1).cpu().numpy(), strict=True))


def figures(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """The table's figures of one row; `*_error` is the standard error of a mean over windows."""
    kl = scores["kl"].astype(np.float64)
    return {
        "mean_kl": float(kl.mean()),
        "mean_kl_error": clustered_error(kl),
        "median_kl": float(np.median(kl)),
        "p99_kl": float(np.quantile(kl, 0.99)),
        "top1": float(scores["agrees"].mean()),
        "perplexity": float(np.exp(scores["loss"].mean(dtype=np.float64))),
        "reference_perplexity": float(np.exp(scores["reference_loss"].mean(dtype=np.float64))),
        "tokens": len(kl),
    }


class Table:
    """The output's two files; rows already there are kept."""

    def __init__(self, path: Path) -> None:
        self.arrays, self.rows = path, path.with_suffix(".json")
        self.kl: dict[str, np.ndarray] = dict(np.load(path)) if path.exists() else {}
        self.figures: dict[str, Any] = json.loads(self.rows.read_text()) if self.rows.exists() else {}

    def add(self, name: str, found: dict[str, Any], kl: np.ndarray | None) -> None:
        """Take a row in and rewrite the files; a failed row has no KL."""
        self.figures[name] = found
        if kl is not None:
            self.kl[name] = by_window(kl)
            np.savez(self.arrays, **self.kl)
        self.rows.write_text(json.dumps(self.figures, indent=2) + "\n")


class Job(NamedTuple):
    """A peer at work in its own process."""

    row: Row
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    start: float


def launch(row: Row, model: Path, tokens: Path, scratch: Path, interpreters: dict[str, str]) -> Job:
    """Start a row's quantizer; what it prints goes to a file."""
    folder, log = scratch / row.name, scratch / f"{row.name}.log"
    folder.mkdir()
    interpreter = interpreters.get(row.package, sys.executable)
    command = [interpreter, str(QUANTIZER), row.name, str(model), str(tokens), str(folder)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if (os.cpu_count() or 1) < 3:
        # GPTQModel counts one worker for two cores and then asks its pool for two
        offline.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # a working folder of its own: peers leave logs and caches in theirs
    at = Path(tempfile.mkdtemp(dir=scratch))
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=offline, cwd=at)
    return Job(row, process, folder, log, time.monotonic())


def finish(job: Job, measure: Measure, table: Table) -> None:
    """Measure what a peer saved, or keep the end of what it printed."""
    try:
        if job.process.returncode != 0:
            raise ValueError(f"exit status {job.process.returncode}")
        # AutoRound may put its folder one level down
        (said,) = job.folder.rglob("config.json")
        candidate, bits = measure.candidate(said.parent)
        scores = measure.score(candidate)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        tail = job.log.read_text(errors="replace")[-3000:]
        table.add(job.row.name, {"failed": repr(error), "log": tail}, None)
        print(f"{job.row.name:28} FAILED {error!r}\n{tail[-1500:]}", flush=True)
        return
    about = json.loads((job.folder / "peer.json").read_text())
    found = {**about, "stored_bits": bits, **figures(scores), "wall_seconds": round(time.monotonic() - job.start, 1)}
    table.add(job.row.name, found, scores["kl"])
    quality = f"KL {found['mean_kl']:.4f} ± {found['mean_kl_error']:.4f}  PPL {found['perplexity']:.2f}"
    print(
        f"{job.row.name:26} {about['version']:9} {about['seconds']:7.1f} s  {quality} "
        f"(reference {found['reference_perplexity']:.3f})  top-1 {100 * found['top1']:.1f} %",
        flush=True,
    )
    shutil.rmtree(job.folder)


def run(rows: list[Row], args: argparse.Namespace, scratch: Path) -> None:
    """Keep `--jobs` quantizers running in the order of the rows; measure each as it ends."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = scratch / "tokens.npy"
    np.save(tokens, windows(args.model, args.calibration, args.calibration_windows).numpy())
    interpreters = dict(entry.split("=", 1) for entry in args.python)
    waiting, running = list(rows), list[Job]()
    measure: Measure | None = None
    table = Table(args.output)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            running.append(launch(waiting.pop(0), args.model.absolute(), tokens, scratch, interpreters))
        measure = measure or Measure(args.model, args.text, args.windows, device)
        time.sleep(0.2)
        for job in list(running):
            if time.monotonic() - job.start > args.timeout:
                job.process.kill()
                job.process.wait()
            if job.process.poll() is not None:
                running.remove(job)
                # the next quantizer works while this one is measured
                if waiting:
                    running.append(launch(waiting.pop(0), args.model.absolute(), tokens, scratch, interpreters))
                finish(job, measure, table)


def row(name: str) -> Row:
    """`Row.parse` with its message kept by argparse."""
    try:
        return Row.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--rows", nargs="+", required=True, type=row)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "peers.npz")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--calibration-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--jobs", type=int, default=1, help="quantizers at work at once")
    parser.add_argument("--timeout", type=float, default=36000, help="seconds that one quantizer may take")
    parser.add_argument("--python", nargs="*", default=[], metavar="PACKAGE=INTERPRETER")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp())
    try:
        run(args.rows, args, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
