"""Matrices that are sharded over processes (DTensor): how they lie, and products with them. Knows no penalty."""
