"""CUDA C++ kernels: NVRTC compiles them for every architecture, without spills."""

import re

import pytest

from tests.emulation import nvrtc_aot as aot

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.skipif(aot.nvrtc() is None, reason="nvidia-cuda-nvrtc is not installed"),
]

MANY_NUMBERS = """
#include "portable.h"
INLINE __device__ void turn(double* x) {
  double v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[63 - i] * v[i];
}
CK_KERNEL(1024) ck_many(double* x) { turn(x); }"""
MUCH_SHARED = """
#include "portable.h"
CK_KERNEL(32) ck_much(float* x) {
  __shared__ float all[12289];
  for (int i = threadIdx.x; i < 12289; i += 32) all[i] = x[i];
  __syncthreads();
  x[threadIdx.x] = all[x[0] > 0 ? 5 : 12288];
}"""


def declared() -> set[str]:
    texts = [path.read_text() for path in (aot.CSRC / "cuda").glob("*.cuh")]
    return {name for text in texts for name in re.findall(r"^CK_KERNEL\(.*?\)\s+(ck_\w+)\(", text, re.MULTILINE)}


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_no_kernel_spills(arch):
    codes = aot.codes(arch)
    assert set(codes) == declared()
    assert not {name: found for name, code in codes.items() if (found := aot.problems(code))}


def test_every_kernel_has_a_launcher():
    table = (aot.CSRC / "cuda" / "kernels.cuh").read_text()
    assert set(re.findall(r"X\((ck_\w+)\)", table)) == declared()


@pytest.mark.parametrize("inline", ["__forceinline__", "__noinline__"])
def test_spills_are_reported(inline):
    (found,) = aot.problems(aot.codes("90a", MANY_NUMBERS.replace("INLINE", inline))["ck_many"])
    assert re.fullmatch(r"\d+ bytes of spills", found)


def test_too_much_shared_memory_is_reported():
    with pytest.raises(ValueError, match="too much shared data"):
        aot.codes("120", MUCH_SHARED)


def test_compilation_errors_are_raised():
    with pytest.raises(ValueError, match='identifier "undeclared" is undefined'):
        aot.codes("80", "__device__ int x = undeclared;")
