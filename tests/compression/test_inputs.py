"""Models that take keyword arguments: example inputs and calibration inputs of every function that takes them."""

from collections import UserDict

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression.arguments import Inputs
from compaware_kernels.compression.dead_neurons import remove_dead_neurons
from compaware_kernels.compression.macs import count_macs

TOKENS, MASK = torch.arange(6).reshape(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])


class Model(nn.Module):
    """Wants its arguments by keyword, as T5 and CLIP do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.a, self.b = nn.Embedding(6, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        with torch.no_grad():
            self.a.weight[7] = 0

    def forward(self, input_ids=None, attention_mask=None, *, scale=1.0):
        y = self.b(torch.relu(self.a(self.words(input_ids))))
        return {"last": scale * (y if attention_mask is None else y * attention_mask[..., None])}


class Batch(UserDict):
    """A mapping that is no dict, as tokenizers return."""


FORMS = {
    "example_kwargs": ((TOKENS,), {"attention_mask": MASK, "scale": 2.0}),
    "only example_kwargs": ((), {"input_ids": TOKENS, "attention_mask": MASK, "scale": 2.0}),
    "mapping": ({"input_ids": TOKENS, "attention_mask": MASK, "scale": 2.0}, None),
    "mapping and more": ({"input_ids": TOKENS, "attention_mask": MASK}, {"scale": 2.0}),
    "no dict": (Batch(input_ids=TOKENS, attention_mask=MASK, scale=2.0), None),
    "list": ([TOKENS, MASK], {"scale": 2.0}),
}
CALIBRATION = [{"input_ids": TOKENS, "scale": 2.0}, Batch(input_ids=TOKENS[:1], attention_mask=MASK[:1], scale=1)]


@pytest.mark.parametrize("name", FORMS)
def test_keywords_are_passed_on(name):
    inputs, kwargs = FORMS[name]
    model, more = Model().eval(), {"example_kwargs": kwargs, "calibration": CALIBRATION}
    wanted = model(TOKENS, MASK, scale=2.0)["last"]
    ranks = ck.allocate(model, 0.5, inputs, **more)
    assert set(ranks) == {"a", "b"}
    small, report = ck.compress(model, ranks, inputs, goal="size", **more)
    assert report.macs <= 0.5 * report.macs_before == 0.5 * 2 * 6 * 32 * 32 and report.layers[0].neurons_removed == 1
    assert float((small(TOKENS, MASK, scale=2.0)["last"] - wanted).norm() / wanted.norm()) < 0.5
    fast, _ = ck.compress(model, ck.ranks.fixed(1), inputs, measure=True, **more)
    fused = ck.fuse(small, inputs, kwargs)
    torch.testing.assert_close(fused(TOKENS, MASK, scale=2.0), small(TOKENS, MASK, scale=2.0))
    assert count_macs(model, inputs, kwargs)["a"] == 6 * 32 * 32
    assert remove_dead_neurons(model, inputs, example_kwargs=kwargs)[1] == {"a": 1}


def test_a_mapping_in_a_tuple_is_a_positional_input():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, batch):
            return self.layer(batch["x"])

    batch = {"x": torch.randn(2, 8)}
    _, report = ck.compress(Nested(), ck.ranks.fixed(2), (batch,), goal="size", calibration=[(batch,)])
    assert report.layers[0].rank == 2


@pytest.mark.parametrize(
    ("inputs", "kwargs", "words"),
    [
        (TOKENS, None, r"example_inputs: wanted a tuple of the model's inputs, \(x,\); got a tensor"),
        (3, None, r"example_inputs: wanted a tuple of the model's inputs, \(x,\); got int"),
        ("x", None, r"example_inputs: wanted a tuple of the model's inputs, \(x,\); got str"),
        ({0: TOKENS}, None, "example_inputs: wanted a mapping from names of arguments; got dict"),
        ((TOKENS,), (MASK,), "example_kwargs: wanted a mapping from names of arguments; got tuple"),
        ({"x": TOKENS}, {"x": MASK}, "example_kwargs: wanted other names than in example_inputs; got x in both"),
    ],
)
def test_other_example_inputs(inputs, kwargs, words):
    for function in (
        lambda: ck.compress(Model(), ck.ranks.fixed(1), inputs, example_kwargs=kwargs),
        lambda: ck.allocate(Model(), 0.5, inputs, example_kwargs=kwargs),
        lambda: ck.fuse(Model(), inputs, kwargs),
    ):
        with pytest.raises(TypeError, match=words):
            function()


def test_iterables_are_still_taken():
    assert Inputs.of(iter((TOKENS, MASK))).args == (TOKENS, MASK)


@pytest.mark.parametrize("batch", [TOKENS, "x", 3])
def test_calibration_batches(batch):
    with pytest.raises(TypeError, match=r"calibration: wanted inputs of the model, \[\(x,\), ...\]; got one of"):
        ck.compress(Model(), ck.ranks.fixed(1), (TOKENS,), example_kwargs={"scale": 1}, calibration=[batch])
    with pytest.raises(TypeError, match="got one of str"):  # one batch instead of a list of batches
        ck.compress(Model(), ck.ranks.fixed(1), (TOKENS,), example_kwargs={"scale": 1}, calibration=CALIBRATION[0])
