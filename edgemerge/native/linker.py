"""From the compiler's object file to an `Image`: a linker for one function and its constants.

Reads ELF64 relocatable objects of x86-64 and AArch64, position independent and of the small code model.
Relocations are applied here, where all offsets are known, as the two processor supplements of the System
V ABI define them (x86-64 psABI 4.4; ELF for the Arm 64-bit Architecture 5.7).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edgemerge.native.image import Image

__all__ = ["LinkError", "link"]

SHT_SYMTAB, SHT_RELA, SHT_NOBITS = 2, 4, 8
SHF_ALLOC = 2
PAGE = 4096
EM_X86_64, EM_AARCH64 = 62, 183
STUBS = {  # jump to the address in the 8 bytes behind
    EM_X86_64: b"\xff\x25\x02\x00\x00\x00\x0f\x0b",  # jmp *[rip + 2]; ud2
    EM_AARCH64: b"\x50\x00\x00\x58\x00\x02\x1f\xd6",  # ldr x16, 8; br x16
}


class LinkError(Exception):
    """The object has something that kernels have no use for."""


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    flags: int
    start: int
    size: int
    info: int  # of relocations: the section that they change
    alignment: int


@dataclass(frozen=True, slots=True)
class _Symbol:
    name: str
    section: int  # 0: defined elsewhere
    value: int


@dataclass(frozen=True, slots=True)
class _Relocation:
    section: int
    offset: int
    kind: int
    symbol: int
    addend: int


def link(raw: bytes, entry: str) -> Image:
    """Lay the loaded sections of an object out, and resolve what they say of each other.

    Parameters
    ----------
    raw : bytes
        ELF64 object file, little-endian.
    entry : str
        Name of the function.

    Raises
    ------
    LinkError
        No such function, or a relocation that is not known here.
    """
    return _Linker(raw).link(entry)


class _Linker:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._machine = struct.unpack_from("<H", raw, 18)[0]
        if raw[:6] != b"\x7fELF\x02\x01" or self._machine not in STUBS:
            raise LinkError("no ELF64 object of x86-64 or AArch64")
        self._sections = list(_read_sections(raw))
        self._symbols = [s for i in self._of_kind(SHT_SYMTAB) for s in self._read_symbols(i)]
        self._places: dict[int, int] = {}  # section -> offset in the image
        self._code = bytearray()
        self._relative: list[tuple[int, int]] = []
        self._imports: list[tuple[int, str]] = []
        self._stubs: dict[str, int] = {}
        self._slots: dict[int, int] = {}  # target -> offset of the slot with its address

    def link(self, entry: str) -> Image:
        for number, section in enumerate(self._sections):
            # Unwinding tables are for exceptions, which kernels have not.
            if section.flags & SHF_ALLOC and section.size and section.name != ".eh_frame":
                self._place(number, section)
        for relocation in self._relocations():
            self._relocate(relocation)
        starts = [
            self._places[s.section] + s.value
            for s in self._symbols
            if s.name == entry and s.section in self._places
        ]
        if not starts:
            raise LinkError(f"has no function {entry}")
        return Image(bytes(self._code), starts[0], tuple(self._relative), tuple(self._imports))

    # -- reading -------------------------------------------------------------------------------------

    def _of_kind(self, kind: int) -> list[int]:
        return [i for i, section in enumerate(self._sections) if section.kind == kind]

    def _read_symbols(self, number: int) -> Iterator[_Symbol]:
        section = self._sections[number]
        names = self._sections[section.info].start  # of a symbol table: where its names are
        for at in range(section.start, section.start + section.size, 24):
            name, _, _, home, value, _ = struct.unpack_from("<IBBHQQ", self._raw, at)
            yield _Symbol(_read_name(self._raw, names + name), home, value)

    def _relocations(self) -> Iterator[_Relocation]:
        for number in self._of_kind(SHT_RELA):
            section = self._sections[number]
            if section.info not in self._places:
                continue
            for at in range(section.start, section.start + section.size, 24):
                offset, info, addend = struct.unpack_from("<QQq", self._raw, at)
                yield _Relocation(section.info, offset, info & 0xFFFFFFFF, info >> 32, addend)

    # -- laying out ----------------------------------------------------------------------------------

    def _place(self, number: int, section: _Section) -> None:
        self._align(section.alignment)
        self._places[number] = len(self._code)
        stored = self._raw[section.start : section.start + section.size]
        self._code += bytes(section.size) if section.kind == SHT_NOBITS else stored

    def _align(self, alignment: int) -> None:
        self._code += bytes(-len(self._code) % max(1, alignment))

    def _target(self, relocation: _Relocation) -> int:
        """Offset in the image that a relocation points to; of an outside function, a stub."""
        symbol = self._symbols[relocation.symbol]
        if symbol.section in self._places:
            return self._places[symbol.section] + symbol.value
        if symbol.section:
            raise LinkError(f"needs {symbol.name}, which lies in a section that is not loaded")
        if symbol.name not in self._stubs:
            self._align(16)
            self._stubs[symbol.name] = len(self._code)
            self._code += STUBS[self._machine]
            self._imports.append((len(self._code), symbol.name))
            self._code += bytes(8)
        return self._stubs[symbol.name]

    def _slot(self, target: int) -> int:
        """Offset of 8 bytes that hold the address of a target."""
        if target not in self._slots:
            self._align(8)
            self._slots[target] = len(self._code)
            self._relative.append((len(self._code), target))
            self._code += bytes(8)
        return self._slots[target]

    # -- relocations ---------------------------------------------------------------------------------

    def _relocate(self, relocation: _Relocation) -> None:
        place = self._places[relocation.section] + relocation.offset
        if self._machine == EM_X86_64:
            self._relocate_x86(relocation, place)
        else:
            self._relocate_arm(relocation, place)

    def _relocate_x86(self, relocation: _Relocation, place: int) -> None:
        target = self._target(relocation)
        kind, addend = relocation.kind, relocation.addend
        if kind == 1:  # R_X86_64_64
            self._relative.append((place, target + addend))
        elif kind in (2, 4):  # PC32, PLT32
            self._code[place : place + 4] = struct.pack("<i", target + addend - place)
        elif kind in (9, 41, 42):  # GOTPCREL, GOTPCRELX, REX_GOTPCRELX
            self._code[place : place + 4] = struct.pack("<i", self._slot(target) + addend - place)
        elif kind == 24:  # PC64
            self._code[place : place + 8] = struct.pack("<q", target + addend - place)
        else:
            raise LinkError(f"has an x86-64 relocation of type {kind}")

    def _relocate_arm(self, relocation: _Relocation, place: int) -> None:
        kind = relocation.kind
        to = self._target(relocation) + relocation.addend
        if kind == 257:  # R_AARCH64_ABS64
            self._relative.append((place, to))
        elif kind == 260:  # PREL64
            self._code[place : place + 8] = struct.pack("<q", to - place)
        elif kind == 261:  # PREL32
            self._code[place : place + 4] = struct.pack("<i", to - place)
        elif kind in (282, 283):  # JUMP26, CALL26
            self._patch(place, 0x03FFFFFF, (to - place) >> 2 & 0x03FFFFFF)
        elif kind in (275, 276):  # ADR_PREL_PG_HI21 and without a check
            self._patch_page(place, to)
        elif kind == 311:  # ADR_GOT_PAGE
            self._patch_page(place, self._slot(to))
        elif kind == 312:  # LD64_GOT_LO12_NC
            self._patch(place, 0xFFF << 10, (self._slot(to) & 0xFFF) >> 3 << 10)
        elif kind in _LOW_12:
            self._patch(place, 0xFFF << 10, (to & 0xFFF) >> _LOW_12[kind] << 10)
        else:
            raise LinkError(f"has an AArch64 relocation of type {kind}")

    def _patch_page(self, place: int, target: int) -> None:
        """Write the distance in pages to an ADRP; an image starts at a page, so offsets tell it."""
        pages = target // PAGE - place // PAGE
        self._patch(place, 0x60FFFFE0, (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5)

    def _patch(self, place: int, mask: int, bits: int) -> None:
        old = struct.unpack_from("<I", self._code, place)[0]
        struct.pack_into("<I", self._code, place, old & ~mask | bits)


# ADD_ABS_LO12_NC, and LDST8, 16, 32, 64 and 128_ABS_LO12_NC: by how much the offset is shifted
_LOW_12 = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}


def _read_sections(raw: bytes) -> Iterator[_Section]:
    table = struct.unpack_from("<Q", raw, 40)[0]
    count, names_at = struct.unpack_from("<HH", raw, 60)
    rows = [struct.unpack_from("<IIQQQQIIQQ", raw, table + 64 * i) for i in range(count)]
    names = rows[names_at][4]
    for name, kind, flags, _, start, size, link_to, info, alignment, _ in rows:
        # A symbol table says by `link` where its names are, relocations by `info` what they change.
        other = link_to if kind == SHT_SYMTAB else info
        yield _Section(_read_name(raw, names + name), kind, flags, start, size, other, alignment)


def _read_name(raw: bytes, at: int) -> str:
    return raw[at : raw.index(b"\0", at)].decode()
