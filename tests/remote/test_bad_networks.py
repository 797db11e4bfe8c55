"""A merge over a network that loses connections, from nginx with TLS, which starts anew meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from edgemerge import merge
from edgemerge.finding.finder import Finder
from edgemerge.recipe.recipe import make_recipe
from edgemerge.remote import stand_ins
from edgemerge.types import Recipe
from tests.support.certificates import make_certificate
from tests.support.nginx import find_nginx, serve_by_nginx
from tests.support.small_models import wide_tensors, write_gguf

STREAMS = Finder(streams=True)
NAMES = ("base.gguf", "a.gguf", "b.gguf")


def ties(places: list[str]) -> Recipe:
    base, *others = places
    models = [(one, None) for one in others]
    return make_recipe(
        "ties", models, base=base, parameters={"density": 0.5}, out_type="Q8_0", finder=STREAMS
    )


@pytest.mark.skipif(find_nginx() is None, reason="nginx is not installed")
def test_cut_connections_and_a_restart_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    root.mkdir()
    base = wide_tensors(0)
    for number, name in enumerate(NAMES):
        tensors = wide_tensors(number, base) if number else dict(base)
        tensors["token_embd.weight"] = np.random.default_rng(number).random((6000, 256), np.float32)
        write_gguf(root / name, tensors)
    certificate, key = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    wanted = merge(ties([str(root / name) for name in NAMES]), tmp_path / "here.gguf", threads=2)
    with serve_by_nginx(root, tmp_path / "nginx", certificate, key) as nginx:
        nginx.cut = 0.01
        recipe = ties([f"{nginx.url}/{name}" for name in NAMES])
        restarts: list[Timer] = []

        def restart(done: int, total: int) -> None:
            if not restarts and done > total // 4:
                nginx.stop()
                restarts.append(Timer(0.3, nginx.start))
                restarts[0].start()

        began = time.monotonic()
        try:
            found = merge(recipe, tmp_path / "there.gguf", threads=2, progress=restart)
        finally:
            stand_ins.remove_all()
            for timer in restarts:
                timer.join()
        assert time.monotonic() - began < 60
        assert restarts
        assert nginx.n_cut > 3
    assert found.sha256 == wanted.sha256
