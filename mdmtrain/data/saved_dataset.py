"""Folders written by `datasets.save_to_disk`, on a disk or at a URL."""

import json
from collections.abc import Callable, Collection


def is_dataset(files: Collection[str]) -> bool:
    """Whether a folder with files of these names was written by `datasets.save_to_disk`."""
    return {"state.json", "dataset_info.json"} <= set(files)


def data_files(folder: str, read: Callable[[], bytes]) -> list[str]:
    """The names of the files that have the data of such a folder, in order. Other files may be caches of the same data.

    read: reads the folder's state.json. Raises ValueError if this is damaged, or if the rows are selected by an index.
    """
    try:
        content = json.loads(read())
        named = [file["filename"] for file in content["_data_files"]]
        mapped = content.get("_indices_data_files") or content.get("_indices_files")
    except (ValueError, KeyError, TypeError, AttributeError):
        state = f"{folder}/state.json"
        raise ValueError(f"{state}: damaged, or not of datasets.save_to_disk: replace it, or exclude it") from None
    if mapped:
        raise ValueError(f"{folder}: its rows are selected by an index: call flatten_indices() and save it again")
    return named
