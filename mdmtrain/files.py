"""Write files so that each is replaced completely or not at all; errors name the file. Also checksums.

Standard library only.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Add the place to the error of a failed write: the operating system names a file only if it cannot be opened."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write: {error.strerror or error}: make room or choose another place, then start again"
        raise OSError(error.errno, problem, str(place)) from None


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write a new text file that replaces `path` atomically at the end of the block.

    After a crash, `path` has the old text or the new one, never a part. An error in the block does not change `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        yield file
    put_in_place(temporary, path)


def put_in_place(made: Path, place: Path) -> None:
    """Sync a finished file, or a folder of files, to the disk, then give it its final name."""
    for path in (*made.iterdir(), made) if made.is_dir() else (made,):
        sync(path)
    os.replace(made, place)
    sync(place.parent)


def on_disk(path: Path) -> bool:
    """Is this a path on a disk? A path in an object store is a UPath, which is not a pathlib.Path."""
    return isinstance(path, Path)


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(stream: BinaryIO) -> str:
    """The SHA-256 of what is left of a stream (hashlib.file_digest begins with Python 3.11)."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
