"""Utilities of all packages: atomic file writes, dtypes, text tables, SVG figures. Imports none of them."""

__all__: list[str] = []
