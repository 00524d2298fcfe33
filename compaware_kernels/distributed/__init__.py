"""Matrices sharded over ranks (DTensor): their layout, resharding, and products with them. Knows no penalty."""

__all__: list[str] = []
