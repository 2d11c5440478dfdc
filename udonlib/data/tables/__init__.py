"""Images that a table lists: manifests of a user's own."""
