"""A zoo of research methods for PyTorch Lightning, launched from one command line and open to plugins."""

__version__ = "0.1.0"
