"""Read-only dense weight of a low-rank layer: shape and dtype at once, the product of the factors when it is used."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["FactoredWeight"]

ATTRIBUTES = ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "itemsize", "nbytes", "is_cpu", "is_cuda",
              "is_meta", "is_mps", "is_xpu", "is_nested", "is_quantized", "is_sparse", "is_mkldnn")  # fmt: skip
METHODS = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device", "is_floating_point",
           "is_complex", "__len__")  # fmt: skip
# What is answered without the product.
METADATA = {getattr(Tensor, name).__get__ for name in ATTRIBUTES} | {getattr(Tensor, name) for name in METHODS}
METADATA |= {torch.numel, torch.is_floating_point, torch.is_complex}
ASSIGNMENTS = {"__set__", "__delete__", "__setitem__", *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv",
               "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"))}  # fmt: skip


class FactoredWeight(Tensor):
    """Dense weight of a low-rank layer, read-only: ``[O, C/G, *K]``, for a transposed convolution ``[C, O/G, *K]``.

    Models read ``layer.weight``, most of them only its dtype or device, which are those of the factors. Any other use
    computes the product of the factors, differentiable, each time anew. It is no parameter, and in no state dict.

    Args:
        layer: the :class:`.lowrank.LowRank`.
        requires_grad: whether the product is differentiable; ``.data`` is not.

    Raises:
        TypeError: it is written to.
    """

    layer: nn.Module

    @staticmethod
    def __new__(cls, layer: nn.Module, requires_grad: bool = True) -> FactoredWeight:
        V, U = layer.first.weight, layer.second.weight
        self = Tensor._make_wrapper_subclass(
            cls, layer.dense_shape, dtype=V.dtype, device=V.device,
            requires_grad=requires_grad and (V.requires_grad or U.requires_grad),
        )  # fmt: skip
        self.layer = layer
        return self

    def product(self) -> Tensor:
        """The weight as an ordinary tensor."""
        W = self.layer.product()
        return W if self.requires_grad else W.detach()

    def __deepcopy__(self, memo: dict) -> FactoredWeight:
        return FactoredWeight(copy.deepcopy(self.layer, memo), self.requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.data.__get__:  # still read-only: what is written to .data would be lost
            return cls(args[0].layer, requires_grad=False)
        name = func.__name__
        in_place = name in ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))
        written = [(args[0] if args else kwargs.get("tensor")) if in_place else None, kwargs.get("out")]
        if any(isinstance(leaf, cls) for leaf in tree_leaves(written)):
            raise TypeError("weight of a low-rank layer: wanted reads only, it is the product of first.weight and "
                            f"second.weight; got {name}")  # fmt: skip
        args, kwargs = tree_map_only(cls, cls.product, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Below autograd, where the product would have no gradient.
        raise TypeError(f"weight of a low-rank layer: wanted an op with __torch_function__; got {func}")
