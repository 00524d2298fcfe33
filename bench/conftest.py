"""Benchmark fixtures: interleaved timing of an op and its baselines, and the tables printed at the end of a run."""

import os
import resource
from statistics import median

import pytest
import torch

from bench.common import workloads
from bench.common.racing import Race, timed
from bench.nn import inference_tables
from bench.proximal import peers
from bench.proximal.cases import product_rate
from compaware_kernels.environment import info

SAMPLE = 1e-3  # s: shorter calls are repeated until they add up to this
LOAD = os.getloadavg()[0]  # load average before the benchmarks start

shrink_rows: list[tuple[str, str, float, float]] = []  # op, name, median ms, ratio to the floor
svt_rows: list[tuple] = []  # case, name, median ms, ratio to the SVD loop, to the floor, error, bound, correct
gpu_rows: list[tuple] = []  # case, name, columns of gpu_race.py
memory_rows: list[tuple] = []  # case, name, MB of the peak, of the weights
training_rows: list[tuple] = []  # regime, ms of a training step, of a proximal step, its shares, error, correct


@pytest.fixture
def race(benchmark):
    """race(op, ours, peers, reset, floor): interleaved timing of an op in place.

    Every round runs each baseline in ``peers`` and the floor once, then ours, so that all meet the same state of the
    machine. ``floor``: a pass over the same bytes with hardly any arithmetic.
    """

    def run(op, ours, peers, reset, floor, rounds=15):
        times = {name: [] for name in ("compaware", *peers, "floor")}

        def setup():
            for name, function in {**peers, "floor": floor}.items():
                reset(name)
                times[name].append(timed(function)[0])
            reset("compaware")

        benchmark.pedantic(
            lambda: times["compaware"].append(timed(ours)[0]), setup=setup, rounds=rounds, warmup_rounds=2
        )
        medians = {name: median(samples[2:]) for name, samples in times.items()}
        benchmark.extra_info |= {f"{name} (median ms)": value for name, value in medians.items()}
        shrink_rows.extend((op, name, value, value / medians["floor"]) for name, value in medians.items())

    return run


@pytest.fixture
def svt_race(benchmark):
    """svt_race(case, weights, truths, ours, peers, floor): as ``race``, after checking each result against the
    truth."""

    def run(case, weights, truths, ours, peers, floor, rounds=7):
        contest, first = Race(weights, truths, {**peers, **ours}), next(iter(ours))
        benchmark.pedantic(lambda: contest.once(first), setup=lambda: contest.round(rounds), rounds=rounds)
        rows = contest.result()
        for name, row in rows.items():
            ratio = rows["svd"].ms / row.ms if row.ok and "svd" in rows else None
            of_floor = row.ms / floor(row.infos) if name in ours else None
            svt_rows.append((case, name, row.ms, ratio, of_floor, row.error, row.bound, row.ok))
            benchmark.extra_info[name] = dict(
                zip(("ms", "x svd", "x floor", "error", "bound", "ok"), svt_rows[-1][2:], strict=True)
            )

    return run


@pytest.fixture
def show_memory(benchmark):
    """show_memory(case, measure): shows and keeps ``measure()``: name -> MB (:func:`bench.proximal.memory.measure`)."""

    def show(case, measure):
        rows = benchmark.pedantic(measure)
        benchmark.extra_info |= rows
        memory_rows.extend((case, name, row["peak MB"], row["weights MB"]) for name, row in rows.items())

    return show


@pytest.fixture
def show_gpu_rows():
    """show_gpu_rows(case, table): adds the rows of gpu_race.table to the tables printed at the end."""
    return lambda case, table: gpu_rows.extend((case, name, row) for name, row in table.items())


@pytest.fixture
def training_race(benchmark):
    """training_race(regime, results, truths, step, reset, prox, steps, every): cost of a proximal step in training.

    Every round times a training step and, after ``reset``, a proximal step. Reported: the proximal step's share of an
    epoch of ``steps`` training steps, and of one training step if it is taken after each ``every``-th.
    """

    def run(regime, results, truths, step, reset, prox, steps, every, rounds=9):
        error, _, correct = workloads.check(results, truths, None)
        times = {step: [], prox: []}

        def setup():
            times[step].append(timed(step)[0])
            reset()

        benchmark.pedantic(lambda: times[prox].append(timed(prox)[0]), setup=setup, rounds=rounds)
        plain, extra = median(times[step]), median(times[prox])
        training_rows.append((regime, plain, extra, extra / plain / steps, extra / plain / every, error, correct))
        names = ("step (ms)", "proximal step (ms)", "per epoch", f"every {every} steps", "error", "ok")
        benchmark.extra_info |= dict(zip(names, training_rows[-1][1:], strict=True))

    return run


@pytest.fixture
def inference_race(benchmark):
    """inference_race(rows, verdicts, ours, seconds): interleaved timing of inference.

    First ``verdicts`` gets the outputs of all rows and returns for each its error and whether it is correct. Then every
    round runs each row, ours last; as many rounds as fit in the seconds, 3 to 15. Returns for each row the medians of
    ms and page faults per call, its error, and ok.
    """

    def run(rows, verdicts, ours, seconds):
        checked = verdicts({name: function() for name, function in rows.items()})
        took = {name: workloads.seconds(function) for name, function in rows.items()}
        calls = {name: max(1, round(SAMPLE / took[name])) for name in rows}
        rounds = int(seconds / sum(took[name] * calls[name] for name in rows))
        samples = {name: [] for name in rows}

        def once(name):
            samples[name].append(sample(rows[name], calls[name]))

        def setup():
            for name in rows:
                if name != ours:
                    once(name)

        benchmark.pedantic(lambda: once(ours), setup=setup, rounds=min(15, max(3, rounds)))
        for name in rows:
            ms, faults = (median(values) for values in zip(*samples[name], strict=True))
            error, ok = checked[name]
            benchmark.extra_info[name] = {"ms": ms, "faults": faults, "error": error, "ok": ok}
        return dict(benchmark.extra_info)

    return run


def sample(function, calls: int) -> tuple[float, float]:
    """Milliseconds and minor page faults per call, averaged over ``calls`` calls."""

    def repeat():
        for _ in range(calls):
            function()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    took = workloads.seconds(repeat)
    return 1e3 * took / calls, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def allocator() -> str:
    """The allocator's settings at the start of this process, in words."""
    found = [f"{key}={os.environ[key]}" for key in ("GLIBC_TUNABLES", "LD_PRELOAD") if os.environ.get(key)]
    return ", ".join(found) or "the system's, as it comes"


def pytest_terminal_summary(terminalreporter):
    write, load = terminalreporter.write_line, f"load {LOAD:.1f} before, {os.getloadavg()[0]:.1f} after"
    versions = f"torch {torch.__version__}, compaware_kernels {info()['version']}"
    write(f"{workloads.device_name()}, {torch.get_num_threads()} threads, {load}, {versions}")
    write(f"allocator: {allocator()}")
    if shrink_rows:
        write(f"{'op':22}{'':16}{'median ms':>10}{'x floor':>9}")
    for op, name, value, ratio in shrink_rows:
        write(f"{op:22}{name:16}{value:10.2f}{ratio:9.2f}")
    if svt_rows:
        write(f"{'svt':28}{'':20}{'median ms':>11}{'svd / it':>10}{'x floor':>9}{'error/tau':>11}{'bound/tau':>11}")
    for case, name, value, ratio, of_floor, error, bound, correct in svt_rows:
        text = f"{ratio:9.1f}x" if ratio else " " * 10 if correct else "     wrong"
        shown = [f"{of_floor:9.1f}" if of_floor else " " * 9, f"{error:11.1e}", f"{bound:11.1e}" if bound else ""]
        write(f"{case:28}{name:20}{value:11.2f}{text}{''.join(shown)}")
    if svt_rows:
        rates = (
            f"{1e-9 * product_rate(dtype=dtype):.0f} GFLOP/s in {dtype}" for dtype in (torch.float32, torch.float64)
        )
        write(f"products with 128 columns, the floor: {', '.join(rates)}. {peers.MISSING}")
    if memory_rows:
        write(f"{'peak memory':28}{'':20}{'extra MB':>11}{'weights':>10}")
    for case, name, peak, weights in memory_rows:
        write(f"{case:28}{name:20}{peak:11.1f}{weights:10.1f}")
    if training_rows:
        write(f"{'training':24}{'step, ms':>10}{'prox, ms':>10}{'per epoch':>11}{'every 10':>10}{'error/tau':>11}")
    for regime, plain, extra, epoch, often, error, correct in training_rows:
        shares = f"{100 * epoch:10.2g}%{often:10.1%}" if correct else f"{'wrong':>21}"
        write(f"{regime:24}{plain:10.1f}{extra:10.1f}{shares}{error:11.1e}")
    if gpu_rows:
        write(f"{'svt on a GPU':28}{'':20}{'ms':>9}{'predicted':>11}{'svd / it':>10}{'error/tau':>11}{'bound/tau':>11}")
    for case, name, row in gpu_rows:
        ms, predicted, ratio, error, bound, ok, method = row.values()
        shown = f"{predicted:11.2f}" if predicted else " " * 11, f"{ratio:9.1f}x" if ok else f"{'wrong':>10}"
        write(f"{case:28}{name:20}{ms:9.2f}{''.join(shown)}{error:11.1e}{f'{bound:11.1e}' if bound else ''}  {method}")
    inference_tables.write_all(write)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Results are published: numbers and facts of the machine are kept, its host name and raw samples are dropped."""
    output_json["machine_info"] = {key: value for key, value in info().items() if key != "library"}
    output_json["machine_info"] |= {"load": LOAD, "allocator": allocator()}
    output_json.pop("commit_info", None)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        if "floor (ms)" in entry["extra_info"]:  # all rows are there
            for key in ("options", "stats", "params", "param"):
                del entry[key]
