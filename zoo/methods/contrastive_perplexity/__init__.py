"""Contrastive perplexity (arXiv 2401.08491): steer what a language model writes by sets of wanted and unwanted text."""
