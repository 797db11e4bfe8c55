"""Machine code of kernels, without the compiler in the process that runs it.

The kernels are written for Numba. A process that imports it has spent 60 to 120 MB and a second before it has
done anything, and on a small board that is much of the budget. So Numba runs in a child, once
(`compiler`); its object code becomes an `image` (`linker`), is kept on disk (`store`), and is called from
here through ctypes (`kernel`).

`KernelFile("ties").elect(...)` is `edgemerge.kernels.ties.elect(...)`, to the last bit.
"""

from edgemerge.native.kernel import KernelFile, load_kernel

__all__ = ["KernelFile", "load_kernel"]
