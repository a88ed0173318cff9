"""The parts that all benchmarks share: turns, ratios within a round, the report."""

import json

import harness
import pytest
import torch
from harness import Section, Size, Timing, interleaved

CPU = torch.device("cpu")


def test_candidates_take_turns_and_another_one_begins_each_round():
    order = []
    now = iter(range(1000))
    timings = interleaved(
        {name: lambda name=name: order.append(name) for name in "abc"},
        rounds=3,
        device=CPU,
        warm_ups=1,
        clock=lambda: float(next(now)),
    )
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert list(timings) == ["a", "b", "c"]
    assert all(timing.seconds == (1.0,) * 3 for timing in timings.values())


def test_a_ratio_is_the_median_of_the_ratios_within_rounds():
    # The machine was three times slower in the last round: the ratio of medians would say 1.0.
    slow, fast = Timing((4.0, 1.0, 12.0)), Timing((2.0, 0.5, 4.0))
    ratio = fast.times_faster_than(slow)
    assert ratio.values == (2.0, 2.0, 3.0)
    assert str(ratio) == "2.00x (2.00 to 3.00)"


def test_a_timing_records_median_and_spread():
    record = Timing((3.0, 1.0, 2.0)).record()
    assert record == {
        "median_seconds": 2.0,
        "least_seconds": 1.0,
        "most_seconds": 3.0,
        "runs": 3,
        "seconds": [3.0, 1.0, 2.0],
    }


def test_peak_memory_sees_what_a_call_needs():
    needed = 64 * 2**20
    peak = harness.peak_memory(lambda: torch.ones(needed // 4), CPU)
    if peak is None:
        pytest.skip("needs Linux's /proc and glibc")
    assert 0.9 * needed < peak < 2 * needed


def test_the_report_holds_the_machine_and_all_of_a_section(tmp_path, capsys):
    facts = harness.machine(CPU)
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"cpu", "cores", "memory_gb", "threads", "git", "load_before"} <= facts.keys()
    section = Section(
        title="Some",
        columns={"what": "What", "median_seconds": "Seconds"},
        rows=[{"what": "one", **Timing((0.25,)).record()}],
        notes=["A note."],
        left_out={"a peer": "It is not installed."},
    )
    harness.write_report(tmp_path / "new" / "report.json", Size.QUICK, facts, {"some": section})
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["size"] == "quick"
    assert report["machine"]["cores"] == facts["cores"]
    assert report["parts"]["some"]["rows"][0]["seconds"] == [0.25]
    harness.show(section)
    shown = capsys.readouterr().out
    assert "| one  | 0.25    |" in shown
    assert "A note.\nLeft out: a peer. It is not installed." in shown


@pytest.mark.parametrize(("threads", "unit"), [(1, "CPU seconds"), (2, "seconds by the clock")])
def test_one_thread_is_timed_in_cpu_seconds(threads, unit):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert harness.fair_clock(CPU)[1] == unit
    finally:
        torch.set_num_threads(before)
