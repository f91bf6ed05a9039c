"""AIMv2: multimodal autoregressive pre-training of vision encoders (arXiv 2411.14402)."""
