"""``compaware demo``: a study of two ways of training, plain and compression-aware."""
