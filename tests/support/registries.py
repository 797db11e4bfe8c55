"""Registries on disk for tests: keys, a small delta, publishers and readers at any time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from securesystemslib.signer import CryptoSigner

from edgemerge.fleet.registry.client import Entry, Registry
from edgemerge.fleet.registry.folder import RegistryFolder
from edgemerge.fleet.registry.keys import read_signers
from edgemerge.fleet.registry.publishing import Asked, publish
from edgemerge.fleet.registry.roots import Keys, create
from edgemerge.provenance.keys import create_keys

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
LASTS = timedelta(days=90)
BASE = 0x1234ABCD


def ignore(_done: int, _total: int) -> None:
    """Show no progress."""


def write_delta(path: Path, seed: int = 0, *, base: int = BASE, kind: str = "delta") -> Path:
    """Write a file with the header of a delta, and 256 KiB of noise."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_license("apache-2.0")
    writer.add_uint32("delta.version", 1)
    writer.add_uint32("delta.base_sample_crc32", base)
    rng = np.random.default_rng(seed)
    writer.add_tensor("token_embd.weight", rng.standard_normal((256, 256)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Site:
    """A registry with one publisher in a folder of a test."""

    def __init__(self, folder: Path, *, makes: bool = True) -> None:
        self.folder, self.path = folder, folder / "registry"
        self.keys: dict[str, CryptoSigner] = {}
        self.root = self.path / "metadata" / "1.root.json"
        if makes:
            create(self.at(NOW), Keys([self.key("root")]))

    def copy(self, folder: Path) -> Site:
        """Copy all of it, with what its publisher's machine knows."""
        shutil.copytree(self.folder, folder)
        site = Site(folder, makes=False)
        site.keys = dict(self.keys)
        return site

    def key(self, name: str) -> CryptoSigner:
        """Return a key, made at first use."""
        if name not in self.keys:
            private, _ = create_keys(self.folder / name)
            self.keys[name] = read_signers([private])[0]
        return self.keys[name]

    def at(self, now: datetime, *names: str, lasts: timedelta = LASTS) -> RegistryFolder:
        """Return the folder as a publisher has it at a time, with its keys."""
        signers = [self.key(name) for name in names or ("publisher",)]
        state = self.folder / "publisher-state"
        return RegistryFolder(self.path, signers, lasts, state=state, now=now)

    def publish(
        self, name: str = "ward", version: str = "1", *, seed: int = 0, now: datetime = NOW
    ) -> Entry:
        """Publish a delta, which is as its seed says."""
        file = write_delta(self.folder / "file.gguf", seed)
        return publish(self.at(now), file, Asked(name, version), ignore)

    def mirror(self, name: str) -> Path:
        """Copy the registry as it is."""
        target = self.folder / name
        shutil.copytree(self.path, target)
        return target

    def reader(
        self, address: Path | str | None = None, *, now: datetime = NOW, state: str = "state"
    ) -> Registry:
        """Return what a machine has that reads the registry, or a mirror, at a time."""
        return Registry(str(address or self.path), self.root, self.folder / state, now=now)


def edit(path: Path, change: Callable[[dict[str, Any]], object], *signers: CryptoSigner) -> None:
    """Change what a file of metadata says, and sign it by these keys alone; by none, leave signatures."""
    from tuf.api.metadata import Metadata

    document = json.loads(path.read_text())
    change(document["signed"])
    if signers:
        metadata: Metadata[Any] = Metadata.from_dict(
            {"signatures": [], "signed": document["signed"]}
        )
        for signer in signers:
            metadata.sign(signer, append=True)
        path.write_bytes(metadata.to_bytes())
    else:
        path.write_text(json.dumps(document))
