"""The ops of ``torch.ops.compaware``: of each its schema, reference body, fake and gradient, and what runs it.

The reference body is plain PyTorch and runs on any device. The C++ library, where it is built, registers faster
bodies for a dispatch key (CPU, CUDA) over it; nothing else changes. The ops check shapes only. Values (finite
weights, non-negative thresholds) are checked by the public functions of :mod:`compaware_kernels.proximal.functional`.

Conventions: ``W`` is ``[..., m, n]`` and every ``tau`` holds one number, or one per matrix (``W.shape[:-2]``).
fp16 and bf16 are computed in fp32.
"""
