"""Proximal operators of matrix penalties: functional and in-place forms, and the SVT solver behind them."""
