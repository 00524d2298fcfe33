"""Models that read the weight of a layer: its dtype costs nothing, the weight itself is named in the report."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression.reads import weights_read

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
RANK = ck.ranks.fixed(2)
NOTE = "the model reads its weight, for which the product of the factors is formed each time"


class Block(nn.Module):
    """``run(self, x)`` with four layers."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def _as_t5(m, x):
    h = m.q(x).relu()
    if isinstance(m.o.weight, torch.Tensor) and h.dtype != m.o.weight.dtype:
        h = h.to(m.o.weight.dtype)
    return m.o(h.to(m.v.weight.device)) + m.k.weight.shape[0] + m.v.weight.size(1)


def _in_attention(m, x):
    """As CLIP's attention pooling, which passes the weights of four layers to one function."""
    bias = torch.cat([m.q.bias, m.k.bias, m.v.bias])
    return F.multi_head_attention_forward(
        x, x, x, 16, 2, None, bias, None, None, False, 0.0, m.o.weight, m.o.bias, training=m.training,
        use_separate_proj_weight=True, q_proj_weight=m.q.weight, k_proj_weight=m.k.weight, v_proj_weight=m.v.weight,
    )[0]  # fmt: skip


MODELS = {
    "dtype": (_as_t5, set()),
    "function": (lambda m, x: m.o(F.linear(input=x, weight=m.q.weight)), {"q"}),
    "attention": (_in_attention, {"q", "k", "v", "o"}),
    "called and read": (lambda m, x: m.q(x) + m.q.weight.square().sum() + m.o(x), {"q"}),
    "another layer's": (lambda m, x: m.o(x) + (m.q.weight @ m.k.weight).sum(), {"q", "k"}),
    "data": (lambda m, x: m.o(x) @ m.q.weight.data.T, {"q"}),
    "item": (lambda m, x: m.o(x) * m.q.weight[0, 0], {"q"}),
    "kept": (lambda m, x: m.o(x) + torch.stack([m.q.weight, m.k.weight]).mean(), {"q", "k"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_reads_are_found_and_give_the_product(kind):
    run, read = MODELS[kind]
    model = Block(run).eval()
    with torch.no_grad(), weights_read(model, "qkvo") as found:
        model(X)
    assert found == read
    small, report = ck.compress(model, RANK, (X,), goal="size")
    assert [row.rank for row in report.layers] == [2] * 4
    assert {row.name for row in report.layers if NOTE in row.reason} == read
    for training in (False, True):
        torch.testing.assert_close(small.train(training)(X), ck.to_dense(small).train(training)(X))
    assert len(ck.allocate(model, 0.9, (X,), of="params")) == 4
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in model.modules())


def test_a_layer_that_is_read_is_not_factorized_for_speed():
    def run(m, x):
        return F.linear(m.o(x), m.q.weight)

    _, report = ck.compress(Block(run).eval(), RANK, (X,), goal="speed")
    reasons = {row.name: row.reason for row in report.layers}
    assert reasons["q"] == NOTE and reasons["k"] == "the example inputs do not reach it"
