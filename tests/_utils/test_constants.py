"""Constants that C++ and Python share: what Python reads from the headers is what a C++ compiler finds in them."""

import re
import shutil
import subprocess

import pytest
from scipy.stats import chi2

from compaware_kernels._utils.constants import CSRC, constant, enumerators, members
from compaware_kernels.proximal import error_bounds
from compaware_kernels.proximal.cuda import device_structs

ENUMS = ("DType", "Gate", "Coefficient", "Report", "Method")
STRUCTS = ("Chunk", "Small", "Layer")


def test_constants_are_those_of_the_compiler(tmp_path):
    header = (CSRC / "core" / "constants.h").read_text()
    names = re.findall(r"^constexpr \w+ (\w+)", header, re.MULTILINE)
    assert len(names) >= 15
    claims = [f"{name} == {constant(name)!r}" for name in names]
    for enum in ENUMS:
        spelled = re.findall(r"\w+", re.search(rf"enum (?:class )?{enum} {{(.*?)}};", header)[1])
        assert len(spelled) == len(enumerators(enum))
        claims += [f"int({enum}::{name}) == {code}" for code, name in enumerate(spelled)]
    for struct in STRUCTS:
        claims += [f"offsetof({struct}, {name}) == {8 * i}" for i, name in enumerate(members(struct))]
        claims.append(f"sizeof({struct}) == {8 * len(members(struct))}")
    source = tmp_path / "claims.cpp"
    lines = [f'static_assert({claim}, "{claim}");' for claim in claims]
    source.write_text("\n".join(['#include "step.h"', "#include <cstddef>", "using namespace compaware;", *lines]))
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{CSRC / 'cuda'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("look", [constant, enumerators, members])
def test_what_is_not_there_is_refused(look):
    with pytest.raises(LookupError, match=r"kAbsent: wanted a name that core/constants\.h or cuda/step\.h defines"):
        look("kAbsent")


def test_names_of_codes():
    """Names that Python code spells."""
    assert enumerators("Gate") == ("clear", "try", "apply", "dense", "restart")
    assert {"project", "power", "gram", "scale_sign", "scale_root", "root_check"} <= set(enumerators("Coefficient"))
    assert device_structs.METHODS[0] == "zero" and device_structs.METHODS[-1] == "refused: NaN or Inf"
    assert len(set(device_structs.METHODS)) == len(enumerators("Method"))


def test_the_factor_of_a_norm_bound():
    """With kFactor, a bound from kProbes Gaussian vectors fails as rarely as all bounds."""
    probes, factor = constant("kProbes"), constant("kFactor")
    assert factor == pytest.approx(error_bounds._factor(probes), rel=1e-8)
    assert chi2.cdf(1 / factor**2, probes) <= error_bounds.FAILURE
