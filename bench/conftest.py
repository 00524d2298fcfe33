"""Interleaved timing, and the table at the end of a benchmark run."""

import os
import time
from statistics import median

import pytest
import torch
import workloads

from compaware_kernels.info import info

rows: list[tuple[str, str, float, float]] = []  # op, name, median ms, ratio to the floor


def timed(function) -> float:
    sync = torch.cuda.synchronize if workloads.DEVICE == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    function()
    sync()
    return (time.perf_counter() - start) * 1e3


@pytest.fixture
def race(benchmark):
    """race(op, ours, peers, reset, floor): every round runs each peer and the floor once, then ours, so that all see
    the same machine. ``floor`` is a pass over the same bytes that does next to nothing."""

    def run(op, ours, peers, reset, floor, rounds=15):
        times = {name: [] for name in ("compaware", *peers, "floor")}

        def setup():
            for name, function in {**peers, "floor": floor}.items():
                reset(name)
                times[name].append(timed(function))
            reset("compaware")

        benchmark.pedantic(lambda: times["compaware"].append(timed(ours)), setup=setup, rounds=rounds, warmup_rounds=2)
        medians = {name: median(samples[2:]) for name, samples in times.items()}
        benchmark.extra_info |= {f"{name} (median ms)": value for name, value in medians.items()}
        rows.extend((op, name, value, value / medians["floor"]) for name, value in medians.items())

    return run


def pytest_terminal_summary(terminalreporter):
    write, load = terminalreporter.write_line, os.getloadavg()[0]
    write(f"{workloads.device_name()}, {torch.get_num_threads()} threads, load {load:.1f}, torch {torch.__version__}")
    write(f"{'op':22}{'':16}{'median ms':>10}{'x floor':>9}")
    for op, name, value, ratio in rows:
        write(f"{op:22}{name:16}{value:10.2f}{ratio:9.2f}")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Results are published: keep the numbers and the facts, not the host's name nor every sample."""
    output_json["machine_info"] = {key: value for key, value in info().items() if key != "library"}
    output_json.pop("commit_info", None)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
