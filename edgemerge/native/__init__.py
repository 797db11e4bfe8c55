"""Machine code of kernels, without the compiler in the process that runs it.

The kernels are written for Numba. Its import alone takes 60 to 120 MB and a second; on a small board that is
much of the budget. So Numba runs in a child, once (`compiler`). Its object code becomes an `image`
(`linker`), which is kept on disk (`store`) and called from here through ctypes (`kernel`).

`KernelFile("ties").elect(...)` is `edgemerge.kernels.ties.elect(...)`, to the last bit.
"""

from edgemerge.native.kernel import KernelFile, load_kernel

__all__ = ["KernelFile", "load_kernel"]
