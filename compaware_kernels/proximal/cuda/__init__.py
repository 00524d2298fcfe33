"""Proximal step of a whole network on a GPU: all layers in a fixed number of kernel launches."""
