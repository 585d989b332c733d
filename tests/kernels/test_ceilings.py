"""The plain loops that products are held against: they read every byte and multiply every round."""

from __future__ import annotations

import pytest
import torch

from fewbit.kernels._ceilings import Ceilings, last_cache


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 511, 4096, 4097, 100_003])
def test_every_byte_is_read(each_isa, threads, size):
    each_isa.set_threads(threads)
    data = torch.zeros(size, dtype=torch.uint8)
    assert each_isa.native.read_all(data.data_ptr(), size) == 0
    random = torch.Generator().manual_seed(size)
    places = {0, size // 2, size - 1, *torch.randint(max(1, size), (30,), generator=random).tolist()}
    for place in sorted(places & set(range(size))):
        data[place] = 1 << place % 8
        found = each_isa.native.read_all(data.data_ptr(), size)
        # any byte of a 32-bit word
        assert found.bit_count() == 1, place
        assert found.bit_length() % 8 == (place % 8 + 1) % 8
        data[place] = 0


@pytest.mark.parametrize("rounds", [0, 1, 7, 100_000])
def test_multiply_adds_are_done_and_counted(each_isa, rounds):
    random = torch.Generator().manual_seed(rounds)
    # few enough that pairs of products stay in 16 bits
    w = torch.randint(0, 128, (64,), generator=random, dtype=torch.uint8)
    x = torch.randint(-127, 128, (64,), generator=random, dtype=torch.int8)
    done = {}
    for threads in (1, 3):
        each_isa.set_threads(threads)
        done[threads], total = each_isa.native.dot_all(rounds, w.data_ptr(), x.data_ptr())
        width = 32 if each_isa.isa == "avx2" else 64
        assert done[threads] % (width * threads) == 0
        repeats = done[threads] // (width * threads)
        assert repeats % max(1, rounds) == 0
        assert total == repeats * int((w[:width].int() * x[:width].int()).sum()) % 2**32
    assert done[3] == 3 * done[1]
    assert (done[1] > 0) == (rounds > 0)


def test_ceilings_are_positive_and_know_their_buffer(each_isa):
    found = Ceilings(each_isa, 1 << 20)
    ceiling = found.measure(1)
    assert ceiling.read_rate > 0
    # a pass of multiplying has grown long enough to be timed
    assert ceiling.dot_rate > 0
    assert found._rounds > 1000
    # the instruction that the products are made of does more than the portable loop
    if each_isa.isa == "avx512vnni":
        each_isa.set_isa("scalar")
        assert ceiling.dot_rate > 4 * Ceilings(each_isa, 1 << 20).measure(1).dot_rate


@pytest.mark.parametrize("sizes", [["32K", "1024K", "32M", "odd"], ["odd", "32768K", "32K"]])
def test_the_largest_cache_is_found(tmp_path, sizes):
    assert last_cache(tmp_path) == 0
    for index, size in enumerate(sizes):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    assert last_cache(tmp_path) == 32 << 20


def test_the_last_caches_of_all_dies_count(tmp_path):
    # four CPUs on two dies
    for cpu, shared in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text("16384K\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    assert last_cache(tmp_path) == 32 << 20
