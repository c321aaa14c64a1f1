"""python -m tests.gpu train DATA SCRATCH NAME...    see arrangements.py; a process of its own for the fake device"""

import json
import os
import sys
import time
from pathlib import Path

from tests.gpu import shim

shim.load()  # before torch is imported

from tests.gpu import arrangements  # noqa: E402


def main(what: str, data: str, scratch: str, *names: str) -> None:
    for name in names:
        start = time.process_time()
        found = arrangements.run(data, Path(scratch), name)
        print(json.dumps({**found, "seconds": round(time.process_time() - start, 1)}), flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # autograd's device thread outlives the interpreter otherwise
