"""Ranges of a file on a server: which are asked for, what is kept, and how reading stops."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import FormatError, OutputError, RecipeError, Stopped
from edgemerge.remote import failures
from edgemerge.remote.address import read_address
from edgemerge.remote.any_address import read_any_address
from edgemerge.remote.file import RemoteFile, fetch_rest, fetch_small, probe
from edgemerge.remote.spill import Spill
from tests.support.file_server import FileServer, serve_folder

SIZE, BLOCK = 4 << 20, 1 << 18
RUN = (0, SIZE)


@pytest.fixture(name="raw")
def _raw(tmp_path: Path) -> bytes:
    raw = np.random.default_rng(0).bytes(SIZE)
    (tmp_path / "data.gguf").write_bytes(raw)
    return raw


@pytest.fixture(name="server")
def _server(tmp_path: Path, raw: bytes) -> Iterator[FileServer]:
    with serve_folder(tmp_path) as server:
        yield server


@pytest.fixture(name="file")
def _file(server: FileServer) -> Iterator[RemoteFile]:
    file = opened(server)
    yield file
    file.close()


def opened(server: FileServer, spill: Spill | None = None) -> RemoteFile:
    address = read_address(f"{server.url}/data.gguf")
    return RemoteFile(address, probe(address), spill)


def read(file: RemoteFile, start: int, n_bytes: int, run: tuple[int, int] = RUN) -> bytes:
    raw = bytearray(n_bytes)
    half = n_bytes // 2
    view = memoryview(raw)
    file.fill([view[:half], view[half:]], start, run)
    return bytes(raw)


def ranges(server: FileServer) -> list[tuple[int, int]]:
    """Return what was asked for after the probe, half-open."""
    texts = [str(text).removeprefix("bytes=").split("-") for text in server.asked("data.gguf")[1:]]
    return [(int(first), int(last) + 1) for first, last in texts]


def test_a_run_that_is_read_in_order_is_one_request(
    server: FileServer, file: RemoteFile, raw: bytes
) -> None:
    blocks = [read(file, at, BLOCK) for at in range(0, SIZE, BLOCK)]
    assert b"".join(blocks) == raw
    assert ranges(server) == [RUN]


def test_threads_that_take_blocks_in_turn_read_one_answer(
    server: FileServer, file: RemoteFile, raw: bytes
) -> None:
    found: dict[int, bytes] = {}

    def work(at: int) -> None:
        found[at] = read(file, at, BLOCK)

    server.pause.clear()
    threads = [threading.Thread(target=work, args=(i * BLOCK,)) for i in range(3)]
    for thread in threads:
        thread.start()
        while len(server.requests) < 2:  # the probe's, and that of the first block
            time.sleep(0.01)
    server.pause.set()
    for thread in threads:
        thread.join()
    assert b"".join(found[at] for at in sorted(found)) == raw[: 3 * BLOCK]
    assert ranges(server)[0] == RUN


def test_single_rows_are_asked_for_alone(server: FileServer, file: RemoteFile, raw: bytes) -> None:
    for at in (0, SIZE // 2, SIZE // 3):
        assert read(file, at, 512) == raw[at : at + 512]
    assert ranges(server) == [(at, at + 512) for at in (0, SIZE // 2, SIZE // 3)]
    assert len({*server.clients}) == 2  # the probe's connection, and one for all rows


def test_a_lost_connection_goes_on_where_it_was(
    server: FileServer, file: RemoteFile, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAYS", (0.0, 0.01))
    server.drop_each = 2
    assert read(file, 0, SIZE) == raw
    first, second, *_ = ranges(server)
    assert first == RUN
    assert second[0] > 0


def test_what_was_read_is_kept_until_it_is_forgotten(
    server: FileServer, raw: bytes, tmp_path: Path
) -> None:
    file = opened(server, Spill(tmp_path))
    for _ in range(3):
        assert b"".join(read(file, at, BLOCK) for at in range(0, SIZE, BLOCK)) == raw
    assert read(file, 1000, SIZE // 2) == raw[1000 : 1000 + SIZE // 2]
    assert ranges(server) == [RUN]
    file.forget(BLOCK, BLOCK)
    assert read(file, 0, BLOCK) == raw[:BLOCK]
    assert ranges(server) == [RUN]
    assert read(file, BLOCK, BLOCK) == raw[BLOCK : 2 * BLOCK]
    assert ranges(server) == [RUN, (BLOCK, 2 * BLOCK)]
    assert [path.name for path in tmp_path.iterdir()] == ["data.gguf"]
    file.close()
    with pytest.raises(OutputError, match="leave out --spill"):
        Spill(tmp_path / "none")


def test_what_is_forgotten_while_it_is_read_is_not_taken_for_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = Spill(tmp_path)
    spill.write([memoryview(b"x" * BLOCK)], 0)
    preadv = os.preadv

    def forget_first(*given: Any) -> int:
        spill.forget(0, BLOCK)
        return preadv(*given)

    monkeypatch.setattr(os, "preadv", forget_first)
    assert not spill.read([memoryview(bytearray(BLOCK))], 0)
    spill.close()


def test_stop_ends_a_read_that_waits(server: FileServer, file: RemoteFile) -> None:
    server.pause.clear()
    caught: list[BaseException] = []

    def work() -> None:
        try:
            read(file, 0, SIZE)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while len(server.requests) < 2:
        time.sleep(0.01)
    started = time.monotonic()
    file.stop()
    thread.join()
    server.pause.set()
    assert isinstance(caught[0], Stopped)
    assert time.monotonic() - started < 10  # of the 30 s without an answer
    with pytest.raises(Stopped):
        read(file, 0, 10)


def test_a_file_is_not_read_past_its_end(file: RemoteFile) -> None:
    with pytest.raises(FormatError, match="ends before what is read of it"):
        read(file, SIZE - 10, 20)


def test_a_small_file_that_is_cut_off_is_fetched_again(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAYS", (0.0, 0.01))
    (tmp_path / "small.json").write_bytes(b"{}" * 500)
    server.drop_each = 2
    for _ in range(2):  # one of them is cut off at first
        fetch_small(read_address(f"{server.url}/small.json"), tmp_path / "found", 10_000)
        assert (tmp_path / "found").read_bytes() == b"{}" * 500
    assert len(server.asked("small.json")) == 3


def test_a_part_of_a_small_file_is_not_taken_for_the_whole(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "FIRST_DELAYS", (0.0,))
    (tmp_path / "small.json").write_bytes(b"{}" * 5)
    address = read_address(f"{server.url}/small.json")
    server.most = 3
    with pytest.raises(
        FormatError, match=r"small\.json: could not be .* sends less than it was ask"
    ):
        fetch_small(address, tmp_path / "found", 10)
    server.most = None
    with pytest.raises(FormatError, match=r"small\.json: is larger than 9e-06 MB"):
        fetch_small(address, tmp_path / "found", 9)
    server.headers["Content-Range"] = "bytes 1-9/10"
    with pytest.raises(FormatError, match="sends other bytes than it was asked for"):
        fetch_small(address, tmp_path / "found", 10)
    server.headers["Content-Range"] = "bytes 0-10/11"
    with pytest.raises(FormatError, match="closed in the middle of an answer"):
        fetch_small(address, tmp_path / "found", 11)


@pytest.mark.parametrize(("status", "why"), [(403, "may not be read"), (404, "is not there")])
def test_a_small_file_has_to_be_there_only_where_it_is_listed(
    server: FileServer, tmp_path: Path, status: int, why: str
) -> None:
    address = read_address(f"{server.url}/small.json")
    server.refuse = lambda path, number: status
    fetch_small(address, tmp_path / "found", 10)
    assert not (tmp_path / "found").exists()
    with pytest.raises(FormatError, match=rf"small\.json: {why} \({status}\)"):
        fetch_small(address, tmp_path / "found", 10, is_listed=True)


def test_a_full_disk_is_no_fault_of_the_network(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OutputError) as error:
        fetch_small(read_address(f"{server.url}/data.gguf"), tmp_path / "full", SIZE)
    assert str(error.value) == (
        f"{tmp_path}: cannot hold what is fetched (No space left on device); free some of this disk, or "
        "set TMPDIR"
    )
    assert len(server.asked("data.gguf")) == 1


@pytest.mark.parametrize("n_digits", [14, 23, 5000])
def test_a_size_that_no_file_has_is_refused(server: FileServer, n_digits: int) -> None:
    size = "9" * n_digits
    server.headers["Content-Range"] = f"bytes 0-0/{size}"
    with pytest.raises(FormatError, match="does not say which bytes it sends"):
        opened(server)
    server.ranges, server.headers = False, {"Content-Length": size}
    address = read_address(f"{server.url}/data.gguf")
    with tempfile.TemporaryFile() as file, pytest.raises(FormatError, match="size which no file"):
        fetch_rest(address, file, SIZE, lambda done, total: None)


@pytest.mark.parametrize("login", ["user:12/s3cret@", "user:/s3cret@", "user:12?s3cret@"])
def test_a_slash_in_a_password_does_not_show_the_rest(login: str) -> None:
    with pytest.raises(RecipeError, match="write / and @ of a login as %2F and %40") as error:
        read_address(f"https://{login}host/model.gguf")
    assert "s3cret" not in str(error.value)
    for text in ("https://user:12%2Fs3cret@host:8/a", "https://host/@a", "https://[::1]/@a"):
        assert read_address(text).path.endswith("a")


def test_a_server_may_lead_on_to_a_path_with_an_at(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "data.gguf").rename(tmp_path / "data@1.gguf")
    server.redirects["/data.gguf"] = "/data@1.gguf"
    assert opened(server).identity.n_bytes == SIZE


@pytest.mark.parametrize("scheme", ["https", "sftp"])
def test_a_byte_that_is_not_utf8_is_told(scheme: str) -> None:
    with pytest.raises(RecipeError, match="an address has a byte that is not UTF-8"):
        read_any_address(f"{scheme}://host/{os.fsdecode(bytes([255]))}.gguf")


@pytest.mark.parametrize("proxy", ["http://s3cret@h:port", "http://[h", "http://a..b:80"])
def test_a_proxy_that_is_no_address_is_told(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(FormatError, match="behind a proxy whose address cannot be read") as error:
        probe(read_address("http://models.invalid/a.gguf"))
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".org"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(RecipeError, match="an address cannot be read"):
        read_address(f"https://{host}/model.gguf")


def test_a_redirect_to_no_address_is_refused(server: FileServer) -> None:
    server.redirects["/data.gguf"] = "https://[x/y"
    with pytest.raises(FormatError, match="leads on to what is no address"):
        opened(server)


def test_what_is_forgotten_while_it_is_written_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = Spill(tmp_path)
    pwrite = os.pwrite

    def forget_then(*given: Any) -> int:
        n_written = pwrite(*given)
        spill.forget(0, BLOCK)
        return n_written

    monkeypatch.setattr(os, "pwrite", forget_then)
    spill.write([memoryview(b"x" * BLOCK)], 0)
    assert not spill.read([memoryview(bytearray(BLOCK))], 0)
    spill.close()
