"""A server of S3's protocol on this machine, moto's, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

BUCKET = "models"


@contextmanager
def serve_s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve until the end of the block, as the usual variables then say, what lies in a folder."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "FSSPEC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOFTESTS")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret/key")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    program = "import sys; from moto.server import main; main(sys.argv[1:])"
    with (folder.parent / "s3.log").open("w+") as log:
        command = [sys.executable, "-c", program, "-p", "0"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = _wait_for(Path(log.name), process)
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            _put(f"{url}/{BUCKET}", b"")
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                put_file(url, path.relative_to(folder).as_posix(), path.read_bytes())
            yield url
        finally:
            process.kill()
            process.wait()


def _wait_for(log: Path, process: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        for line in log.read_text().splitlines():
            if "Running on http" in line:
                return line.rpartition(" ")[2].strip()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def put_file(url: str, key: str, body: bytes) -> None:
    """Put a file into the bucket, or in the place of one."""
    _put(f"{url}/{BUCKET}/{quote(key)}", body)


def _put(url: str, body: bytes) -> None:
    request = urllib.request.Request(url, body, method="PUT")
    login = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/s3/aws4_request"
    request.add_header("Authorization", login)
    request.add_header("Content-Type", "application/octet-stream")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
