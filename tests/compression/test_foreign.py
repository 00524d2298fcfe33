"""Foreign architectures that run fast; ``python -m tests.compression.foreign`` runs all."""

import pytest

from . import foreign

FAST = (
    "torch.tied embedding", "torch.two parents", "torch.encoder with a mask", "torch.hooks", "torch.scripted part",
    "torch.output size", "torch.keyword only", "torch.old weight norm", "torch.versioned", "torch.masked",
    "transformers.gpt2", "transformers.t5", "transformers.vit",
)  # fmt: skip
SLOW = (
    *(name for name in foreign.CASES if name.startswith("torch.") and name not in FAST),
    "transformers.bert", "transformers.deberta", "transformers.llama", "transformers.mixtral",
    "transformers.whisper", "transformers.clip", "transformers.mamba",
    "timm.test_vit", "timm.test_byobnet", "timm.test_nfnet", "timm.nf_resnet26", "timm.pit_ti_224",
    "torchvision.mnasnet0_5", "torchvision.squeezenet1_1",
)  # fmt: skip


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_foreign_architecture(name):
    family = name.partition(".")[0]
    if family != "torch":
        pytest.importorskip("tests.helpers.timm_case" if family in ("timm", "torchvision") else family)
    assert not list(foreign.failures(name))


def test_families_are_as_large_as_they_should_be():
    sizes = {family: sum(name.startswith(f"{family}.") for name in foreign.CASES)
             for family in ("torch", "transformers", "timm", "torchvision")}  # fmt: skip
    assert sizes["torch"] >= 75 and sizes["transformers"] >= 90 and sizes["timm"] >= 80 and sizes["torchvision"] >= 10


def test_failures_are_found_and_named(monkeypatch):
    """A function that is wrong by a hundredth, one that fails, and one that takes none."""
    from compaware_kernels.compression import convert

    def wrong(model):
        import torch

        dense = convert._convert(model, lambda layer: layer.to_dense())
        with torch.no_grad():
            dense[0].weight.mul_(1.02)
        return dense

    def fails(model):
        raise KeyError("weight")

    monkeypatch.setattr(foreign.ck, "to_dense", wrong)
    monkeypatch.setattr(foreign.ck, "to_plain", fails)
    found = dict(foreign.failures("torch.sequential"))
    assert set(found) == {"to_dense", "to_plain"}
    assert "relative error" in found["to_dense"] and found["to_plain"].startswith(
        "KeyError: 'weight' (test_foreign.py:"
    )
    assert foreign.chosen(["2"])[:2] == ["torch.one layer", "torch.one convolution"] and len(foreign.chosen(["2"])) == 8
    assert foreign.chosen(["torch.lstm*"]) == ["torch.lstm", "torch.lstm cell"]
    with pytest.raises(SystemExit, match="no model matches nothing"):
        foreign.chosen(["nothing"])
