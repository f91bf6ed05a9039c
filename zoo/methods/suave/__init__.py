"""Suave: semi-supervised learning with self-supervised clustering (arXiv 2306.07483)."""
