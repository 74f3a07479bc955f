"""`bench`: its arithmetic with made-up clocks, its cases at a tiny size, what it prints and writes."""

import json
import math
import os
import sys
import time
from itertools import count

import pytest
import torch
from reference import naive_getam

from wsss_lib import bench, bench_cases
from wsss_lib.__main__ import main
from wsss_lib.allocations import count_allocations
from wsss_lib.bench import Calls, Case, compare, measure, relative_error, table
from wsss_lib.bench_getam import getam_loop, random_vit
from wsss_lib.bench_instruments import (
    Rates,
    cuda_clock,
    free_bytes,
    make_clock,
    measure_rates,
    num_threads,
    system_share,
    thread_settings,
    time_in_turns,
)
from wsss_lib.kernels.dense_crf import bilateral_features, positions
from wsss_lib.kernels.permutohedral import PermutohedralLattice

CPU = torch.device("cpu")
RATES = {1: Rates(bandwidth=1e9, flops={torch.float32: 1e9})}
MEGABYTE = 250_000  # float32 numbers


class Fake:
    """A clock that moves only when one of its calls runs."""

    def __init__(self):
        self.now, self.log = 100.0, []

    def clock(self):
        return self.now

    def call(self, name, *seconds):
        """A call that takes these seconds, one after the other, then always the last of them."""
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


# ------------------------------------------------------------------ time


def test_calls_take_turns_and_the_first_round_only_warms_up():
    fake = Fake()
    times = time_in_turns([fake.call("b", 1.9, 0.3), fake.call("o", 1.0, 0.1)], fake.clock, budget=0)
    assert fake.log == ["b", "o"] * 4
    assert times == [pytest.approx([0.3] * 3), pytest.approx([0.1] * 3)]


def test_a_first_call_that_is_long_counts():
    fake = Fake()
    times = time_in_turns([fake.call("b", 60, 50), fake.call("o", 3, 2)], fake.clock, budget=20)
    assert fake.log == ["b", "o"] * 3 and times == [[60, 50, 50], [3, 2, 2]]


@pytest.mark.parametrize("budget, rounds", [(0, 3), (3.5, 4), (100, 15)])
def test_rounds_go_on_until_the_budget_or_their_number_is_over(budget, rounds):
    """A round takes 0.75 + 0.25 seconds, exact in binary."""
    fake = Fake()
    times = time_in_turns([fake.call("b", 0.75), fake.call("o", 0.25)], fake.clock, budget)
    assert [len(samples) for samples in times] == [rounds, rounds]


def test_short_calls_are_repeated_until_a_sample_takes_ten_milliseconds():
    fake = Fake()
    times = time_in_turns([fake.call("b", 0.02), fake.call("o", 0.004)], fake.clock, budget=0)
    assert fake.log == ["b", "o"] + ["b", "o", "o", "o"] * 3
    assert times == [pytest.approx([0.02] * 3), pytest.approx([0.004] * 3)]  # seconds of one call, not three


def test_a_clock_too_coarse_to_see_a_call_is_no_division_by_zero():
    assert time_in_turns([lambda: None], lambda: 0.0, budget=0) == [[0.0] * 3]


def test_one_thread_is_timed_by_the_process_and_several_on_the_wall():
    assert make_clock(CPU, 1) is time.process_time and make_clock(CPU, 2) is time.perf_counter
    assert make_clock(torch.device("cuda"), 1) is cuda_clock


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()
    assert thread_settings(CPU) == sorted({1, before}) and thread_settings(torch.device("cuda")) == [before]
    with pytest.raises(KeyError), num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_rates_are_bytes_and_operations_per_second():
    ticks = count()  # every look at the clock a second later, so everything takes one second
    rates = measure_rates(CPU, lambda: float(next(ticks)), copy=1000, side=10)
    assert rates == Rates(8000.0, {torch.float32: 2000.0})  # 4 bytes read, 4 written; 10^3 multiply-adds
    assert rates.to_json() == {"copy_bytes_per_second": 8000.0, "flops_per_second": {"float32": 2000.0}}


def test_the_floor_is_the_longer_of_moving_and_computing():
    rates = Rates(100.0, {torch.float32: 10.0, torch.float16: 40.0})
    assert rates.floor(200, 10, torch.float32) == 2 and rates.floor(200, 100, torch.float32) == 10
    assert rates.floor(200, 100, torch.float16) == 2.5


# ------------------------------------------------------------------ a measured case


def made_up_case(fake, needs=0.0):
    """Baseline: 8 seconds, 3 MB at its peak, off by 0.5; ours: 2 seconds, 1 MB, off by 0.25."""
    wait_baseline, wait_ours = fake.call("b", 8), fake.call("o", 2)

    def baseline():
        wait_baseline()
        return (torch.ones(3 * MEGABYTE)[:2] + torch.tensor([0.0, 0.5]),)

    def ours():
        wait_ours()
        return (torch.ones(MEGABYTE)[:2] - torch.tensor([0.0, 0.25]),)

    calls = Calls(baseline, ours, lambda: (torch.ones(2, dtype=torch.float64),))
    return Case("made_up", "2 numbers", lambda device: calls, bytes=5e8, flops=1e8, needs=needs)


def test_a_row_holds_medians_ratios_errors_and_the_distance_to_the_floor():
    fake = Fake()
    (row,) = measure(made_up_case(fake), CPU, RATES, 0, lambda device, threads: fake.clock)
    names = row["kernel"], row["case"], row["dtype"], row["threads"]
    assert names == ("made_up", "2 numbers", "float32", 1)
    assert (row["baseline_seconds"], row["seconds"], row["speed_ratio"], row["samples"]) == (8, 2, 4, 3)
    # Memory comes from PyTorch's allocator: the numbers, and a few bytes for the small tensors.
    assert row["baseline_peak_bytes"] == pytest.approx(3e6, abs=500)
    assert row["peak_bytes"] == pytest.approx(1e6, abs=500)
    assert row["memory_ratio"] == row["baseline_peak_bytes"] / row["peak_bytes"]
    assert (row["baseline_error"], row["error"]) == (0.5, 0.25)
    assert (row["floor_seconds"], row["times_floor"], row["note"]) == (0.5, 4, None)
    # Errors, memory, system time, a round to warm up, three to time: memory is counted in no sample.
    assert fake.log == ["b", "o"] * 7


def test_the_median_is_taken_not_the_mean():
    fake, one = Fake(), (torch.ones(1),)
    waits = fake.call("b", 1, 1, 1, 1, 4, 99, 5), fake.call("o", 1, 1, 1, 1, 1, 99, 2)
    calls = Calls(lambda: waits[0]() or one, lambda: waits[1]() or one, lambda: one)
    case = Case("made_up", "", lambda device: calls, bytes=1, flops=1, needs=0)
    (row,) = measure(case, CPU, RATES, 0, lambda device, threads: fake.clock)
    assert (row["baseline_seconds"], row["seconds"], row["speed_ratio"]) == (5, 2, 2.5)
    assert (row["baseline_range"], row["range"]) == ([4, 99], [1, 99])


def test_every_thread_count_has_a_row_and_its_own_floor():
    fake, seen = Fake(), []
    rates = {1: RATES[1], 2: Rates(2e9, {torch.float32: 2e9})}

    def clock_for(device, threads):
        seen.append(threads)
        return fake.clock

    rows = measure(made_up_case(fake), CPU, rates, 0, clock_for)
    assert [(r["threads"], r["times_floor"]) for r in rows] == [(1, 4), (2, 8)] and seen == [1, 2]


def test_a_baseline_that_does_not_fit_is_left_out_and_said_so():
    fake, needs = Fake(), free_bytes(CPU) + 1e12
    if math.isinf(needs):
        pytest.skip("this system does not say how much memory is free")
    (row,) = measure(made_up_case(fake, needs), CPU, RATES, 0, lambda device, threads: fake.clock)
    assert "b" not in fake.log and row["seconds"] == 2
    times = "baseline_seconds baseline_range speed_ratio baseline_system_share user_speed_ratio"
    others = "baseline_peak_bytes memory_ratio baseline_error error"
    assert [row[name] for name in f"{times} {others}".split()] == [None] * 9
    assert f"needs {needs / 1e9:.1f} GB" in row["note"] and "left out" in row["note"]
    assert row["note"] in printed([row]) and "made_up" in printed([row])


def test_the_ratio_of_user_time_leaves_out_what_the_system_takes(monkeypatch):
    """8 seconds of which the system takes 3/4, and 2 of which it takes 1/4: 2 and 1.5 remain."""
    fake, shares = Fake(), iter([0.75, 0.25])
    monkeypatch.setattr(bench.instruments, "system_share", lambda call, budget: next(shares))
    (row,) = measure(made_up_case(fake), CPU, RATES, 0, lambda device, threads: fake.clock)
    assert (row["baseline_system_share"], row["system_share"]) == (0.75, 0.25)
    assert row["user_speed_ratio"] == 2 / 1.5 and row["speed_ratio"] == 4
    assert "4.0x  1.3x" in printed([row])


def test_the_share_of_system_time(monkeypatch):
    """As the system tells them: user, system, and three that do not count. A call takes 0.25 + 0.125."""
    looks = [(10, 5, 0, 0, 0), (10.25, 5.125, 9, 9, 9), (10.5, 5.25, 9, 9, 99)]
    left, calls = iter([type(os.times())(look) for look in looks]), []
    monkeypatch.setattr(os, "times", lambda: next(left))
    assert system_share(lambda: calls.append(1), budget=2) == 1 / 3
    assert len(calls) == 2  # half a second is over


def test_relative_error_is_the_worst_tensor_on_its_own_scale():
    exact = (torch.tensor([0.0, 100.0]), torch.tensor([0.01, -0.02]), torch.zeros(1))
    found = (torch.tensor([1.0, 100.0]), torch.tensor([0.015, -0.02]), torch.zeros(1))
    assert relative_error(found, exact) == pytest.approx(0.25) and relative_error(exact, exact) == 0


@pytest.mark.parametrize("found", [[[1.0], [1.0]], [1.0, math.nan], [1.0, math.inf]])
def test_results_that_cannot_be_compared_are_refused(found):
    calls = Calls(lambda: (torch.tensor(found),), None, lambda: (torch.ones(2),))
    case = Case("made_up", "a case", lambda device: calls, bytes=1, flops=1, needs=0)
    with pytest.raises(ValueError, match="made_up, a case: found"):
        measure(case, CPU, RATES, 0)


def test_counted_memory_is_the_peak_and_what_is_held():
    with count_allocations() as memory:
        first = torch.ones(3 * MEGABYTE)
        del first
        kept = torch.ones(2 * MEGABYTE)  # noqa: F841, held until the end
    assert (memory.peak, memory.held) == (3_000_000, 2_000_000)


# ------------------------------------------------------------------ what is printed


def printed(rows, load=0.0):
    rates = {"1": RATES[1].to_json()}
    return table({"device_name": "An abacus", "load": load, "rates": rates, "cases": rows})


def test_the_table_says_what_was_measured(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(bench.instruments, "system_share", lambda call, budget: None)
    text = printed(measure(made_up_case(fake), CPU, RATES, 0, lambda device, threads: fake.clock))
    head, line, machine = text.splitlines()
    assert line.split()[:9] == ["made_up", "2", "numbers", "float32", "1", "8000", "ms", "2000", "ms"]
    assert line.split()[9:] == ["4.0x", "-", "4.0", "3", "MB", "1", "MB", "3.0x", "2e-01"]
    assert head.index("speed") + len("speed") == line.index("4.0x") + len("4.0x")  # columns are aligned
    assert machine == "An abacus, 1 thread: copies at 1 GB/s, multiplies float32 at 0.001 TFLOP/s"


@pytest.mark.parametrize("load, warned", [(None, False), (0.3, False), (2.4, True)])
def test_a_busy_machine_is_mentioned(load, warned):
    assert ("2.4 other processes" in printed([], load)) == warned


# ------------------------------------------------------------------ cases


@pytest.mark.parametrize("kernel", bench_cases.KERNELS)
def test_baseline_and_ours_agree_with_float64(kernel):
    for case in bench_cases.cases([kernel], "tiny", CPU):
        calls = case.make(CPU)
        exact = calls.exact()
        assert all(x.dtype == torch.float64 for x in exact), case.title
        for call in (calls.baseline, calls.ours):
            found = call()
            assert all(x.dtype == case.dtype for x in found)
            # float32 rounds at 6e-8; a few hundred additions stay within a hundred times that.
            assert relative_error(found, exact) < TOLERANCE.get(kernel, 5e-6), case.title
            assert max(x.abs().max() for x in found) > 0, case.title


TOLERANCE = {}


@pytest.mark.parametrize("size", bench_cases.SIZES)
def test_cases_name_themselves_and_fit_six_gigabytes(size):
    cases = bench_cases.cases(None, size, CPU)
    assert len({(case.kernel, case.title) for case in cases}) == len(cases) >= len(bench_cases.KERNELS)
    for case in cases:
        assert case.kernel in bench_cases.KERNELS and case.bytes > 0 and case.flops > 0
        assert 0 < case.needs < 6e9, case.title


def test_a_comparison_gives_all_the_same_numbers_and_returns_outputs_then_gradients():
    def draw(generator):
        return [torch.rand(3, generator=generator), torch.tensor([2, 0, 1])]

    def cube(x, order):
        assert order.dtype == torch.long  # whole numbers stay whole
        return x[order] ** 3

    calls = compare(cube, lambda x, order: cube(x, order) + 1, draw, torch.float16, wanted=(0,))(CPU)
    (baseline, d_baseline), (ours, d_ours), (exact, d_exact) = calls.baseline(), calls.ours(), calls.exact()
    assert baseline.dtype == ours.dtype == torch.float16 and exact.dtype == d_exact.dtype == torch.float64
    x = exact[torch.tensor([1, 2, 0])] ** (1 / 3)  # order undone
    torch.testing.assert_close(x.half().double(), x, rtol=1e-12, atol=0)  # float64 sees the rounded inputs
    torch.testing.assert_close(baseline.double(), exact, rtol=1e-3, atol=0)  # half precision rounds at 5e-4
    torch.testing.assert_close(ours.double(), exact + 1, rtol=1e-3, atol=0)
    weights = torch.cos(torch.arange(3.0))  # of the sum that is differentiated
    expected = (3 * x**2 * weights[torch.tensor([1, 2, 0])]).float()
    torch.testing.assert_close(d_exact.float(), expected, rtol=1e-3, atol=0)
    assert torch.equal(d_baseline, d_ours)
    assert len(compare(cube, cube, draw)(CPU).ours()) == 1  # no gradients unless wanted


@pytest.mark.parametrize("height, width, vertices", [(12, 15, (38, 1055)), (125, 166, (2795, 28341))])
def test_the_lattices_have_as_many_vertices_as_the_floor_counts(height, width, vertices):
    _, image = bench_cases._energies(height, width, torch.Generator().manual_seed(0))
    assert image.min() >= 0 and image.max() <= 255 and torch.equal(image, image.round())
    place = positions(height, width, 3, torch.float32, CPU)
    lattices = [PermutohedralLattice(place), PermutohedralLattice(bilateral_features(image[0], 64, 5))]
    # A colour that rounds the other way on another machine moves a few of them.
    assert [lattice.num_vertices for lattice in lattices] == pytest.approx(vertices, rel=0.01)


def test_float16_joins_in_on_cuda_where_products_take_the_time():
    cases = bench_cases.cases(["attention_affinity", "getam"], "tiny", torch.device("cuda"))
    found = {(case.kernel, case.dtype) for case in cases}
    half, single = torch.float16, torch.float32
    assert found == {("attention_affinity", half), ("attention_affinity", single), ("getam", single)}


def test_unknown_kernels_and_sizes_are_refused():
    with pytest.raises(ValueError, match="kernel: found 'par', 'crf', expected some of .*attention_affinity"):
        bench_cases.cases(["par", "getam", "crf"], "tiny", CPU)
    with pytest.raises(ValueError, match="size: found 'huge', expected one of tiny, small, paper"):
        bench_cases.cases(None, "huge", CPU)


def test_the_published_loop_of_getam_is_the_plain_one():
    model = random_vit("vit_tiny_patch16_224", 32).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(2, 20)
    labels[0, 3] = labels[1, 3] = labels[1, 7] = 1
    expected = naive_getam.getam(model, model, images, labels, 6, "cam_grad_s", (2, 2))
    found = getam_loop(model, images, labels)
    # float64 on both sides: only the order of additions differs
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.max().item())
    assert expected.max() > 0 and all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(monkeypatch):
    """`python -m wsss_lib bench ...`, on a machine whose rates are given: measuring them takes seconds."""
    monkeypatch.setattr(bench.instruments, "measure_rates", lambda device, clock: RATES[1])
    monkeypatch.setattr(bench.instruments, "thread_settings", lambda device: [1])

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["wsss_lib", "bench", *map(str, args)])
        main()

    return call


def test_the_command_prints_a_table_and_writes_all_of_it(run, tmp_path, capsys):
    path = tmp_path / "bench.json"
    run("--size", "tiny", "--kernel", "attention_affinity", "propagate", "--results", path)
    lines = capsys.readouterr().out.splitlines()
    ledger = json.loads(path.read_text())
    assert [line.split()[0] for line in lines[1:4]] == ["attention_affinity"] * 2 + ["propagate"]
    assert [row["kernel"] for row in ledger["cases"]] == ["attention_affinity"] * 2 + ["propagate"]
    assert (ledger["device"], ledger["size"], ledger["threads"]) == ("cpu", "tiny", [1])
    assert ledger["device_name"]
    assert {"command", "commit", "torch", "python", "machine", "versions", "load"} <= ledger.keys()
    assert ledger["rates"] == {"1": RATES[1].to_json()} and ledger["versions"]["timm"]
    for row in ledger["cases"]:
        assert row["clock"] == "process" and row["samples"] >= 3 and row["note"] is None
        assert row["speed_ratio"] == row["baseline_seconds"] / row["seconds"]
        assert row["memory_ratio"] == row["baseline_peak_bytes"] / row["peak_bytes"]
        assert row["times_floor"] == row["seconds"] / row["floor_seconds"]


def test_bad_arguments_are_one_line(run):
    with pytest.raises(SystemExit, match="^wsss_lib bench: kernel: found 'par', expected some of "):
        run("--kernel", "par")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="^wsss_lib bench: device: found 'cuda', expected one "):
            run("--device", "cuda")
