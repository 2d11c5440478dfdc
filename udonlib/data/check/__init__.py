"""A look at data before anything is trained on it: broken, repeated, misplaced images; what was published of it."""
