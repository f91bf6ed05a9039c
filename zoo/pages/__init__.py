"""The documentation site: what is generated from cards, docstrings, configs and results (see mkdocs.yml)."""
