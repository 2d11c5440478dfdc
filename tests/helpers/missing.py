"""Python without some of its packages, for what has to run where they are not installed."""

from collections.abc import Iterable

MODULE_NAMES = {  # distributions whose module has another name
    "faiss-cpu": "faiss",
    "ipykernel": "IPython",
    "jupyter-scatter": "jscatter",
    "umap-learn": "umap",
}

FINDER = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def script_without(distributions: Iterable[str], script: str) -> str:
    """A script before which these packages have vanished."""
    return f"MISSING = {sorted(MODULE_NAMES.get(name, name) for name in distributions)!r}\n{FINDER}\n{script}"
