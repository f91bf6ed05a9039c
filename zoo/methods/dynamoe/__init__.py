"""DynaMoE: a dense language model becomes a token-difficulty mixture of nested experts (arXiv 2502.12325)."""
