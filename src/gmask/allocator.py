"""The C library's allocator: what it does with freed memory.

A step of a model allocates and frees tensors of 10 MB and more. GNU's C library gives those back to the system and gets
fresh pages for the next ones, which the system fills with zeros one by one. On a CPU that is a tenth to a sixth of the
time of sampling or training a small model.
"""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The numbers of the settings, from GNU's malloc.h."""

KEPT_BYTES = 1 << 30
"""Freed bytes at the end of the heap that a process keeps."""

LARGEST = 128 << 20
"""Bytes up to which memory comes from the heap, and is kept there. Weights of large models are larger."""

SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for its next tensors; returns False where nothing was changed.

    It holds for the whole process, so programs call it, and libraries do not: the command ``gmask`` does. Other C
    libraries have no such setting. What the environment sets (``MALLOC_...`` or ``GLIBC_TUNABLES``) stays.

    Source: mallopt(3) of the Linux man-pages.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc" in tunables or any(name in os.environ for name in SETTINGS):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    return set_option is not None and bool(
        set_option(M_MMAP_THRESHOLD, LARGEST) and set_option(M_TRIM_THRESHOLD, KEPT_BYTES)
    )


def give_back_freed_memory() -> bool:
    """Gives the memory that this process has freed back to the system; returns False where the C library cannot.

    The next tensors then get fresh pages: this is for after work that took much longer than the system needs for those.

    Source: malloc_trim(3) of the Linux man-pages.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.libc_ver()[0] == "glibc" else None
    return trim is not None and bool(trim(0))
