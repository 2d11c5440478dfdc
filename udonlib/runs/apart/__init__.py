"""A run in a process of its own, which outlives whoever started it: how that begins, what it says, how it ends."""
