"""A model without a file: a header alone, for all that reads no tensor data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemerge.formats.gguf.metadata import Scalar, encode_value
from edgemerge.formats.gguf.types import row_bytes
from edgemerge.types import FileState, Source, TensorSpec, UInt8

N_EMBD, N_FF, N_VOCAB = 256, 512, 64
TOKENS = tuple(f"t{i}" for i in range(N_VOCAB))


def tensor(name: str, shape: tuple[int, ...], dtype: str = "F16") -> TensorSpec:
    """Describe one stored tensor."""
    spec = TensorSpec(name, shape, dtype, 0)
    return TensorSpec(name, shape, dtype, spec.n_rows * row_bytes(dtype, spec.n_cols))


class FakeSource:
    """A Llama's header, with whatever a test wants to be different."""

    def __init__(
        self,
        path: str | Path,
        *,
        architecture: str = "llama",
        n_layers: int = 2,
        dtype: str = "F16",
        tokens: Sequence[str] = TOKENS,
        metadata: Mapping[str, tuple[Any, str]] | None = None,
        extra: Sequence[TensorSpec] = (),
        without: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.architecture = architecture
        specs = [tensor("token_embd.weight", (len(tokens), N_EMBD), dtype)]
        for layer in range(n_layers):
            block = f"blk.{layer}"
            specs.append(tensor(f"{block}.attn_norm.weight", (N_EMBD,), "F32"))
            specs.append(tensor(f"{block}.attn_q.weight", (N_EMBD, N_EMBD), dtype))
            specs.append(tensor(f"{block}.attn_k.weight", (N_EMBD // 2, N_EMBD), dtype))
            specs.append(tensor(f"{block}.ffn_down.weight", (N_EMBD, N_FF), dtype))
        specs.append(tensor("output_norm.weight", (N_EMBD,), "F32"))
        self._specs = {spec.name: spec for spec in (*specs, *extra) if spec.name != without}
        vocabulary: list[Scalar] = list(tokens)
        pairs: dict[str, tuple[Any, str]] = {
            "general.architecture": (architecture, "str"),
            "general.name": ("Fake", "str"),
            "general.file_type": (1, "u32"),
            f"{architecture}.block_count": (n_layers, "u32"),
            f"{architecture}.attention.head_count": (4, "u32"),
            f"{architecture}.attention.head_count_kv": (2, "u32"),
            f"{architecture}.context_length": (256, "u32"),
            "tokenizer.ggml.model": ("gpt2", "str"),
            "tokenizer.ggml.tokens": (vocabulary, "[str]"),
            **(metadata or {}),
        }
        self._metadata = {key: encode_value(value, kind) for key, (value, kind) in pairs.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        return self._metadata

    def notes(self) -> Sequence[str]:
        return ()

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        raise AssertionError(f"planning read {name}")

    def forget(self, name: str, n_rows: int | None = None) -> None:
        raise AssertionError("planning reads no tensor data")

    def work_bytes(self) -> int:
        return 0

    def states(self) -> Sequence[FileState]:
        return ()

    def check_unchanged(self) -> None:
        """There is no file that could change."""

    def close(self) -> None:
        """There is nothing to close."""


class AdaptedFake(FakeSource):
    """The same with an adapter, which takes memory once and of each thread."""

    held, kept, passing = 10 << 20, 30 << 20, 20 << 20
    reading = kept + passing

    @property
    def base(self) -> Source:
        return FakeSource(self.path)

    def read_on_base(self, *_: object) -> None:
        raise AssertionError("planning reads no tensor data")

    def changes(self, name: str) -> bool:
        return name in self._specs

    def kept_bytes(self) -> int:
        return self.kept

    def passing_bytes(self) -> int:
        return self.passing

    def held_parts(self) -> Mapping[int, int]:
        return {id(self): self.held}


def by_path(*sources: FakeSource) -> Mapping[Path, Source]:
    """Sources by their path, as `make_plan` opens them."""
    return {source.path: source for source in sources}
