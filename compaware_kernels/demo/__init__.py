"""Demo study ``compaware demo``: plain against compression-aware training."""

__all__: list[str] = []
