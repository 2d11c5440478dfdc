"""Many runs at once: what a person noted of them, what tells them apart in words, and their curves overlaid."""
