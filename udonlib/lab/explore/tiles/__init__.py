"""Images of the points of a map: a gallery beside it, and those that find room on it."""
