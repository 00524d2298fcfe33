"""SIGINT at any moment of a proximal step: weights and state are those before it or those after it, bit for bit."""

import os
import random
import signal
import statistics
import sys
import threading
import time

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import compaware_kernels as ck
from compaware_kernels._utils.uninterrupted import signals_held, uninterrupted

INTERRUPTS = 400  # interrupts in all, over the cases below


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 64), (64, 96), (48, 48), *[(12, 9)] * 3]
    return [torch.randn(*shape, generator=generator).div(4).to(dtype) for shape in shapes]


class Operators:
    """An in-place public operator: ``step`` changes tensors, ``snapshot`` copies all that it may change."""

    def __init__(self, name, dtype=torch.float32):
        self.name, self.weights, self.state = name, weights(dtype), ck.WarmState()
        self.residuals = [torch.zeros_like(W, dtype=torch.int16) for W in self.weights] if dtype.itemsize == 2 else None

    def step(self):
        spectral = {"state": self.state}
        feedback = {"residuals": self.residuals} if self.residuals else {}
        if self.name == "svt_":
            ck.svt_(self.weights, 0.01, **spectral, **feedback)
        elif self.name == "truncate_":
            ck.truncate_(self.weights, 20, **spectral)
        elif self.name == "group_shrink_":
            ck.group_shrink_(self.weights, 0.01, **feedback)
        else:
            getattr(ck, self.name)(self.weights, 0.001, **feedback)

    def prepare(self):
        if self.name == "truncate_":  # of full rank again, so that the next step changes them
            for W in self.weights:
                W.add_(torch.eye(*W.shape), alpha=0.01)

    def snapshot(self):
        return {"weights": self.weights, "residuals": self.residuals or [], "warm": self.state.state_dict()}


class Training:
    """ProximalStep on a network with a parametrized layer, and with biases; in half precision with residuals."""

    def __init__(self, dtype):
        torch.manual_seed(0)
        layers = nn.Linear(64, 96), nn.utils.parametrizations.weight_norm(nn.Linear(96, 48)), nn.Linear(48, 48)
        self.model = nn.Sequential(*layers, nn.Conv2d(3, 6, 3)).to(dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.prox = ck.ProximalStep(self.model, self.optimizer, nuclear=0.1, group=0.001, l1=1e-4, every=1)

    def step(self):
        self.optimizer.step()  # without gradients: the proximal step alone changes weights

    def prepare(self):
        pass

    def snapshot(self):
        prox = self.prox
        counts = torch.tensor([prox.steps, prox.applied])
        return {"model": self.model.state_dict(), "residuals": dict(prox.residuals), "counts": counts,
                "warm": prox.warm.state_dict()}  # fmt: skip


CASES = {
    "svt_": lambda: Operators("svt_"),
    "svt_, bf16": lambda: Operators("svt_", torch.bfloat16),
    "truncate_": lambda: Operators("truncate_"),
    "group_shrink_": lambda: Operators("group_shrink_", torch.bfloat16),
    "soft_threshold_": lambda: Operators("soft_threshold_"),
    "ProximalStep": lambda: Training(torch.float32),
    "ProximalStep, bf16": lambda: Training(torch.bfloat16),
}


def flat(tree):
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    return [t.clone() if isinstance(t, torch.Tensor) else torch.tensor(t) for t in leaves]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Pair:
    """Two equal subjects: steps of the first are interrupted, those of the second are not."""

    def __init__(self, case):
        self.tried, self.whole = CASES[case](), CASES[case]()
        for subject in (self.tried, self.whole):
            subject.step()

    def judge(self, interrupted_step):
        """What a step that is interrupted has changed: "nothing", "all" or "torn"."""
        self.tried.prepare(), self.whole.prepare()
        before = flat(self.tried.snapshot())
        interrupted_step(self.tried.step)
        after = flat(self.tried.snapshot())
        self.whole.step()
        wanted = flat(self.whole.snapshot())
        if same(after, wanted):
            return "all"
        if not same(after, before):
            return "torn"
        self.tried.step()
        assert same(flat(self.tried.snapshot()), wanted)
        return "nothing"


def at_line(number):
    """Call a function and send SIGINT at this line of Python code; whether it has had so many lines."""
    left = [number]

    def trace(frame, event, argument):
        left[0] -= 1
        if left[0] == 0:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    def call(function):
        sys.settrace(trace)
        try:
            function()
        except KeyboardInterrupt:
            return
        finally:
            sys.settrace(None)
        assert left[0] > 0, "the interrupt was lost"

    return call


def lines_of(function):
    count = [0]

    def trace(frame, event, argument):
        count[0] += 1
        return trace

    sys.settrace(trace)
    function()
    sys.settrace(None)
    return count[0]


@pytest.mark.parametrize("case", CASES)
def test_interrupted_at_a_line(case):
    pair, chance = Pair(case), random.Random(case)
    pair.whole.step()
    lines = lines_of(pair.tried.step)
    found = {pair.judge(at_line(chance.randrange(lines))) for _ in range(5)}
    assert "torn" not in found and "all" in found


def at_moment(delay):
    """Call a function and send SIGINT to this process after so many seconds."""

    def call(function):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            function()
            timer.join()
            time.sleep(0.1)  # in which the signal arrives
        except KeyboardInterrupt:
            timer.join()
            return
        raise AssertionError("the interrupt was lost")

    return call


def work(case, count, queue):
    torch.set_num_threads(1)
    pair, chance = Pair(case), random.Random(case)
    times = []
    for subject in [pair.tried, pair.whole] * 3:
        start = time.perf_counter()
        subject.step()
        times.append(time.perf_counter() - start)
    queue.put([pair.judge(at_moment(chance.uniform(0, 1.2 * statistics.median(times)))) for _ in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interrupted_at_random_moments(case):
    context = mp.get_context("forkserver")
    queue, count = context.SimpleQueue(), -(-INTERRUPTS // len(CASES))
    process = context.Process(target=work, args=(case, count, queue), daemon=True)
    process.start()
    found = queue.get()
    process.join(60)
    assert process.exitcode == 0 and len(found) == count and "torn" not in found
    assert "all" in found


def test_held_signals_are_handled_once_each_at_the_outer_end():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append("user"))
    try:
        with pytest.raises(KeyboardInterrupt), signals_held():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            with signals_held():
                signal.raise_signal(signal.SIGUSR1)
            assert not seen
        assert seen == ["user"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_all_handlers_are_called_and_back_although_one_raises():
    def give_up(number, frame):
        raise SystemExit(3)

    before = signal.signal(signal.SIGTERM, give_up)
    try:
        with pytest.raises(KeyboardInterrupt), signals_held():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is give_up
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_and_ignored_signals_are_left_alone():
    seen = []

    @uninterrupted
    def call():
        seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        call()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[1] == signal.SIG_IGN


class Quitting(nn.Module):
    """Parametrization W = original + 0 whose right inverse leaves the program at its third call."""

    calls = 0

    def forward(self, original):
        return original + 0

    def right_inverse(self, W):
        Quitting.calls += 1
        if Quitting.calls == 3:  # the first two: registering, and whether it can be written
            raise SystemExit(1)
        return W


def test_leaving_the_program_within_a_step_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    nn.utils.parametrize.register_parametrization(model[2], "weight", Quitting())
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.1), nuclear=0.5)
    Quitting.calls = 2
    before = flat([model.state_dict(), prox.warm.state_dict()])
    with pytest.raises(SystemExit):
        prox.step()
    assert same(flat([model.state_dict(), prox.warm.state_dict()]), before) and prox.applied == 0
    prox.step()
    assert prox.applied == 1
