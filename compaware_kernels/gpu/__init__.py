"""The steps of the proximal operators on a GPU: all layers in a fixed number of launches."""
