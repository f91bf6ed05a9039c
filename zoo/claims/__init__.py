"""Executable claims: the runs of a method, the inequalities between them, and what was measured (`zoo reproduce`)."""
