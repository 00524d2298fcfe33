"""The demo's network, which is one of the study's."""

from ..study.networks import small_convnet

__all__ = ["small_convnet"]
