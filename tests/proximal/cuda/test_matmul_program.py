"""Matrix programs: what a program refuses, and memory ordering in PTX. Values: tests/emulation/matmul_interpreted.py.

The interpreter switches between programs only at atomic operations. Reordering by a GPU, and synchronization of the
threads within one program, can only be checked in the machine code.
"""

import re
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compaware_kernels.proximal.cuda import matmul_kernel as kernel
from compaware_kernels.proximal.cuda.matmul_program import FAR, Program, layout
from tests.emulation.triton_planted import IN_CODE, plant

pytestmark = pytest.mark.emulation

CAPABILITIES = (80, 90, 100, 120)


# --- arguments --------------------------------------------------------------------------------------------------------


def new(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


A, B, C, COEF = new(5, 7), new(7, 3), new(5, 3), new(3, dtype=torch.float64)
BROAD = torch.empty_strided((5, 3), (FAR, 1), device="meta")
FIT, STRIDES = r"wanted \[M, K\], .* and \[M, N\]; got ", f"strides: wanted a sum below {FAR} for every matrix"
REFUSED = [
    (FIT + r"\[\[5, 7\], \[7, 3\], \[3, 5\]\]", 0, A, B, C.T),
    (FIT + r"\[\[5, 7\], \[3, 7\], \[5, 3\]\]", 0, A, B.T, C),
    (FIT + r"\[\[7, 5\], \[7, 3\], \[5, 3\]\]", 0, A.T, B, C),
    (FIT + r".*, \[5, 1\]\]", 0, A, B, C, C[:, :1], COEF),
    ("coef: wanted alpha, beta and gamma with plus; got None", 0, A, B, C, C),
    ("plus: wanted the dtype of C, torch.float32; got torch.float16", 0, A, B, C, C.half(), COEF),
    ("layer: wanted 0 to 1; got 2", 2, A, B, C),
    ("layer: wanted 0 to 1; got -1", -1, A, B, C),
    (STRIDES, 0, BROAD, new(3, 2), new(5, 2)),
    (STRIDES, 0, new(2, 5), BROAD, new(2, 3)),
    (STRIDES, 0, A, B, BROAD),
    ("not in tuple", 0, A.int(), B, C),
]


@pytest.mark.parametrize("said, arguments", [(said, arguments) for said, *arguments in REFUSED])
def test_refused_arguments(said, arguments):
    program = Program(layers=2)
    with pytest.raises(ValueError, match=said):
        program.multiply(*arguments)
    assert program.build("meta").tiles == 0


TWICE = torch.empty_strided((5, 3), (FAR - 1, FAR - 2), device="meta")  # 63 (FAR - 1) + 63 (FAR - 2) is beyond int32


@pytest.mark.parametrize("C, plus", [(C, BROAD), (TWICE, C)], ids=["plus", "two strides"])
def test_far_elements_are_refused(C, plus):
    with pytest.raises(ValueError, match="strides"):
        Program(layers=1).multiply(0, A, B, C, plus, COEF)


def test_layout():
    memory = torch.empty(1000)
    for wanted, shape, steps, first in (
        (2, (5, 8), (8, 1), 0),
        (3, (8, 5), (1, 12), 4),
        (0, (5, 7), (8, 1), 0),  # the last vector is not full
        (0, (5, 8), (9, 1), 0),
        (0, (5, 8), (8, 1), 1),
        (1, (7, 5), (1, 8), 0),
        (1, (8, 5), (1, 8), 2),
        (0, (5, 8), (32, 2), 0),
        (2, (1, 8), (3000, 1), 0),
        (3, (8, 1), (1, 3000), 0),
        (0, (1, 8), (7, 1), 0),  # the stride is no multiple of a vector
    ):
        assert layout(memory.as_strided(shape, steps, first)) == wanted, (shape, steps, first)


# --- memory ordering --------------------------------------------------------------------------------------------------


def several() -> Program:
    """Two groups of tiles, both with split sums; all kinds of loads."""
    program, bf16 = Program(layers=1), torch.bfloat16
    program.multiply(0, new(256, 2048), new(2048, 128), new(256, 128), new(256, 128), COEF, new(1, dtype=torch.int32))
    program.multiply(0, new(256, 2048, dtype=bf16), new(128, 2048).T, new(256, 128, dtype=bf16))
    program.multiply(0, new(250, 2047), new(2047, 127), new(250, 127), wide=True)
    return program.build("meta")


def one() -> Program:
    program = Program(layers=1)
    program.multiply(0, new(256, 2048), new(2048, 128), new(256, 128))
    return program.build("meta")


def compiled(function, capability: int, program: Program) -> str:
    names, at = function.arg_names, {name: (i,) for i, name in enumerate(function.arg_names)}
    constants = dict(zip(names[5:], (*program.kinds, program.precision), strict=True))
    types = dict(zip(names, ("*i64", "*i32", "*i32", "*i32", "i32"), strict=False))
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={at[name]: value for name, value in constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name, type in types.items() if type.startswith("*")},
    )
    options = {"num_warps": program.warps, **kernel.options(capability // 10)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


@cache
def ptx(capability: int) -> str:
    return compiled(kernel.program_kernel, capability, several())


class Code:
    """Control flow graph of a kernel's PTX instructions."""

    def __init__(self, text: str):
        body = re.sub(r"//.*", "", text[text.index(".entry") :])
        parts = (part.strip(" \t\n{") for line in body.splitlines() for part in re.split(r"(?<=[;:])(?!:)", line))
        self.lines = [part for part in parts if re.match(r"@|[a-z]|[$\w]+:$", part) and not part.startswith("{")]
        self.labels: dict[str, list[int]] = {}
        for i, line in enumerate(self.lines):
            if line.endswith(":"):
                self.labels.setdefault(line[:-1], []).append(i)
        self.next = [self._next(i, line) for i, line in enumerate(self.lines)]

    def _next(self, i: int, line: str) -> list[int]:
        jump = re.match(r"(@\S+\s+)?(bra|ret)\S*\s*([$\w]*)", line)
        if not jump:
            return [i + 1] if i + 1 < len(self.lines) else []
        there = [min(self.labels[jump[3]], key=lambda at: abs(at - i))] if jump[2] == "bra" else []
        return there + [i + 1] * bool(jump[1])

    def find(self, pattern: str) -> set[int]:
        return {i for i, line in enumerate(self.lines) if re.match(rf"(@\S+\s+)?{pattern}", line)}

    def after(self, first: set[int], until: set[int]) -> set[int]:
        """Instructions reachable from ``first`` without passing one of ``until``."""
        found, left = set(), list(first)
        while left:
            new = [j for j in self.next[left.pop()] if j not in found]
            found.update(new)
            left += [j for j in new if j not in until]
        return found

    def pointed(self) -> set[int]:
        """Loads and stores through addresses that were themselves loaded: of matrices, not of tables."""
        registers, reads, places = set(), [], {}
        for i, line in enumerate(self.lines):
            into, _, of = line.partition("}" if re.search(r"\s{", line) else ",")
            names = [set(re.findall(r"%rd?\d+", part)) for part in (into, of)]
            if re.search(r"(ld|st)\.global|cp\.async\.\w+\.shared\.global", line):
                address = re.findall(r"\[\s*(%rd\d+)", line)[-1]
                places[i], names[1] = address, names[1] | {address}
                if "ld.global.b64" in line:
                    registers |= names[0] - {address}
            if not re.search(r"\bst\.|cp\.async", line):
                reads.append(names)
        before = -1
        while len(registers) != before:
            before = len(registers)
            registers.update(*(into for into, of in reads if of & registers))
        return {i for i, address in places.items() if address in registers}


def wrong(text: str, groups: int) -> list[str]:
    """What another program or thread could read or write too early or too late, in words."""
    code = Code(text)
    barriers, tickets = code.find(r"bar\.sync\s+0;"), code.find(r"atom\S*\.relaxed\.")
    waits, told = code.find(r"(ld|atom)\S*\.acquire\."), code.find(r"atom\S*\.release\.")
    shares, copies = code.find(r"atom\S*\.acq_rel\."), code.find(r"cp\.async\.c[ag]\.")
    matrices = code.pointed() - waits
    stored = code.find(r"st\S*\.global") & matrices
    table = code.find(r"(ld|st)\S*\.global|cp\.async\.c[ag]") - matrices - waits
    found = {
        "too few or too many atomics": (len(tickets), len(waits), len(told), len(shares)) != (2, 1, 1, groups),
        "not for the whole GPU": any(".gpu" not in code.lines[i] for i in tickets | waits | told | shares),
        "loads that are not coherent": ".nc." in text,
        "tables are written": any(re.search(r"\bst\.|cp\.async|\.v\d", code.lines[i]) for i in table),
        "nothing is read or stored": not (stored and copies and matrices - stored - copies),
        "who waits asks once": waits - code.after(waits, tickets),
        "read before the wait": code.after(matrices, tickets) & waits,
        "read without a barrier after": code.after(waits | shares, barriers) & matrices,
        "told without a barrier after the store": code.after(stored, barriers) & (told | shares),
        "stored and not told": code.after(stored, told) & tickets,
        "the next ticket before all is told": code.after(waits, told) & tickets,
        "still copying": code.after(copies, code.find(r"cp\.async\.wait_(all|group\s+0)")) & (told | shares),
    }
    return [what for what, is_so in found.items() if is_so]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_access_is_too_early(capability):
    assert not wrong(ptx(capability), groups=2)


NO_BARRIER = "told without a barrier after the store"
BROKEN = [  # text replaced in the PTX, and the problem that must be found
    (r"ld\.global\.(v4\.)?b32", r"ld.global.nc.\1b32", "loads that are not coherent"),
    (r"\.gpu\.release", ".cta.release", "not for the whole GPU"),
    (r"\.gpu\.acquire", ".cta.acquire", "not for the whole GPU"),
    (r"\.release\.add", ".relaxed.add", "too few or too many atomics"),
    (r"(?s)(acquire\.b32.*?)bar\.sync\s+0;(.*?)bar\.sync\s+0;", r"\1\2", "read without a barrier after"),
    (r"(?s)(acq_rel.*?)bar\.sync\s+0;(.*?)bar\.sync\s+0;", r"\1\2", "read without a barrier after"),
    (r"(?s)bar\.sync\s+0;((?:(?!bar\.sync).)*\.release)", r"\1", NO_BARRIER),
    (r"(?s)bar\.sync\s+0;((?:(?!bar\.sync).)*acq_rel)", r"\1", NO_BARRIER),
    (r"(cp\.async\.wait_group\s+)0;", r"\g<1>2;", "still copying"),
    (r"(?s)(acquire.*?bar.sync.*?)@%p\d+ bra[^;]+;", r"\1", "who waits asks once"),
    (r"(@%p\d+) (atom\S*relaxed\S* %r\d+, )(\[[^]]*\])", r"\1 st.global.b32 \3, {%r1};\1 \2\3", "tables are written"),
    (r"(@%p\d+ )?st\.global[^;]+;", "", "nothing is read or stored"),
]


@pytest.mark.parametrize("old, new, what", BROKEN)
def test_broken_code_is_detected(old, new, what):
    text, count = re.subn(old, new, ptx(90))
    assert count and what in wrong(text, groups=2)


def test_a_copy_before_the_wait_is_detected():
    lines = ptx(90).splitlines()
    at, copy = (next(i for i, line in enumerate(lines) if name in line) for name in ("gpu.acquire", "cp.async.cg"))
    assert "read before the wait" in wrong("\n".join([*lines[:at], lines[copy], *lines[at:]]), groups=2)


@pytest.mark.parametrize("bug", IN_CODE)
def test_an_injected_bug_is_detected(bug, tmp_path):
    what, *replaced = IN_CODE[bug]
    planted = plant(kernel, tmp_path, *replaced)
    assert what in wrong(compiled(planted.program_kernel, 90, one()), groups=1)


def test_code_without_bugs_passes():
    assert not wrong(compiled(kernel.program_kernel, 90, one()), groups=1)
