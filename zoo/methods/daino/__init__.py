"""Daino: semi-supervised self-distillation, the DINO member of the Suave family (arXiv 2306.07483)."""
