"""How good it is: embeddings read out, searched, and measured with intervals."""
