"""What notebooks show; nothing outside imports it."""
