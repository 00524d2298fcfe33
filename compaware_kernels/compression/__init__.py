"""From a trained model to a small one: ranks, factors, dead neurons, fused layers, files."""

__all__: list[str] = []
