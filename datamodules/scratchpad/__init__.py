"""Connectivity questions whose answer no local cue tells, with sketches of their step-by-step solution."""
