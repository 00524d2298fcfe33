"""timm, from where make installs it or from the environment; a test that imports this is skipped without it.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch it lacks its compiled operators, which are not needed
here, and its import fails where it registers fakes for two of them. So these are declared first.
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
