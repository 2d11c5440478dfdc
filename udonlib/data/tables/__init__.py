"""Images in tables: manifests, which list files of a user's own, and packs of Parquet shards, which hold them."""
