"""An emulated AArch64 processor that calls one function at a time, and counts the instructions it executes.

Unicorn emulates what a processor does, not when: counts are exact, and times mean nothing.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from unicorn import UC_ARCH_ARM64, UC_HOOK_BLOCK, UC_MODE_ARM, Uc
from unicorn import arm64_const as arm

from edgemerge.native.image import NEVER_CALLED, Image
from edgemerge.native.signatures import SIGNATURES

MAPPED = 256 << 20  # from BASE on: code, then arrays; programs are linked to lie below
BASE = 1 << 32
STACK_BYTES = 1 << 20
PAGE = 4096
LINE = 64  # of a cache; arrays begin where a merge's own do
SHT_SYMTAB, SHT_RELA, PT_LOAD, IRELATIVE = 2, 4, 1, 1032
INTEGERS = [getattr(arm, f"UC_ARM64_REG_X{i}") for i in range(8)]
FLOATS = [getattr(arm, f"UC_ARM64_REG_D{i}") for i in range(8)]


@dataclass(frozen=True)
class Execution:
    """What one call executed: straight pieces of code, in order."""

    starts: NDArray[np.uint64]  # address of each piece
    n_instructions: NDArray[np.uint32]  # in each piece

    @cached_property
    def total(self) -> int:
        """Instructions executed."""
        return int(self.n_instructions.sum(dtype=np.int64))


class Emulator:
    """Memory and registers. What was placed stays; `release` takes arrays back."""

    def __init__(self) -> None:
        self.symbols: dict[str, int] = {}
        self._uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self._uc.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        self._uc.mem_map(BASE, MAPPED)
        self._uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point is not trapped
        self._next = BASE
        self._stop = self._take(PAGE)  # functions return here
        self._uc.reg_write(arm.UC_ARM64_REG_TPIDR_EL0, self._take(PAGE))
        self._stack = self._take(STACK_BYTES) + STACK_BYTES
        self._starts, self._sizes = array("Q"), array("I")
        self._uc.hook_add(UC_HOOK_BLOCK, self._saw)

    # -- code

    def load_program(self, path: Path) -> None:
        """Load a static program that is not to be started, and learn its symbols.

        The C library's functions that exist several times are chosen as the program would, by the
        functions that its relocations name.
        """
        raw = path.read_bytes()
        program_at, sections_at = struct.unpack_from("<QQ", raw, 32)
        _, n_programs, _, n_sections = struct.unpack_from("<HHHH", raw, 54)
        for i in range(n_programs):
            kind, _, offset, address, _, n_file, n_memory, _ = struct.unpack_from(
                "<IIQQQQQQ", raw, program_at + 56 * i
            )
            if kind == PT_LOAD:
                start = address // PAGE * PAGE
                self._uc.mem_map(start, -(-(address + n_memory - start) // PAGE) * PAGE)
                self._uc.mem_write(address, raw[offset : offset + n_file])
        fields = [
            struct.unpack_from("<IIQQQQIIQQ", raw, sections_at + 64 * i) for i in range(n_sections)
        ]
        for _, kind, _, _, offset, size, link, _, _, _ in fields:
            if kind == SHT_SYMTAB:
                for at in range(offset, offset + size, 24):
                    name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", raw, at)
                    if info & 15 in (1, 2, 10) and value:  # object, function, function to be chosen
                        start = fields[link][4] + name
                        text = raw[start : raw.index(0, start)].decode()
                        self.symbols[text] = self.run(value, [0]) if info & 15 == 10 else value
            elif kind == SHT_RELA:
                for at in range(offset, offset + size, 24):
                    place, info, addend = struct.unpack_from("<QQq", raw, at)
                    if info == IRELATIVE:
                        self._write_address(place, self.run(addend, [0]))

    def place(self, image: Image) -> int:
        """Place a kernel; return the address of its function."""
        base = self._take(len(image.code))
        self._uc.mem_write(base, image.code)
        for at, target in image.relative:
            self._write_address(base + at, base + target)
        for at, name in image.imports:
            self._write_address(base + at, 0 if name == NEVER_CALLED else self.symbols[name])
        return base + image.entry

    def read(self, address: int, n_bytes: int) -> bytes:
        """Read memory."""
        return bytes(self._uc.mem_read(address, n_bytes))

    # -- calls

    def call_kernel(self, name: str, address: int, arguments: list[Any]) -> Execution:
        """Call a placed kernel (FILE.KERNEL) as `native.function` does; arrays are changed in place."""
        file, kernel = name.split(".")
        flat: list[Any] = [self._take(8), self._take(8)]
        for kind, argument in zip(SIGNATURES[file][kernel].split(", "), arguments, strict=True):
            if "[" in kind:
                n_dims = kind.count(":,") + 1
                assert argument.dtype == np.dtype(kind[:2]), (name, kind, argument.dtype)
                assert argument.ndim == n_dims, (name, kind, argument.shape)
                flat += [0, 0, argument.size, argument.itemsize, argument]
                flat += [*argument.shape, *argument.strides]
            elif kind == "f4":
                flat.append(np.float32(argument))
            else:
                flat.append(float(argument) if kind == "f8" else int(argument))
        return self.call(address, flat)

    def call(self, address: int, arguments: list[Any]) -> Execution:
        """Call a function by the procedure call standard; arrays are passed by address and changed.

        Integers go to X0 to X7, floats to V0 to V7, what is left onto the stack.
        """
        mark = self._next
        arrays: list[tuple[int, NDArray[Any]]] = []
        flat: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                at = self._take(argument.nbytes)
                self._uc.mem_write(at, argument.tobytes())
                arrays.append((at, argument))
                argument = at
            flat.append(argument)
        self._starts, self._sizes = array("Q"), array("I")
        self.run(address, flat)
        for at, argument in arrays:
            found = np.frombuffer(self.read(at, argument.nbytes), argument.dtype)
            argument[...] = found.reshape(argument.shape)
        self._next = mark
        return Execution(np.array(self._starts, np.uint64), np.array(self._sizes, np.uint32) // 4)

    def run(self, address: int, arguments: list[Any]) -> int:
        """Call a function; return X0."""
        integers, floats, stacked = list(INTEGERS), list(FLOATS), b""
        for argument in arguments:
            is_float = isinstance(argument, float | np.float32)
            registers = floats if is_float else integers
            bits = _bits(argument)
            if registers:
                self._uc.reg_write(registers.pop(0), bits)
            else:
                stacked += bits.to_bytes(8, "little")
        stack = (self._stack - len(stacked)) // 16 * 16
        self._uc.mem_write(stack, stacked)
        self._uc.reg_write(arm.UC_ARM64_REG_SP, stack)
        self._uc.reg_write(arm.UC_ARM64_REG_LR, self._stop)
        self._uc.emu_start(address, self._stop)
        return int(self._uc.reg_read(arm.UC_ARM64_REG_X0))

    # -- memory

    def _saw(self, uc: Uc, address: int, size: int, user_data: object) -> None:
        self._starts.append(address)
        self._sizes.append(size)

    def _take(self, n_bytes: int) -> int:
        at = self._next
        self._next += -(-n_bytes // LINE) * LINE
        assert self._next <= BASE + MAPPED, "the emulated memory is full"
        return at

    def _write_address(self, at: int, address: int) -> None:
        self._uc.mem_write(at, address.to_bytes(8, "little"))


def _bits(argument: Any) -> int:
    """What a register holds."""
    if isinstance(argument, np.float32):
        return int(argument.view(np.uint32))
    if isinstance(argument, float):
        return int(np.float64(argument).view(np.uint64))
    return int(argument) % 2**64
