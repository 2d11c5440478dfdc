"""Weights in the files of others: what they hold, checked before anything is built of it."""
