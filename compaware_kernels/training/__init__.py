"""Compression-aware training: ``ck.ProximalStep`` attaches proximal operators to a torch optimizer."""

__all__: list[str] = []
