"""Study ``compaware study``: accuracy against compression, for this method and competing ones."""

__all__ = ["Stopped"]


class Stopped(RuntimeError):
    """Training runs of a study failed (the others are done), or another process is working on it."""
