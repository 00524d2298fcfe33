"""First and second derivatives of singular value thresholding, finite at repeated and at zero singular values.

With ``p(x) = max(x - tau, 0)`` on the eigenvalues (``+s``, ``-s``, and ``|m - n|`` zeros) of the symmetric dilation
``[[0, W], [W^T, 0]]``, ``svt(W)`` is twice the upper right block of ``p``.  In the basis of the eigenvectors, where G
and H stand for the dilations of two directions, the derivatives are divided differences of p:

    Dp[G]_ij     = p[i, j] G_ij
    D2p[G, H]_ij = sum_k p[i, k, j] (G_ik H_kj + H_ik G_kj)

p is linear on each side of tau, so ``p[i, k, j]`` is zero unless tau lies between the three, and no quotient divides
by the distance of two eigenvalues on one side: ties and zeros need no limit.  The only singularity left is that of
svt itself: a singular value just above tau next to one just below.

The singular values, the second output of svt, have second derivatives of their own only where they are distinct.
Between exact ties above tau the off-diagonal part is taken as zero, which is right for their sum; for a curved
function of them it depends on more than its gradient ``g``, so that a second derivative there is incomplete.

The ops are internal, and each serves reverse and forward mode.  ``W``, ``G``, ``H`` ``[..., m, n]``, ``g``, ``h``
``[..., k]``, ``k = min(m, n)``, ``tau`` ``[...]``: one dtype, the same number of leading axes, and these broadcast.
``tau >= 0``.

Source: Daleckii & Krein, AMS Transl. 47, 1965; Higham, Functions of Matrices, 2008, theorem 3.11.  Second order:
Najfeld & Havel, Adv. Appl. Math. 16, 1995; Higham & Relton, SIAM J. Matrix Anal. Appl. 35(3), 2014.  The dilation:
Golub & Van Loan, Matrix Computations, 8.6.  Functions of singular values: Noferini, SIAM J. Matrix Anal. Appl. 38(2),
2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.autocast import without_autocast
from .transforms import register_derivatives, register_vmap

__all__ = ["svt_backward", "svt_double_backward"]


class _Svd(NamedTuple):
    """Thin SVD of W, or of W^T where that is the tall one: then V ``[..., k, k]`` has no null space."""

    tall: Callable[[Tensor], Tensor]  # transposes wide matrices, both ways
    U: Tensor
    s: Tensor
    V: Tensor
    tau: Tensor  # [..., 1]
    alive: Tensor  # [..., k], s > tau


def _svd(W: Tensor, tau: Tensor) -> _Svd:
    """Thin SVD of the tall one of W and W^T."""
    wide, tau = W.shape[-2] < W.shape[-1], tau[..., None]
    U, s, Vh = torch.linalg.svd(W.mT if wide else W, full_matrices=False)
    return _Svd((lambda X: X.mT) if wide else (lambda X: X), U, s, Vh.mT, tau, s > tau)


class _Weights(NamedTuple):
    """Divided differences of an odd function y: ``y[s_i, s_j]``, ``y[s_i, -s_j]`` and ``y[s_i, 0]``."""

    minus: Tensor  # [..., k, k]
    plus: Tensor  # [..., k, k]
    null: Tensor  # [..., k]


def _inverse(x: Tensor) -> Tensor:
    """``1 / x`` where x > 0; elsewhere any finite number, to be multiplied by zero."""
    return 1 / x.clamp_min(torch.finfo(x.dtype).tiny)


def _step_weights(s: Tensor, y: Tensor) -> _Weights:
    """Divided differences of a piecewise constant y, with values ``[..., k]`` at the singular values."""
    gap = s[..., :, None] - s[..., None, :]
    minus = (y[..., :, None] - y[..., None, :]) * gap.sign() * _inverse(gap.abs())
    plus = (y[..., :, None] + y[..., None, :]) * _inverse(s[..., :, None] + s[..., None, :])
    return _Weights(minus, plus, y * _inverse(s))


def _shrink_weights(d: _Svd) -> _Weights:
    """Divided differences of ``max(s - tau, 0)``: exactly 1 above tau (no rounded quotient); all 1 at tau = 0."""
    minus, plus, null = _step_weights(d.s, (d.s - d.tau).clamp_min(0))
    both, identity = d.alive[..., :, None] & d.alive[..., None, :], d.tau == 0
    minus = torch.where(both | identity[..., None], 1, minus)
    return _Weights(minus, torch.where(identity[..., None], 1, plus), torch.where(identity, 1, null))


class _Matrix(NamedTuple):
    """Split of a tall X ``[..., m, n]``: ``X = U (S + K) V^T + B V^T``, S symmetric, K skew, B orthogonal to U."""

    X: Tensor
    S: Tensor
    K: Tensor
    B: Tensor


def _split(d: _Svd, G: Tensor) -> _Matrix:
    """Symmetric, skew and orthogonal part of a direction G in the singular basis of W."""
    X = d.tall(G)
    A = d.U.mT @ X @ d.V
    return _Matrix(X, (A + A.mT) / 2, (A - A.mT) / 2, X @ d.V - d.U @ A)


def _weigh(w: _Weights, X: _Matrix) -> tuple[Tensor, Tensor]:
    """Multiply S, K and B by their divided differences: between s_i and s_j, s_i and -s_j, s_i and 0."""
    return w.minus * X.S + w.plus * X.K, w.null[..., None, :] * X.B


def _join(d: _Svd, core: Tensor, left: Tensor) -> Tensor:
    """Back from the singular basis: ``U core V^T + left V^T``."""
    return d.tall((d.U @ core + left) @ d.V.mT)


def _diagonal(X: _Matrix) -> Tensor:
    return X.S.diagonal(dim1=-2, dim2=-1)


def _expand(W: Tensor, tau: Tensor, *others: Tensor) -> list[Tensor]:
    """Expand the others (matrix, vector, matrix, vector) to all leading axes; W and tau stay, so one SVD serves all."""
    leading = [x.shape[: x.ndim - axes] for x, axes in zip((W, tau, *others), (2, 0, 2, 1, 2, 1), strict=False)]
    batch = torch.broadcast_shapes(*leading)
    return [x.expand((*batch, *x.shape[len(batch) :])) for x in others]


# --- first derivative -----------------------------------------------------------------------------------------------


@torch.library.custom_op("compaware::svt_backward", mutates_args=())
def svt_backward(W: Tensor, tau: Tensor, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``Df[G] + U diag(g) V^T`` and ``diag(U^T G V) + g``, U and V of the singular values above tau, else zero.

    With the gradients of P and s as ``G`` and ``g`` these are the gradient of W, and, up to the sign and summed, that
    of tau. With the tangent of W as ``G`` and minus that of tau as every ``g`` they are the tangents of P and s.
    Where a singular value is tau there is no derivative; it counts as below.
    """
    G, g = _expand(W, tau, G, g)
    with without_autocast():
        d = _svd(W, tau)
        return _first(d, _split(d, G), g * d.alive)


def _first(d: _Svd, G: _Matrix, g: Tensor) -> tuple[Tensor, Tensor]:
    core, left = _weigh(_shrink_weights(d), G)
    return _join(d, core + torch.diag_embed(g), left).contiguous(), _diagonal(G) * d.alive + g


@svt_backward.register_fake
def _(W, tau, G, g):
    G, g = _expand(W, tau, G, g)
    return W.new_empty(G.shape), W.new_empty(g.shape)


# --- second derivative ----------------------------------------------------------------------------------------------


@torch.library.custom_op("compaware::svt_double_backward", mutates_args=())
def svt_double_backward(
    W: Tensor, tau: Tensor, G: Tensor, g: Tensor, H: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of :func:`svt_backward` at ``(G, g)``, both its modes, along ``(H, h)``, shaped as ``(G, g)``.

    Its two results, times H and h, make a number that is symmetric in the pairs, ``<Df[G], H> + <U diag(g) V^T, H> +
    <U diag(h) V^T, G> + <g, h>``. Returned are the gradients of it by W, tau, G and g, in reverse mode; and in forward
    mode, with the tangent of W as ``H`` and minus that of tau as every ``h``, the first is the tangent of the first
    result, and the fifth that of the second, ``[..., k]``, where G and g stay.
    By W it is ``D2f[G, H]`` (f is a gradient, so D2f is symmetric in all three directions) and first derivatives of
    steps: of g and of h above tau, and by tau of ``df / dtau``, which is -1 above tau.
    """
    G, g, H, h = _expand(W, tau, G, g, H, h)
    with without_autocast():
        d = _svd(W, tau)
        G, H, g, h = _split(d, G), _split(d, H), g * d.alive, h * d.alive

        core, left = _weigh(_step_weights(d.s, d.alive.to(d.s.dtype)), H)
        by_tau = -(core * (G.S + G.K)).sum((-2, -1)) - (left * G.B).sum((-2, -1))

        by_g, by_h = _weigh(_step_weights(d.s, g), H), _weigh(_step_weights(d.s, h), G)
        by_W = _join(d, *(x + y for x, y in zip(by_g, by_h, strict=True))) + d.tall(_second(d, G, H))
        return by_W.contiguous(), by_tau, *_first(d, H, h), _second_of_values(d, G, H)


def _second_of_values(d: _Svd, G: _Matrix, H: _Matrix) -> Tensor:
    """Second derivatives of the singular values above tau along G and H, ``[..., k]``; else zero."""
    gap = d.s[..., :, None] - d.s[..., None, :]
    minus, plus = gap.sign() * _inverse(gap.abs()), _inverse(d.s[..., :, None] + d.s[..., None, :])
    pairs = 2 * (minus * G.S * H.S + plus * G.K * H.K).sum(-1)
    return (pairs + _inverse(d.s) * (G.B * H.B).sum(-2)) * d.alive


def _second(d: _Svd, G: _Matrix, H: _Matrix) -> Tensor:
    """``D2f[G, H]`` of the tall W.

    For an eigenvalue a above tau (always some +s) and b at most tau let ``c = 1 / (a - b)``, ``hi = (a - tau) c`` and
    ``lo = (tau - b) c``, both in [0, 1].  Then ``p[a, b, a'] = c lo'``, ``p[b, a, b'] = c hi'`` in any order of the
    arguments, and zero on one side of tau.  These are products, so the sum over k is three products of matrices,
    for two above tau (aa), one (ab) and none (bb), and no tensor has three axes of size k.
    """
    k, (values, left, right) = d.s.shape[-1], _eigenvectors(d, G, H)
    G, H = (half + half.mT for half in (left.mT @ G.X @ right, left.mT @ H.X @ right))
    a, b, tau = d.s[..., :, None], values[..., None, :], d.tau[..., None]
    below = ~torch.nn.functional.pad(d.alive, (0, values.shape[-1] - k))
    across = (d.alive & (d.tau != 0))[..., :, None] & below[..., None, :]  # f is linear where tau is 0

    c = across * _inverse(a - b)
    hi, lo = c * (a - tau), c * (tau - b)
    above_G, above_H = G[..., :k, :], H[..., :k, :]
    cG, cH = c * above_G, c * above_H
    aa = cG @ (lo * above_H).mT
    ab = lo * (above_G[..., :k] @ cH + above_H[..., :k] @ cG) + hi * (cG @ H + cH @ G)
    D = cG.mT @ (hi * above_H)  # bb, and to it half of what is symmetric
    D[..., :k, :] += ab
    D[..., :k, :k] += aa
    return 2 * left @ (D + D.mT) @ right.mT


def _eigenvectors(d: _Svd, G: _Matrix, H: _Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues ``s, -s, 0`` and eigenvectors ``[left; right]`` of the dilation; of its null space what G, H need."""
    batch, k = G.B.shape[:-2], d.s.shape[-1]
    U, V, s = d.U.expand_as(G.B), d.V.expand(*batch, k, k), d.s.expand(*batch, k)
    null = torch.linalg.qr(torch.cat([U, G.B, H.B], -1)).Q[..., k:]  # after U, so orthogonal to it, whatever B's rank
    N = null.shape[-1]
    left = torch.cat([U / 2**0.5, U / 2**0.5, null], -1)
    right = torch.cat([V / 2**0.5, -V / 2**0.5, null.new_zeros(*batch, k, N)], -1)
    return torch.cat([s, -s, null.new_zeros(*batch, N)], -1), left, right


@svt_double_backward.register_fake
def _(W, tau, G, g, H, h):
    G, g, _, _ = _expand(W, tau, G, g, H, h)
    matrix, values = G.shape, g.shape
    return tuple(W.new_empty(shape) for shape in (matrix, matrix[:-2], matrix, values, values))


# --- autograd and vmap ----------------------------------------------------------------------------------------------


def _fold(info, in_dims, *args: Tensor) -> list[Tensor]:
    """vmap rule: unmapped arguments get an axis of length 1; under jacrev only G is mapped, so W has one SVD."""
    return [x[None] if dim is None else x.movedim(dim, 0) for x, dim in zip(args, in_dims, strict=True)]


def _double_backward(ctx, H: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    grads = svt_double_backward(*ctx.saved_tensors, H, h)[:4]
    return tuple(grad.sum_to_size(x.shape) for grad, x in zip(grads, ctx.saved_tensors, strict=True))


def _double_jvp(inputs, W_t: Tensor, tau_t: Tensor, G_t: Tensor, g_t: Tensor) -> tuple[Tensor, Tensor]:
    W, tau, G, g = inputs
    first = svt_backward(W, tau, G_t, g_t)
    by_W, *_, of_s = svt_double_backward(W, tau, G, g, W_t, -tau_t[..., None].expand(*tau_t.shape, g.shape[-1]))
    return first[0] + by_W, first[1] + of_s


def _third_derivative(ctx, *args):
    raise NotImplementedError("svt: wanted a first or a second derivative; got a third, which is not implemented")


register_derivatives(svt_backward, _double_backward, _double_jvp)
register_derivatives(svt_double_backward, _third_derivative, _third_derivative)
for _op in (svt_backward, svt_double_backward):
    register_vmap(_op, _fold)
