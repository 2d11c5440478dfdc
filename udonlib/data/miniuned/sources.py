"""The pinned packages that MiniUnED is drawn from: fetched by their own clients, checked, read without unpacking."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from udonlib.data.miniuned import FOLDER

ALLOWED_LICENCES = frozenset(
    {"MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "OFL-1.1", "Unlicense"}
)
CLIENTS = {"npm": "npm", "pip": "pip", "apt": "apt-get"}


class BuildError(ValueError):
    """The archive cannot be built from what was found; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One pinned package. `client`: npm, pip or apt; `use`: what reads it (icons, fonts, kanji, fashion, earth)."""

    client: str
    name: str
    version: str
    file: str
    use: str
    sha256: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.version} ({self.client})"

    def command(self, folder: Path) -> list[str]:
        """The client's command that puts `file` into `folder`."""
        if self.client == "npm":
            return ["npm", "pack", f"{self.name}@{self.version}", "--pack-destination", str(folder)]
        if self.client == "pip":
            return ["pip", "download", "--no-deps", "--dest", str(folder), f"{self.name}=={self.version}"]
        return ["apt-get", "download", f"{self.name}={self.version}"]  # apt-get writes into the current folder


@dataclass(frozen=True)
class Credit:
    """Whom a drawing is owed to. `package` is 'name version (client)'; `licence` is an SPDX name."""

    package: str
    title: str
    author: str
    licence: str
    url: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.licence not in ALLOWED_LICENCES:
            raise BuildError(
                f"{self.package}: {self.title!r} is under {self.licence!r}; MiniUnED takes only "
                f"{', '.join(sorted(ALLOWED_LICENCES))}"
            )


def load_packages() -> list[Package]:
    """The pins of packages.json, in its order."""
    rows = json.loads((FOLDER / "packages.json").read_text())
    return [Package(**row) for row in rows]


class Downloads:
    """A folder of the pinned packages. Missing files are fetched; every file is held against its sha256 before use."""

    def __init__(self, folder: Path, packages: list[Package], report: Callable[[str], None] = print) -> None:
        self.folder = folder.resolve()
        self.packages = {package.name: package for package in packages}
        self.report = report
        self._checked: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)

    def of(self, use: str) -> list[Package]:
        """The packages of one use, sorted by name."""
        return sorted((p for p in self.packages.values() if p.use == use), key=lambda p: p.name)

    def path(self, package: Package) -> Path:
        """The package's file, fetched if absent. BuildError if it cannot be had or has other bytes than pinned."""
        path = self.folder / package.file
        if package.file in self._checked:
            return path
        if not path.exists():
            self._fetch(package, path)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != package.sha256:
            raise BuildError(
                f"{path}: sha256 {found}, but {package.label} is pinned to {package.sha256}. "
                "Remove the file to fetch it again; if that does not help, the package was published anew."
            )
        self._checked.add(package.file)
        return path

    def _fetch(self, package: Package, path: Path) -> None:
        client = CLIENTS[package.client]
        if shutil.which(client) is None:
            raise BuildError(
                f"{package.label}: {client} is not installed; put {package.file} into {self.folder} yourself"
            )
        self.report(f"fetching {package.label}")
        command = package.command(self.folder)
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode or not path.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BuildError(f"{package.label}: `{' '.join(command)}` did not give {package.file}: {last}")

    def members(self, package: Package, wanted: Callable[[str], bool]) -> dict[str, bytes]:
        """The wanted members of a package as bytes, by name, sorted.

        Names are those inside the package without the leading 'package/' (npm) or './' (apt).
        """
        path = self.path(package)
        found: dict[str, bytes] = {}
        if package.client == "pip":
            with zipfile.ZipFile(path) as archive:
                found = {name: archive.read(name) for name in archive.namelist() if wanted(name)}
            return dict(sorted(found.items()))
        content = path.read_bytes()
        if package.client == "apt":
            if shutil.which("dpkg-deb") is None:
                raise BuildError(f"{package.label}: dpkg-deb, which opens {package.file}, is not installed")
            content = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(content)) as stream:
            for member in stream:
                name = member.name.removeprefix("package/").removeprefix("./")
                opened = stream.extractfile(member) if member.isfile() and wanted(name) else None
                if opened is not None:
                    found[name] = opened.read()
        return dict(sorted(found.items()))

    def member(self, package: Package, name: str) -> bytes:
        """One member that must be there."""
        found = self.members(package, lambda candidate: candidate == name)
        if name not in found:
            raise BuildError(f"{package.label}: no file {name!r} inside {package.file}")
        return found[name]
