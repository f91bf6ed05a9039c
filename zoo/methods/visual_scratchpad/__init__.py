"""Visual scratchpads (arXiv 2410.08165): answer a global question about an image by drawing the way to the answer."""
