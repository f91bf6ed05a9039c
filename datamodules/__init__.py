"""Data modules of the method zoo and the generators behind them."""
