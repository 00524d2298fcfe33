"""The proximal step of a whole network on a GPU: all layers in a fixed number of launches."""
