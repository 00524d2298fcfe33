"""timm, also where torchvision was made for another build of torch: PyPI's is for CUDA, torch here may be for the CPU.

It then lacks its compiled operators, which nothing here needs, and fails as it declares two of them.
"""

import torch

try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

assert torchvision.__version__
