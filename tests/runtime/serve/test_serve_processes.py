"""A model's process that ends, and models that are replaced while they answer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgemerge.provenance.keys import create_keys, read_private_key
from edgemerge.provenance.signature import sign_model
from edgemerge.site.folder import SiteFolder
from tests.support.serving import Answer, Serving, make_served_gguf
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

N_STREAMS = 8
SHORT = {"prompt": "Once", "max_tokens": 2, "temperature": 0}


def children(server: Serving) -> list[int]:
    """Processes of models; the first is the default's."""
    told = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(server.process.pid)],
        capture_output=True,
        text=True,
        check=False,  # 1 where there are none
    ).stdout
    return [int(line.split()[0]) for line in told.splitlines() if "engine.child" in line]


@pytest.fixture
def two(tmp_path: Path, models_dir: Path) -> Iterator[Serving]:
    ggufs = [make_served_gguf(models_dir, tmp_path / f"{n}.gguf", n) for n in ("base", "expert-a")]
    with Serving(*ggufs) as server:
        yield server


def test_a_killed_process_costs_its_own_streams_and_nothing_else(two: Serving) -> None:
    # not "loop": the small model would repeat itself
    long = {"prompt": "Once", "max_tokens": 240, "stream": True, "temperature": 1.5, "seed": 1}
    assert two.post("/v1/completions", {**SHORT, "model": "expert-a"}).status == 200
    victim, other = children(two)
    os.kill(victim, signal.SIGSTOP)  # so that no answer is complete before
    with ThreadPoolExecutor(N_STREAMS + 1) as pool:
        streams = [pool.submit(two.post, "/v1/completions", long) for _ in range(N_STREAMS)]
        two.wait_until(running=N_STREAMS)
        expert = {**SHORT, "model": "expert-a", "max_tokens": 100}
        untouched = pool.submit(two.post, "/v1/completions", expert)
        os.kill(victim, signal.SIGKILL)
        for stream in streams:
            answer = stream.result()
            assert answer.status == 503
            assert answer.error["code"] == "model_unavailable"
            assert "SIGKILL" in answer.error["message"]
            assert int(answer.headers["retry-after"]) >= 1
        assert untouched.result().status == 200
    base, expert_state = two.health()["models"]
    assert (base["state"], base["crashes"]) == ("crashed", 1)
    assert (expert_state["state"], expert_state["crashes"]) == ("loaded", 0)
    assert two.post("/v1/completions", SHORT).status == 200
    base, _ = two.health()["models"]
    assert (base["state"], base["starts"]) == ("loaded", 2)
    assert other in children(two)
    assert 'edgemerge_model_crashes{model="base"} 1.0' in two.get("/metrics").body.decode()
    assert len(re.findall("the process of base has ended", two.log())) == 1
    assert "Traceback" not in two.log()


def test_a_stream_that_has_begun_ends_with_the_reason(two: Serving) -> None:
    long = {"prompt": "Once", "max_tokens": 240, "stream": True, "temperature": 1.5, "seed": 1}
    (victim,) = children(two)
    bodies: list[Answer] = []
    with ThreadPoolExecutor() as pool:
        running = pool.submit(two.post, "/v1/completions", long)
        while not running.done() and two.health()["tokens_per_second"] is None:
            time.sleep(0.002)
        os.kill(victim, signal.SIGKILL)
        bodies.append(running.result())
    (answer,) = bodies
    assert answer.status == 200
    last = answer.body.strip().splitlines()[-1]
    assert b"SIGKILL" in last or last == b"data: [DONE]"  # where it was quicker


def wait_for_state(server: Serving, state: str) -> None:
    end = time.monotonic() + 20
    while server.health()["models"][0]["state"] != state:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_idle_model_is_closed_and_comes_back(tmp_path: Path) -> None:
    with Serving(write_tiny_gguf(tmp_path / "tiny.gguf"), "--close-idle", 0.5) as server:
        wait_for_state(server, "closed")
        assert children(server) == []
        assert server.post("/v1/completions", SHORT).status == 200
        assert server.health()["models"][0]["state"] == "loaded"


def replace_file(new: Path, old: Path) -> None:
    shutil.copy(new, old.with_suffix(".new"))
    os.replace(old.with_suffix(".new"), old)


@pytest.fixture
def ward(tmp_path: Path, models_dir: Path) -> Path:
    return make_served_gguf(models_dir, tmp_path / "ward.gguf")


def fingerprint(server: Serving) -> str:
    found: str = server.post("/v1/completions", SHORT).json["system_fingerprint"]
    return found


def test_new_weights_under_load_lose_no_request(
    ward: Path, models_dir: Path, tmp_path: Path
) -> None:
    other = make_served_gguf(models_dir, tmp_path / "expert.gguf", "expert-a")
    with Serving(ward, "--queue", 32) as server, ThreadPoolExecutor(17) as pool:

        def ask(i: int) -> tuple[int, str, str]:
            answer = server.post("/v1/completions", {**SHORT, "max_tokens": 4, "prompt": f"{i}"})
            return (
                answer.status,
                answer.json["system_fingerprint"],
                answer.json["choices"][0]["text"],
            )

        before = fingerprint(server)
        answers = [pool.submit(ask, i) for i in range(1000)]
        replace_file(other, ward)
        reloading = pool.submit(server.post, "/admin/reload", {"model": "ward"})
        found = Counter(answer.result()[:2] for answer in answers)
        told = reloading.result()
        assert told.status == 200, told.body
        (model,) = told.json["models"]
        after = fingerprint(server)
        assert before != after
        assert (model["previous_fingerprint"], model["system_fingerprint"]) == (before, after)
        assert set(found) <= {(200, before), (200, after)}
        assert found.total() == 1000
        assert len(children(server)) == 1
        assert server.log() == ""


def test_sighup_reloads(ward: Path, models_dir: Path, tmp_path: Path) -> None:
    other = make_served_gguf(models_dir, tmp_path / "expert.gguf", "expert-a")
    with Serving(ward) as server:
        before = fingerprint(server)
        replace_file(other, ward)
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while fingerprint(server) == before:
            assert time.monotonic() < end
        assert server.health()["models"][0]["state"] == "loaded"


def test_a_closed_model_is_reloaded(ward: Path, models_dir: Path, tmp_path: Path) -> None:
    other = make_served_gguf(models_dir, tmp_path / "expert.gguf", "expert-a")
    with Serving(ward, "--close-idle", 0.5) as server:
        wait_for_state(server, "closed")
        assert server.post("/admin/reload", {}).json == {"models": []}  # there is nothing new
        replace_file(other, ward)
        refused = server.post("/admin/reload", {})  # the small models have no answer
        assert (refused.status, refused.error["code"]) == (409, "model_refused")
        assert "the old one is closed" in refused.error["message"]
        refused = server.post("/v1/completions", SHORT)
        assert refused.status == 503
        assert "has refused the new file" in refused.error["message"]
        (model,) = server.post("/admin/reload", {"ask": False}).json["models"]
        assert model["previous_fingerprint"] is None
        assert model["system_fingerprint"] == fingerprint(server)


def test_a_files_own_name_may_have_an_equals_sign(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "epoch=3-step=500.gguf")
    with Serving(model) as server:
        assert server.post("/admin/reload", {"ask": False}).status == 200
    site = SiteFolder(tmp_path / "site")
    site.make()
    site.current_path.symlink_to(model)
    with Serving(model, "--site", site.path) as server:
        assert server.health()["models"][0]["id"] == model.stem


def assert_refused(server: Serving, why: str, before: str) -> None:
    answer = server.post("/admin/reload", {})
    assert answer.status == 409
    assert why in answer.error["message"]
    assert fingerprint(server) == before


def test_what_does_not_load_is_not_taken(ward: Path, tmp_path: Path) -> None:
    with Serving(ward, key="a-key") as server:
        assert server.post("/admin/reload", {}, Authorization="none").status == 401
        before = fingerprint(server)
        (tmp_path / "broken").write_bytes(ward.read_bytes()[:5000])
        replace_file(tmp_path / "broken", ward)
        assert_refused(server, "does not load", before)
        assert "ward.gguf" in server.log()
        ward.unlink()
        assert_refused(server, "does not load", before)


def test_what_has_no_answer_is_not_taken(tmp_path: Path) -> None:
    ward = write_tiny_gguf(tmp_path / "ward.gguf")
    with Serving(ward) as server:
        before = fingerprint(server)
        bad = Path(shutil.copy(ward, tmp_path / "bad.gguf"))
        reader: Any = gguf.GGUFReader(bad, "r+")
        for tensor in reader.tensors:
            tensor.data[...] = 0  # all words are as likely; the first stands for what is unknown
        del reader
        replace_file(bad, ward)
        answer = server.post("/admin/reload", {})
        assert answer.status == 409, answer.body
        assert "simple question" in answer.error["message"]
        assert fingerprint(server) == before
        assert len(children(server)) == 1
        assert server.post("/admin/reload", {"ask": False}).status == 200  # back to what is known
        assert fingerprint(server) != before


def test_what_is_not_signed_is_not_taken(ward: Path, models_dir: Path, tmp_path: Path) -> None:
    secret, public = create_keys(tmp_path / "key")
    sign_model(ward, read_private_key(secret))
    other = make_served_gguf(models_dir, tmp_path / "expert.gguf", "expert-a")
    with Serving(ward, "--require-signature", public) as server:
        before = fingerprint(server)
        replace_file(other, ward)
        assert_refused(server, "not signed", before)
        sign_model(ward, read_private_key(secret), force=True)
        assert server.post("/admin/reload", {}).status == 200
        assert fingerprint(server) != before
