"""Low-rank layers, and how a model is read and rebuilt: which layers are matrices, what stands in for them."""
