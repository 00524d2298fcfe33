"""Compression-aware training: layers become low-rank during training, and are then factorized for inference.

weights --proximal step--> low-rank weights --rank rule--> ranks --truncated SVD--> two factors --layers--> inference
"""

from . import folds, ranks
from ._utils.version import __version__
from .compression.checkpoint import CheckpointError, load, save
from .compression.compress import CompressReport, LayerReport, compress
from .compression.convert import to_dense, to_plain
from .compression.fuse import fuse
from .compression.peft_export import LoraReport, export_lora
from .compression.rank_allocation import allocate
from .environment import info
from .nn.conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .nn.conv_transpose import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
from .nn.functional import lowrank_conv2d, lowrank_linear
from .nn.linear import LowRankLinear
from .ops import backends, library
from .proximal import svt_op
from .proximal.functional import firm_svt, group_shrink, soft_threshold, sparse_group_shrink, svt
from .proximal.inplace import (
    firm_svt_,
    group_shrink_,
    soft_threshold_,
    sparse_group_shrink_,
    spectral_ball_,
    svt_,
    truncate_,
    weighted_svt_,
)
from .proximal.svt_info import SvtInfo
from .proximal.warm_state import WarmState
from .training.proximal_step import ProximalStep
from .training.report import ProximalReport

backends.register()

__all__ = [
    "CheckpointError", "CompressReport", "LayerReport", "LoraReport", "LowRankConv1d", "LowRankConv2d", "LowRankConv3d",
    "LowRankConvTranspose1d", "LowRankConvTranspose2d", "LowRankConvTranspose3d", "LowRankLinear", "ProximalReport",
    "ProximalStep", "SvtInfo", "WarmState", "allocate", "compress", "export_lora", "firm_svt", "firm_svt_", "folds",
    "fuse", "group_shrink", "group_shrink_", "info", "load", "lowrank_conv2d", "lowrank_linear", "ranks", "save",
    "soft_threshold", "soft_threshold_", "sparse_group_shrink", "sparse_group_shrink_", "spectral_ball_", "svt", "svt_",
    "to_dense", "to_plain", "truncate_", "weighted_svt_",
]  # fmt: skip
