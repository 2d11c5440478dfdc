"""What of an evaluation is compared."""


def stamps(path):
    return {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


def figures(table, *embedders):
    """The measured columns of some embedders, without the intervals, which depend on how many there are."""
    rows = table[table["embedder"].isin(embedders)]
    return rows[["embedder", "domain", "index", "n_queries", "n_index", "r_at_1", "mmp_at_5"]].reset_index(drop=True)
