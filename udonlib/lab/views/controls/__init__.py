"""The controls of the steering panel."""
