"""Giving freed memory back to the operating system."""

import ctypes


def release_freed_memory() -> None:
    """Hand freed blocks back, where the C library has a call for it (glibc).

    glibc keeps freed blocks below 32 MB, and the gaps between them grow with every layer that is loaded and dropped: by
    6 MB per layer of 100 MB in bf16 while calibrating, by 0.9 GB while the 32 layers of Mixtral-8x7B are repacked.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
