"""A study with all arms that runs in seconds."""

from compaware_kernels.study.config import Config, Key
from compaware_kernels.study.data import InMemory
from compaware_kernels.study.images import Images, digits

STRENGTHS = {
    "plain": {}, "nuclear": {"nuclear": 20}, "nuclear-steps": {"nuclear": 20}, "reload": {"nuclear": 20, "group": 1},
    "nuclear+group": {"nuclear": 8, "group": 0.4}, "group": {"group": 0.8}, "l1": {"l1": 0.5}, "l2": {"l2": 1e-3},
    "sparse-group": {"group": 0.4, "l1": 0.4}, "nuclear-loss": {"nuclear": 3}, "trp": {"energy": 0.9},
    "fixed-rank": {"share": 0.25}, "magnitude": {"sparsity": 0.8}, "variational": {"cost": 0.01},
}  # fmt: skip
CONFIG = Config(
    seeds=1, epochs=4, batch=20, lr=0.02, tune_epochs=1, rules=("energy:0.8", "energy:0.999"), sparsities=(0.5,),
    arms={arm: [strength] for arm, strength in STRENGTHS.items()},
)  # fmt: skip


def some_digits() -> InMemory:
    d = digits()
    few = Images(d.name, d.train_x[:270], d.train_y[:270], d.test_x[:180], d.test_y[:180])
    return InMemory(few, CONFIG.validation)


def key(arm: str) -> Key:
    return Key(arm, tuple((name, float(value)) for name, value in STRENGTHS[arm].items()), 0)
