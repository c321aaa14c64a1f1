"""Read files from object stores through fsspec: s3://, gs://, hf:// and all protocols whose libraries are installed.

Every request has a timeout and is repeated if it fails. If all attempts fail, it raises a ValueError of one line.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

T = TypeVar("T")
PIECE = 16 << 20  # bytes in one request
TIMEOUT, LIST_TIMEOUT = 60.0, 600.0  # seconds for a request of one piece, and for a listing of a whole folder
PAUSES = (1.0, 4.0, 16.0)  # seconds before the second, third and fourth attempt


def is_url(path: str) -> bool:
    return "://" in path


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL, and the path there. Valid in this process and thread: call it again after a fork.

    Raises ValueError if no installed library supports the URL.
    """
    try:
        return url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {_one_line(error)}: install its package, or choose another place") from None


def read(url: str) -> bytes:
    """The content of a file."""
    size = size_of(url)
    return b"".join(read_piece(url, start, min(start + PIECE, size)) for start in range(0, size, PIECE))


def read_piece(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. Raises ValueError if it is shorter."""
    piece = ask(url, TIMEOUT, "cat_file", start=start, end=end)
    if len(piece) != end - start:
        raise ValueError(f"{url}: asked for bytes {start:,} to {end:,}, got {len(piece):,}: the file has changed")
    return piece


def exists(url: str) -> bool:
    return ask(url, TIMEOUT, "exists")


def size_of(url: str) -> int:
    """The size of a file in bytes."""
    return ask(url, TIMEOUT, "info")["size"]


def sizes_in(url: str) -> dict[str, int]:
    """The size in bytes of each file of a folder, by name."""
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in ask(url, LIST_TIMEOUT, "ls", detail=True)}


def ask(url: str, timeout: float, method: str, **arguments: Any) -> Any:
    """Call a method of the URL's filesystem with its path. timeout: seconds for each attempt. Raises ValueError."""

    def call() -> Any:
        filesystem_, path = filesystem(url)
        if method not in ("cat_file", "get_file"):
            filesystem_.invalidate_cache()  # that of hf:// ignores use_listings_cache
        if isinstance(filesystem_, AsyncFileSystem):
            return sync(filesystem_.loop, getattr(filesystem_, f"_{method}"), path, timeout=timeout, **arguments)
        return getattr(filesystem_, method)(path, **arguments)  # a filesystem on disk or in memory

    return _persistently(call, url, timeout)


def _persistently(call: Callable[[], T], url: str, timeout: float) -> T:
    for pause in (*PAUSES, None):
        try:
            return call()
        except ValueError:
            raise
        except Exception as error:  # each library has its own types
            error = _reason(error)
            status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, PermissionError) or status in (401, 403):
                raise ValueError(f"{url}: access denied ({_one_line(error)}): check the credentials") from None
            if isinstance(error, FileNotFoundError) or status in (404, 410):
                raise ValueError(f"{url}: no such file or folder") from None
            if pause is None:
                no_answer = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else ""
                problem = no_answer or _one_line(error)
                raise ValueError(f"{url}: {problem}, {len(PAUSES) + 1} times in a row: check the store") from error
            time.sleep(pause)
    raise AssertionError("the last attempt has returned or raised")


def _reason(error: Exception) -> Exception:
    """The actual error of a request. For other failures too, fsspec over HTTP and hf:// raise FileNotFoundError."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    return cause if type(cause).__module__.startswith("aiohttp") or hasattr(cause, "response") else error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
