"""The fp64 truth, by NumPy: written from the definitions, sharing no code with the library."""

import numpy as np


def svt(W, tau):
    """U max(S - tau, 0) V^T, one matrix."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    return (U * np.maximum(s - tau, 0)) @ Vh


def firm_svt(W, tau, gamma):
    """Singular values up to tau go, those above gamma tau stay as they are, between them they rise in proportion."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    between = gamma / (gamma - 1) * (s - tau)
    return (U * np.where(s <= tau, 0, np.where(s <= gamma * tau, between, s))) @ Vh


def soft_threshold(W, tau):
    return np.sign(W) * np.maximum(np.abs(W) - tau, 0)


def group_shrink(W, tau):
    """Row by row: zero where the norm is at most tau, else scaled by 1 - tau / norm."""
    out = np.zeros_like(W)
    for i, row in enumerate(W):
        norm = np.sqrt(np.sum(row * row))
        if norm > tau:
            out[i] = row - tau * row / norm
    return out


def sparse_group_shrink(W, l1, tau):
    return group_shrink(soft_threshold(W, l1), tau)


def penalty(name, P, tau):
    """The function whose proximal operator the op is."""
    if name == "svt":
        return tau * np.linalg.svd(P, compute_uv=False).sum()
    if name == "group_shrink":
        return tau * np.sqrt((P * P).sum(-1)).sum()
    return tau * np.abs(P).sum()


def project_dual(name, W, tau):
    """Projection on the unit ball of the dual norm, radius tau: what Moreau's identity says W - prox(W) is."""
    if name == "svt":
        U, s, Vh = np.linalg.svd(W, full_matrices=False)
        return (U * np.minimum(s, tau)) @ Vh
    if name == "group_shrink":
        norm = np.sqrt((W * W).sum(-1, keepdims=True))
        return W * np.minimum(1, tau / np.where(norm > 0, norm, 1))
    return np.clip(W, -tau, tau)
