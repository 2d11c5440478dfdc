"""What a run begins with: another run's weights, and files that must not change under it."""
