"""MiniUnED, the embedded benchmark: the packed archive, its manifest, and the builder that reproduces both."""

from pathlib import Path

FOLDER = Path(__file__).parent
ARCHIVE = FOLDER / "miniuned.zip"
MASKS = FOLDER / "masks.zip"  # figure and ground of the pictures that are drawings
MANIFEST = FOLDER / "manifest.json"  # bytes, sha256 and the table of counts that the archive must agree with
