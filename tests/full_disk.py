"""A disk on which no file grows beyond some bytes, without root: the kernel refuses with "File too large"."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(max_bytes):
    """For this process, while it lasts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
