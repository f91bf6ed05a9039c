"""KV Prediction for Improved Time to First Token (arXiv 2410.08391)."""
