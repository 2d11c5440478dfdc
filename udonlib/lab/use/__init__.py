"""Pages of a finished model at work: searching with it, and handing it on."""
