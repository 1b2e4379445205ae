"""Where a number comes from: the versions, the machine and the commit that a run was made with, and
the hash of a file that it read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from forgetless.files.run_json import Environment
from forgetless.files.schema import Text

# Packages whose version may change a number.
PACKAGES = (
    "forgetless",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "lm_eval",
)
# Seconds that git may take; on a network disk it can hang.
GIT_SECONDS = 10


def environment(device: str | None = None) -> Environment:
    """Versions, platform, device, and the commit of the source tree where that is a git checkout
    (None otherwise).
    """
    commit, dirty = _commit()
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=dict(_versions()),
        device=device,
        commit=commit,
        dirty=dirty,
    )


@functools.cache
def _versions() -> dict[str, Text | None]:
    """The installed version of each package whose version may change a number; read once."""
    versions: dict[str, Text | None] = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@functools.cache
def _commit() -> tuple[str | None, bool | None]:
    """The commit of the tree that this file lies in, and whether tracked files differ from it; None
    where git does not know this file, as where the package is installed.

    Asked once: what runs is the tree as it was when the process began.
    """
    here = Path(__file__).resolve()
    try:
        if _git(here.parent, "ls-files", here.name) != here.name:
            return None, None
        changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
        return _git(here.parent, "rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(folder: Path, *words: str) -> str:
    """What git prints in a folder."""
    done = subprocess.run(
        ["git", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_SECONDS,
    )
    return done.stdout.strip()


def sha256_text(text: str) -> str:
    """sha256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
