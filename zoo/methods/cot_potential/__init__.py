"""Potential of a chain of thought, arXiv 2602.14903."""
