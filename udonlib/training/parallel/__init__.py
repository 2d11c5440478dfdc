"""Several processes that train one model: what each of them reads, holds and sums."""
