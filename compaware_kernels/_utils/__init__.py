"""Utilities of all packages: atomic file writes, dtypes, eval mode, text tables. Imports none of them."""

__all__: list[str] = []
