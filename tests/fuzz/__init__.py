"""Seeded random cases at the edges of the public functions; ``python -m tests.fuzz.ops 10000 --seed 0`` runs many."""
