"""Of the processes that share the tests each has one core; imported before NumPy and TensorFlow count them.

Each would else take a thread for every core, and the sums of threads depend on their number.
"""

import os

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
