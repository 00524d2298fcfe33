"""Model compression: rank selection, SVD factorization, dead-neuron removal, operator fusion, checkpoints, export."""

__all__: list[str] = []
