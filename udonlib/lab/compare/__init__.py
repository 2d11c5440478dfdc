"""Runs, ablations and gaps: what is compared, and how that looks."""
