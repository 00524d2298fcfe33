"""Makes Triton's interpreter as strict as a GPU: import it first, in a process with TRITON_INTERPRET=1 (triton 3.7).

The interpreter runs kernels on the CPU with numpy, but it computes bf16 as 16-bit integers, truncates to bf16 instead
of rounding, computes tf32 as fp32, ignores device_assert, and allows accesses to any address. With this module

* bf16 values are computed in fp32 and rounded to nearest even (reductions and atomics in bf16 raise);
* operands of a tf32 product lose their last 13 bits, those of tf32x3 are rounded to two tf32 parts;
* every load, store and atomic must be inside a tensor of the launch, or one named by :func:`register`;
* programs start in an order shuffled by ``seed`` (0: as numbered), some or all at a time, and take turns after every
  atomic operation; a deadlock raises, as device_assert and integer overflow do.
"""

import inspect
import itertools
import random
from contextlib import contextmanager

import numpy as np
import triton
import triton.language as tl
from greenlet import getcurrent, greenlet
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
FLOAT = [name for name in vars(Builder) if name.startswith("create_f") and not name.startswith("create_fp_")]
FLOAT += [f"create_{name}f" for name in ("minimum", "minnum", "maximum", "maxnum", "clamp", "precise_div")]
FLOAT += [f"create_{name}" for name in ("exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "sin", "cos")]
FLOAT += ["create_erf", "create_ceil"]

seed = 0
registered: list[tuple[int, int]] = []  # address ranges (first byte, end) of tensors that tables point to
launched = np.empty((2, 0), np.int64)  # ranges of every tensor of the launch, sorted, adjacent ones merged


def patch(owner, *names):
    """Replace methods of ``owner`` by the decorated function, whose first argument is the original method."""

    def decorate(function):
        for name in dict.fromkeys(names):
            original = getattr(owner, name)
            setattr(owner, name, lambda *args, original=original, **kwargs: function(original, *args, **kwargs))
        return function

    return decorate


def is_bf16(x) -> bool:
    return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16


def round_bits(x: np.ndarray, dropped: int) -> np.ndarray:
    """fp32 with the last ``dropped`` bits of the significand rounded, ties to even; inf and NaN are kept."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half, odd = np.uint32((1 << (dropped - 1)) - 1), (bits >> np.uint32(dropped)) & np.uint32(1)
    rounded = ((bits + half + odd) >> np.uint32(dropped)) << np.uint32(dropped)
    return np.where(np.isfinite(x), rounded.view(np.float32), x).astype(np.float32)


def widen(x):
    """bf16 values as fp32; anything else unchanged."""
    return Handle((x.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32) if is_bf16(x) else x


def narrow(x: Handle) -> Handle:
    bits = round_bits(x.data.astype(np.float32), 16).view(np.uint32) >> np.uint32(16)
    return Handle(np.where(np.isnan(x.data), 0x7FFF, bits).astype(np.uint16), tl.bfloat16)


@patch(Builder, *FLOAT)
def _(operation, self, *args):
    result = operation(self, *map(widen, args))
    return narrow(result) if any(map(is_bf16, args)) and result.data.dtype != np.bool_ else result


@patch(Builder, *(name for name in vars(Builder) if name.startswith(("create_fcmp", "create_icmp"))))
def _(compare, self, *args):
    return Handle(compare(self, *args).data, tl.int1)  # with the type of the operands, splat would broadcast it as that


@patch(Builder, "cast_impl", "create_fp_to_fp")
def _(convert, self, x, to, *rest):
    if tl.bfloat16 not in (x.dtype.scalar, to.scalar) or x.dtype.scalar == to.scalar:
        return convert(self, x, to, *rest)
    if to.scalar == tl.bfloat16:
        return narrow(convert(self, x, tl.float32, *rest))
    return convert(self, widen(x), to, *rest)


@patch(interpreter.ReduceScanOpInterface, "apply")
@patch(Builder, "create_atomic_rmw")
def _(operation, self, *args):
    values = [value for arg in args for value in (arg if type(arg) is tuple else (arg,))]
    if any(is_bf16(getattr(value, "handle", value)) for value in values):
        raise TypeError("reductions and atomics in bf16 are not simulated: convert to fp32 first")
    return operation(self, *args)


def drop_bits(x: np.ndarray) -> np.ndarray:
    """fp32 as a tensor core reads it for tf32: Triton truncates (its issue 4574)."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@patch(Builder, "create_dot")
def _(dot, self, a, b, total, precision, *rest):
    a, b, name = widen(a), widen(b), getattr(precision, "name", str(precision)).lower()
    if a.dtype.scalar != tl.float32 or name == "ieee":
        return dot(self, a, b, total, precision, *rest)
    if name == "tf32":
        return Handle(total.data + drop_bits(a.data) @ drop_bits(b.data), tl.float32)
    A, B = round_bits(a.data, 13), round_bits(b.data, 13)
    rest = A @ round_bits(b.data - B, 13) + round_bits(a.data - A, 13) @ B  # the product of both remainders is dropped
    return Handle(total.data + A @ B + rest, tl.float32)


def checked(method: str, pointers: int, mask: int | None) -> None:
    @patch(Builder, method)
    def _(access, self, *args, **kwargs):
        shape = args[pointers].data.shape
        live = np.ones(shape, bool) if mask is None else np.broadcast_to(args[mask].data, shape).astype(bool)
        first = args[pointers].data[live].astype(np.int64)
        last = first + max(1, args[pointers].get_element_ty().primitive_bitwidth // 8)
        starts, stops = launched
        of = np.searchsorted(starts, first, "right") - 1
        wrong = (of < 0) | (last > stops[of])
        if wrong.any():
            where = f"{wrong.sum()} of {wrong.size} lanes of program {self.grid_idx}"
            raise IndexError(f"{method.removeprefix('create_')} out of bounds in {where}")
        return access(self, *args, **kwargs)


checked("create_masked_load", 0, 1)
checked("create_masked_store", 0, 2)
checked("create_atomic_rmw", 1, 3)
checked("create_atomic_cas", 0, None)


def bytes_of(tensor) -> tuple[int, int]:
    """Address range of a tensor from its first element to its last: a view's neighbors in the storage are outside."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (1 + steps) * tensor.itemsize * (tensor.numel() > 0)


@contextmanager
def register(*tensors):
    """Allow launches to access these tensors, too, whose addresses they read from memory."""
    before = registered.copy()
    registered.extend(map(bytes_of, tensors))
    try:
        yield
    finally:
        registered[:] = before


@patch(interpreter.GridExecutor, "__call__")
def _(call, self, *args, **kwargs):
    global launched
    given = [bytes_of(arg) for arg in (*args, *kwargs.values()) if hasattr(arg, "data_ptr")]
    merged = [[-1, -1]]
    for start, stop in sorted(given + registered):
        if start <= merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    launched = np.array(merged, np.int64).T
    self.fn = Programs(self.fn)
    return call(self, *args, **kwargs)


class Programs:
    """Replaces the kernel function: collects the programs of a launch, and runs them when the last one is called."""

    def __init__(self, kernel):
        self.kernel, self.started = kernel, []
        self.__name__, self.__globals__, self.__signature__ = (
            kernel.__name__,
            kernel.__globals__,
            inspect.signature(kernel),
        )

    def __call__(self, **arguments):
        builder = interpreter.interpreter_builder
        self.started.append(Program(self.kernel, arguments, builder.grid_idx))
        if len(self.started) == np.prod(builder.grid_dim):
            self.run(builder)

    def run(self, builder):
        order = random.Random(seed)
        resident = order.choice([1, 2, 5, len(self.started)]) if seed else len(self.started)
        running, self.started, at, polls = self.started[:resident], self.started[resident:], 0, 0
        while running:
            program = running[at]
            builder.grid_idx = program.index
            polls = 0 if program.step() else polls + 1
            if polls > 100 * len(running):
                raise RuntimeError(f"{len(running)} programs wait for each other")
            if program.dead:
                running[at : at + 1] = self.started[:1]
                del self.started[:1]
            if running:
                at = order.randrange(len(running)) if seed else (at + bool(polls)) % len(running)


class Program(greenlet):
    """One program of a launch; yields control after every atomic operation."""

    def __init__(self, kernel, arguments, index):
        super().__init__(lambda: kernel(**arguments))
        self.index, self.seen = index, None

    def step(self) -> bool:
        """Run to the next atomic operation; returns whether it read another value than the last one."""
        before, self.seen = self.seen, self.switch()
        return self.dead or self.seen != before


@patch(Builder, "create_atomic_rmw", "create_atomic_cas")
def _(operation, self, *args):
    found = operation(self, *args)
    if isinstance(getcurrent(), Program):
        places = next(arg for arg in args if isinstance(arg, Handle))
        getcurrent().parent.switch((places.data.tobytes(), found.data.tobytes()))
    return found


@patch(Builder, "set_grid_dim")
def _(set_grid_dim, self, *dims):
    set_grid_dim(self, *dims)
    programs = list(itertools.product(*map(range, dims)))
    if seed:
        random.Random(seed).shuffle(programs)
    self.programs = iter(programs)


patch(Builder, "set_grid_idx")(lambda set_grid_idx, self, *index: set_grid_idx(self, *next(self.programs)))
# device_assert is checked in debug mode only
object.__setattr__(interpreter.interpreter_builder.options, "debug", True)
tl.condition.__bool__ = lambda self: bool(self.condition)  # without it, a loop over one never ends
