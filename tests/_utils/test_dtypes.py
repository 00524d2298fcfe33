"""Rounding to tf32, against its definition."""

import torch

from compaware_kernels._utils.dtypes import nearest_tf32


def test_nearest_tf32():
    t = torch.randn(10_000) * torch.logspace(-30, 30, 10_000)
    rounded = nearest_tf32(t)
    assert not (rounded.view(torch.int32) & 0x1FFF).any(), "10 explicit bits are left"
    spacing = torch.exp2(t.double().abs().log2().floor() - 10)
    assert ((rounded.double() - t).abs() <= spacing / 2).all()
    assert nearest_tf32(torch.tensor([1 + 2**-11, 1 - 2**-12])).tolist() == [1 + 2**-10, 1], "halves away from zero"
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    torch.testing.assert_close(nearest_tf32(special), special, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(nearest_tf32(t.view(100, 100).mT), rounded.view(100, 100).mT), "of any strides"
