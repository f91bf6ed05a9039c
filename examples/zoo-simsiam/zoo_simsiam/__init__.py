"""SimSiam (arXiv 2011.10566) as a plugin of the method zoo."""
