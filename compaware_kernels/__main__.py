"""``python -m compaware_kernels``: the command line."""

from .cli import main

__all__: list[str] = []

main()
