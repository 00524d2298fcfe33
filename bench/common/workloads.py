"""Benchmark workloads: layer shapes of networks, and weights with the spectra that proximal training produces.

Run as a script, it prints this machine's device name in a form that is fit for a file name.

:func:`drifted` models how weights change between two proximal steps. Its numbers were measured on a small convolutional
network trained on digits by SGD with momentum, with a proximal step after every or every tenth optimizer step. In units
of the threshold tau, before each proximal step: singular values above tau from 1 to 150 (every tenth step) or 1,500
(every step), evenly spaced on a logarithmic scale; the part outside the previous singular subspaces has a norm of 0.35
to 0.9 (spectral) and 0.6 to 2.2 (Frobenius); the previous singular vectors move by 0.15 to 0.5 divided by their
singular value, all in a few directions, as gradients do.
"""

import math
import re
import time

import torch

from compaware_kernels.environment import info

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST = 300.0  # singular value, in units of tau
OUTSIDE, TANGENT, DECAY = 0.6, 0.3, -0.7

# ResNets, He et al. 2016: blocks, width, input channels of each stage. A basic block is two 3x3 convolutions, a
# bottleneck 1x1, 3x3 and 1x1 to 4 x width.
BASIC = ((2, 64, 64), (2, 128, 64), (2, 256, 128), (2, 512, 256))
BOTTLENECK = ((3, 64, 64), (4, 128, 256), (6, 256, 512), (3, 512, 1024))


def resnet50() -> list[tuple[int, int]]:
    """The 53 convolutions and the classifier as matrices of neurons [O, C k k]: 25.5 million parameters."""
    shapes = [(64, 3 * 49)]
    for blocks, width, inputs in BOTTLENECK:
        shapes.append((4 * width, inputs))  # the shortcut
        for _ in range(blocks):
            shapes += [(width, inputs), (width, 9 * width), (4 * width, width)]
            inputs = 4 * width
    return [*shapes, (1000, 2048)]


def resnet18() -> list[tuple[int, int]]:
    """The 20 convolutions and the classifier: 11.7 million parameters."""
    shapes = [(64, 3 * 49)]
    for blocks, width, inputs in BASIC:
        if inputs != width:
            shapes.append((width, inputs))
        for _ in range(blocks):
            shapes += [(width, 9 * inputs), (width, 9 * width)]
            inputs = width
    return [*shapes, (1000, 512)]


def vit_b() -> list[tuple[int, int]]:
    """ViT-B/16 (Dosovitskiy et al. 2021): patches, 12 blocks of attention and MLP, classifier: 86 million."""
    block = [(3 * 768, 768), (768, 768), (3072, 768), (768, 3072)]
    return [(768, 768), *block * 12, (1000, 768)]


def lenet() -> list[tuple[int, int]]:
    """LeNet-5 (LeCun et al. 1998)."""
    return [(6, 25), (16, 150), (120, 400), (84, 120), (10, 84)]


def small(size: int, count: int = 1000) -> list[tuple[int, int]]:
    """Square matrices of this size, all alike in shape."""
    return [(size, size)] * count


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, device=DEVICE)).Q


def low_rank(shapes: list[tuple[int, int]], share: float | int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Bases U [m, r], V [n, r] of a low-rank weight for each shape [m, n]; share: r itself, or r over min(m, n)."""
    ranks = [share if isinstance(share, int) else max(1, round(share * min(shape))) for shape in shapes]
    return [(orthonormal(m, r), orthonormal(n, r)) for (m, n), r in zip(shapes, ranks, strict=True)]


def shrunk(bases: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Low-rank weights as a proximal step with tau = 1 leaves them: singular values s - 1, s from 1.5 to LARGEST."""
    spectra = [torch.logspace(math.log10(1.5), math.log10(LARGEST), U.shape[1], device=DEVICE) for U, _ in bases]
    return [(U * (s - 1)) @ V.mT for (U, V), s in zip(bases, spectra, strict=True)]


def drifted(
    weights: list[torch.Tensor], bases: list[tuple[torch.Tensor, torch.Tensor]], directions: int | None = None
) -> list[torch.Tensor]:
    """Weights before the next proximal step: singular values regrown by tau, plus the drift described above.

    In all directions, or in so many: a product with the full rank of a very wide matrix takes long.
    """
    moved = []
    for W, (U, V) in zip(weights, bases, strict=True):
        m, n = W.shape
        q = min(m, n, directions or m)
        falling = torch.arange(1.0, q + 1, device=DEVICE) ** DECAY
        left, right = (torch.randn(size, q, device=DEVICE) / math.sqrt(size) for size in (m, n))
        H, K = (torch.randn(U.shape[1], q, device=DEVICE) * falling / falling.norm() for _ in range(2))
        outside = OUTSIDE * (left * falling) @ right.mT
        moved.append(W + U @ V.mT + outside + TANGENT * (U @ (H @ right.mT) + (left @ K.mT) @ V.mT))
    return moved


def check(results, truths, infos) -> tuple[float, float | None, bool]:
    """Largest spectral error / tau, largest error bound / tau, and whether every layer meets the tolerance."""
    errors = [P.double() - T for P, T in zip(results, truths, strict=True)]
    spectral = [spectral_norm(E) if min(E.shape) < 1500 else float(E.norm()) for E in errors]
    allowed = [1e-3 + torch.finfo(P.dtype).eps * float(T.norm()) for P, T in zip(results, truths, strict=True)]
    bounds = [float(i.error_bound.max()) for i in infos] if infos else []
    held = all(float(E.norm()) <= b for E, b in zip(errors, bounds, strict=False))
    ok = held and all(e <= a for e, a in zip(spectral, allowed, strict=True))
    return max(spectral), max(bounds, default=None), ok


def spectral_norm(E: torch.Tensor) -> float:
    """Largest singular value of E ``[m, n]`` fp64, from its Gram matrix: several times as fast as from an SVD."""
    scale = float(E.abs().max()) or 1.0
    X = E / scale if len(E) >= len(E.mT) else E.mT / scale
    return scale * float(torch.linalg.eigvalsh(X.mT @ X)[-1].clamp_min(0).sqrt()) if E.numel() else 0.0


def seconds(function) -> float:
    """Wall-clock seconds of one call."""
    sync = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    function()
    sync()
    return time.perf_counter() - start


def device_name() -> str:
    return info()["devices"][-1]


if __name__ == "__main__":
    print(re.sub(r"\W+", "-", device_name().lower()).strip("-"))
