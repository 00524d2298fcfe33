"""Fuzz of the ops: transforms of torch x ops x odd tensors, each against a loop or the fp64 truth.

    python -m tests.fuzz.ops 10000 [--seed 0]

Whatever the tensors: no crash, no silent wrong value, no exception but the documented ones, and none where there should
be a result. ``python -m tests.fuzz.ops 1 --seed S`` remakes one case.
"""

from __future__ import annotations

import random
import traceback
import warnings

import torch
import typer

from tests.fuzz import driver, inplace, lowrank, prox

FAMILIES = {prox.case: 4, lowrank.op_case: 3, lowrank.layer_case: 1, inplace.case: 2}  # and how often


def check(seed: int) -> tuple[str, list[str]]:
    """Name of the case of this seed, and what it violates."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, body = rng.choices(list(FAMILIES), list(FAMILIES.values()))[0](rng)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            violations = list(body())
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
            where = "/".join(f"{f.filename.split('/')[-1]}:{f.lineno}" for f in frames[-3:])
            violations = [f"{type(error).__name__} in {where}: {str(error)[:200]}"]
    fallbacks = [str(w.message)[:100] for w in caught if "performance drop" in str(w.message)]
    return name, violations + fallbacks[:1]


def main(cases: int, seed: int = 0) -> None:
    """Check the cases of so many seeds."""
    driver.hunt("tests.fuzz.ops", cases, seed)


if __name__ == "__main__":
    typer.run(main)
