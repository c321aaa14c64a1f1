"""A process of its own for the fake device. Writes one line of JSON for each name.

python -m tests.gpu train DATA SCRATCH NAME...       see arrangements.py
python -m tests.gpu check DATA SCRATCH PART...       see checks.py
python -m tests.gpu memory DATA SCRATCH NAME...      see memory.py
python -m tests.gpu compile TRITON SCRATCH NAME...   see kernels.py; TRITON: a folder that has triton
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.gpu import shim


def act_of(what: str, where: str, scratch: str) -> Callable[[str], dict]:
    if what == "train":
        from tests.gpu import arrangements

        return partial(arrangements.run, where, Path(scratch))
    if what == "check":
        from tests.gpu import checks

        return partial(checks.check, where, scratch)
    if what == "memory":
        from tests.gpu import memory

        return memory.compare
    os.environ["TRITON_CACHE_DIR"] = scratch
    sys.path.insert(0, where)
    from tests.gpu import h100, kernels

    h100.install()
    return kernels.compile_for_h100


if __name__ == "__main__":
    shim.load()  # before torch is imported
    act = act_of(*sys.argv[1:4])
    for name in sys.argv[4:]:
        start = time.process_time()
        found = act(name)
        print(json.dumps({**found, "seconds": round(time.process_time() - start, 1)}), flush=True)
    os._exit(0)  # autograd's device thread outlives the interpreter otherwise
