"""Numba kernels: arrays in, `out` last, nothing else.

Rules that hold for every file here (tests/test_rules.py checks them):

- A file imports only `numba`, `numpy` and `math`. Numba's on-disk cache is invalidated by the file that
  defines a kernel alone; a helper in another file would be served stale after an upgrade.
- `@njit(cache=True, nogil=True, ...)` in full, in place; no fastmath, hence no FMA contraction: the same
  bytes on x86 and on Arm.
- C-contiguous writable arrays; no allocation, no exceptions, no printing; returns None.
- The result does not depend on how rows are cut into blocks.
"""
