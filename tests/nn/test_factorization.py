"""Truncated SVD of tall, square, wide, batched and empty matrices."""

import pytest
import torch

from compaware_kernels.nn.factorization import SVD, singular_values
from compaware_kernels.nn.truncation import factors


@pytest.mark.parametrize("shape", [(1, 9, 4), (1, 4, 9), (3, 5, 5), (2, 3, 7), (2, 1, 6), (0, 3, 4), (1, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_svd(shape, dtype):
    torch.manual_seed(0)
    M = torch.randn(shape).to(dtype)
    svd, k = SVD.of(M), min(shape[1:])
    assert [tuple(T.shape) for T in svd] == [(shape[0], shape[1], k), (shape[0], k), (shape[0], k, shape[2])]
    assert all(T.dtype == torch.float64 and not T.requires_grad for T in svd)
    torch.testing.assert_close((svd.U * svd.s[:, None]) @ svd.Vh, M.double())
    eye = torch.eye(k, dtype=torch.float64).expand(shape[0], k, k)
    torch.testing.assert_close(svd.U.mT @ svd.U, eye)
    torch.testing.assert_close(svd.Vh @ svd.Vh.mT, eye)
    torch.testing.assert_close(svd.s, torch.linalg.svdvals(M.double()))
    torch.testing.assert_close(svd.s, singular_values(M))
    if k and shape[0]:
        U, V = factors(M.double(), 1)
        assert float((M - U @ V).square().sum()) == pytest.approx(float(svd.s[:, 1:].square().sum()), abs=1e-12)
        torch.testing.assert_close(U.norm(dim=(1, 2)), V.norm(dim=(1, 2)))
