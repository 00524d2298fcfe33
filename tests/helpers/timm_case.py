"""timm, from where make puts it, or wherever else it is; what imports this is skipped, with the reason, without it.

PyPI's torchvision is made for CUDA: beside a CPU build of torch it lacks its compiled operators, which nothing here
needs, and fails as it describes two of them. So they are declared first.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if not importlib.util.find_spec("timm"):
    sys.path.append(str(Path(__file__).parents[2] / ".venv/timm"))
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
except ImportError:
    pytest.skip("torchvision is not installed (make puts it into .venv/timm)", allow_module_level=True)

assert torchvision.__version__
pytest.importorskip("timm")
