"""NNCSL: soft nearest neighbours for continual semi-supervised learning (arXiv 2212.05102)."""
