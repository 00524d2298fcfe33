"""Low-rank layers (modules and functions), the foldable layers of a model, and replacing layers in it."""

__all__: list[str] = []
