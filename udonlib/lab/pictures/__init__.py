"""Static pictures of figures, without a browser."""
