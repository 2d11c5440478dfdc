"""Embeddings and the sampler: what is explored, and how that looks."""
