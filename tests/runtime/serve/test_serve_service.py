"""The parts of a server put together, with a process that only says that it has loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edgemerge.runtime.engine.options import EngineFacts, EngineOptions
from edgemerge.runtime.serve import service as service_module
from edgemerge.runtime.serve.options import ServeOptions
from edgemerge.runtime.serve.service import Service
from edgemerge.site.folder import SiteFolder
from tests.support.fake_process import FakeProcess, make_facts

LESS = 32  # tokens
MEMORY = 1 << 40  # whatever the tests before left in this process


class SmallProcess(FakeProcess):
    """A process whose memory holds fewer tokens than it was told."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options.path.stem)

    async def start(self) -> EngineFacts:
        return make_facts(n_ctx=LESS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "ModelProcess", SmallProcess)


def prepare(service: Service) -> None:
    async def scenario() -> None:
        try:
            await service.prepare()
        finally:
            await service.finish()

    asyncio.run(scenario())


def test_a_loaded_model_tells_the_context_that_it_has(tiny_gguf: Path) -> None:
    """Fault: /v1/models went on to tell what was asked for."""
    service = Service(ServeOptions((("ward", tiny_gguf),), memory=MEMORY))
    assert service.models.resolve("ward").n_ctx > LESS
    prepare(service)
    (file,) = service.describe("http://127.0.0.1").models
    assert file.n_ctx == LESS


def test_the_devices_folder_is_tidied_when_the_port_is_taken(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    site = SiteFolder(tmp_path / "site")
    site.make()
    left = site.work / "page-x"
    left.mkdir()
    service = Service(ServeOptions((("ward", tiny_gguf),), memory=MEMORY, site=site.path))
    assert left.exists()
    prepare(service)
    assert not left.exists()
