"""Which tokens of a reused chunk to recompute."""
