"""Types of parameters with bounds: beyond what anybody means, so that a slip of the keyboard is refused at once.

What a machine has room for is asked when a run begins: see `udonlib.memory`.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

# Years of training; the schedule of a sampler that does not change takes 8 bytes a step.
Steps = Annotated[int, Field(le=100_000_000)]
# Similarities of a batch are a square matrix: of a million, four terabytes.
Images = Annotated[int, Field(le=1_000_000)]
# A decoded image has three bytes a pixel: at 8,192, 200 MB.
Side = Annotated[int, Field(ge=8, le=8192)]
# Embeddings and hidden layers of known models end at some 16,000.
Width = Annotated[int, Field(ge=1, le=65_536)]
# Each is a process or thread of the system; no machine has as many cores.
Processes = Annotated[int, Field(le=1024)]
# Kept for every query.
Neighbours = Annotated[int, Field(ge=1, le=10_000)]
# Pictures of a notebook.
Shown = Annotated[int, Field(ge=1, le=1000)]
# Computed with in float32, which ends at 3e38.
Positive = Annotated[float, Field(gt=0, le=1e30)]
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
# What every generator takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]

MAX_NAME = 255  # bytes of a file's or folder's name, on every system in use


def _portable(name: str) -> str:
    """Refuse names that Windows keeps for devices, or writes otherwise."""
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE) or name.endswith("."):
        raise ValueError("expected a name that is a folder's on every system: no CON or NUL, no dot at the end")
    return name


# Short enough for names that are made of it, such as those of logs.
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=200), AfterValidator(_portable)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,4})?)$")]


def long_name(path: str) -> str | None:
    """What is wrong with a path of which a part is longer than any system takes; None: nothing."""
    longest = max((len(part.encode("utf-8", "surrogateescape")) for part in re.split(r"[/\\]", path)), default=0)
    return f"found a name of {longest} bytes, expected at most {MAX_NAME}" if longest > MAX_NAME else None
