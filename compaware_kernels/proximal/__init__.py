"""The proximal operators and the solver behind them."""
