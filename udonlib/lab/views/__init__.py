"""The kit that pages are made of, and the pages of data, train, steer and evaluate."""
