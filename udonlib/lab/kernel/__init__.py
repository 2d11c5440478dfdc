"""The kernel that a notebook's cells run in: who looks at them, and what it answers while one of them only looks on."""
