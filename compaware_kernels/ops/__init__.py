"""PyTorch custom ops ``torch.ops.compaware``: schemas, reference and fake implementations, gradients, backends.

The reference implementation is plain PyTorch and runs on any device. If the C++ library is built, it registers faster
kernels for a dispatch key (CPU, CUDA) over it; nothing else changes. Ops check shapes only; values (finite weights,
thresholds >= 0) are checked by the public functions of :mod:`compaware_kernels.proximal.functional`.

Conventions: ``W`` is ``[..., m, n]``; every ``tau`` holds one number, or one per matrix (shape ``W.shape[:-2]``).
fp16 and bf16 are computed in fp32.
"""

__all__: list[str] = []
