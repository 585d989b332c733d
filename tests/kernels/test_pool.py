"""The thread pool: many small calls, callers beside each other, forks and exits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from fewbit.kernels import cpu
from fewbit.kernels._cores import most_threads, physical_cores


def test_many_tiny_calls_with_changing_threads(native, make_tensor, random):
    packed = native.prepare([make_tensor("int4g32", 70, 64)])
    xs = [random(t, 64, seed=t) for t in (1, 2, 5)]
    native.set_threads(1)
    expected = [native.matmul(x, packed) for x in xs]
    for i in range(3000):
        if i % 50 == 0:
            native.set_threads(1 + i // 50 % 5)
        assert torch.equal(native.matmul(xs[i % 3], packed), expected[i % 3])


def test_callers_beside_each_other(native, make_tensor, random):
    packed, x = native.prepare([make_tensor("int8", 3000, 256)]), random(16, 256)
    native.set_threads(3)
    expected, wrong = native.matmul(x, packed), []

    def call(number: int) -> None:
        for i in range(80):
            if number == 0 and i % 10 == 0:
                native.set_threads(2 + i // 10 % 3)
            if not torch.equal(native.matmul(x, packed), expected):
                wrong.append((number, i))

    callers = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    assert wrong == []


PROGRAM = """
import os, sys, torch
from fewbit.formats import parse
from fewbit.kernels import cpu
backend = cpu.backend()
backend.set_threads(3)
fmt = parse("int8")
q = fmt.pack(torch.randint(0, 256, (400, 64), dtype=torch.uint8), {"scale": torch.ones(400, 1)})
packed = backend.prepare([q])
x = torch.ones(4, 64)
expected = backend.matmul(x, packed)
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        same = torch.equal(backend.matmul(x, packed), expected) and backend.threads == 3
        backend.set_threads(2)
        os._exit(0 if same and torch.equal(backend.matmul(x, packed), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(backend.matmul(x, packed), expected)
"""


@pytest.mark.parametrize("how", ["exit", "fork"])
def test_neither_exit_nor_fork_hangs(native, how):
    if how == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, timeout=60)


REFUSED = """
import resource, torch
from fewbit.formats import parse
from fewbit.kernels import cpu
backend = cpu.backend()
fmt = parse("int8")
q = fmt.pack(torch.randint(0, 256, (400, 64), dtype=torch.uint8), {"scale": torch.ones(400, 1)})
backend.set_threads(1)
packed, x = backend.prepare([q]), torch.ones(4, 64)
expected = backend.matmul(x, packed)
# room for the stacks of two more threads and what they need besides; glibc's default where the limit is none
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
stack = stack if 0 < stack < 2**32 else 2 << 20
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + stack * 5 // 2, hard))
backend.native.set_threads(64)
assert torch.equal(backend.matmul(x, packed), expected)
assert 1 < backend.threads < 64, backend.threads
# asked again with room, it gets them all
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
backend.native.set_threads(16)
assert torch.equal(backend.matmul(x, packed), expected)
assert backend.threads == 16
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc and obeys RLIMIT_AS")
def test_threads_the_system_refuses_are_done_without(native):
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


DEFAULT = """
from fewbit.kernels import cpu
import torch
from fewbit.kernels._cores import physical_cores
print(cpu.backend().threads, torch.get_num_threads(), physical_cores())
"""


@pytest.mark.parametrize("asked", ["1", "64", None])
def test_the_default_is_the_cores_and_no_more_than_torch_uses(native, asked):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if asked:
        env["OMP_NUM_THREADS"] = asked
    run = subprocess.run(
        [sys.executable, "-c", DEFAULT], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    threads, of_torch, cores = map(int, run.stdout.split())
    assert threads == min(of_torch, cores)
    assert asked != "1" or threads == 1


def test_threads_have_bounds(native):
    most = most_threads()
    for count, words in ((0, "at least 1"), (most + 1, f"at most {most} on"), (2**31, f"at most {most} on")):
        with pytest.raises(ValueError, match=words):
            native.set_threads(count)
    for count in (3, most):
        native.set_threads(count)
        assert native.threads == count


def test_backend_is_one_instance_and_keeps_its_threads(native):
    native.set_threads(2 if native.threads != 2 else 1)
    before = native.threads
    again = cpu.backend()
    assert again is native
    assert again.threads == before


def test_isa_names(native):
    assert native.isa in native.instruction_sets()
    with pytest.raises(ValueError, match="unknown instruction set"):
        native.set_isa("sse9")
    for name, reason in native.instruction_sets().items():
        if reason:
            with pytest.raises(ValueError, match="can't run here"):
                native.set_isa(name)


def test_cores_count_each_core_once_and_obey_the_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    assert physical_cores(tmp_path) == 4
    for n, siblings in {0: "0,4", 1: "1,5", 2: "2,6", 5: "1,5"}.items():
        topology = tmp_path / f"sys/devices/system/cpu/cpu{n}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    assert physical_cores(tmp_path) == 3
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for text, cores in {"max 100000": 3, "150000 100000": 2, "10000 100000": 1, "900000 100000": 3, "odd": 3}.items():
        (group / "cpu.max").write_text(text + "\n")
        assert physical_cores(tmp_path) == cores
