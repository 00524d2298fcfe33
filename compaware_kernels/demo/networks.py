"""Demo network, re-exported from the study's networks."""

from ..study.networks import small_convnet

__all__ = ["small_convnet"]
