"""Faults of machines, for tests of what writes."""

import contextlib
import fcntl
import os


@contextlib.contextmanager
def held(folder):
    """The folder as another process holds it: by a lock on a descriptor of its own."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield folder
    finally:
        os.close(descriptor)
