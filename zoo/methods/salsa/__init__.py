"""SALSA: RLHF with a model soup as the reference, with supervised fine-tuning and reward models (arXiv 2411.01798)."""
