"""Sets of wanted and unwanted sentences for contrastive perplexity: synthetic worlds, files, and how sets are made."""
