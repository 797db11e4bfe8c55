"""Talking to the hub, in a process of its own: the client's memory is no part of a merge's budget.

`list_files` and `fetch_files` start `python -m edgemerge.finding.fetch`, whose question is its argument and
whose answer is one line of JSON. The client is huggingface_hub. It sends the user's token and heeds
HF_ENDPOINT and the cache's variables. Large files go on where an earlier process stopped, which the client
alone does not do: it begins a file anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgemerge.errors import RecipeError, RuntimeFailure
from edgemerge.finding.cache import cache_folder
from edgemerge.finding.files import is_weights
from edgemerge.finding.names import HubName
from edgemerge.types import Progress

__all__ = ["RemoteFile", "Repository", "fetch_files", "find_repository", "list_files"]

POLL = 0.2  # seconds between two looks at how far it is
LOG_IN = "log in with: hf auth login (or set HF_TOKEN)"


class RemoteFile(NamedTuple):
    """A file of a repository."""

    path: str
    n_bytes: int
    blob: str  # its name in the cache: the SHA-256 of a large file, else git's hash


class Repository(NamedTuple):
    """A repository at one commit, and how its files are asked for."""

    commit: str
    files: list[RemoteFile]
    endpoint: str  # the hub's address
    token: str | None  # the user's


def find_repository(name: HubName) -> Repository:
    """Ask the hub for a repository's commit and its files, and the client as whom it asks.

    Raises
    ------
    RecipeError, RuntimeFailure
        As of `list_files`.
    """
    answer = _ask({"do": "list", "repo": name.repo, "revision": name.revision}, None, [])
    files = [RemoteFile(*entry) for entry in answer["files"]]
    return Repository(answer["commit"], files, answer["endpoint"], answer["token"])


def list_files(name: HubName) -> tuple[str, list[RemoteFile]]:
    """Ask the hub for a repository's commit and its files.

    Raises
    ------
    RecipeError
        There is no such model or revision, it may not be read, or the hub cannot be reached.
    RuntimeFailure
        The process could not be started, or ended without an answer.
    """
    found = find_repository(name)
    return found.commit, found.files


def fetch_files(
    name: HubName, commit: str, files: Sequence[RemoteFile], progress: Progress
) -> Path:
    """Bring files of a repository into the cache, in their order, and return the snapshot's folder.

    Parameters
    ----------
    name : HubName
        Of the repository, with the revision that the cache is to know the commit by.
    commit : str
        Of `list_files`.
    files : sequence of RemoteFile
        What is to be fetched; what is in the cache already is left as it is.
    progress : callable
        Called with bytes done and bytes in all; may raise to stop.

    Raises
    ------
    RecipeError, RuntimeFailure
        As of `list_files`; what was fetched stays, and the next call goes on.
    """
    question = {
        "do": "fetch",
        "repo": name.repo,
        "revision": name.revision or "main",
        "commit": commit,
        "files": [file.path for file in files],
    }
    return Path(_ask(question, progress, files, name)["folder"])


def _ask(
    question: dict[str, Any],
    progress: Progress | None,
    files: Sequence[RemoteFile],
    name: HubName | None = None,
) -> dict[str, Any]:
    """Start the process, wait for its answer, and tell meanwhile how large the files are."""
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["HF_HUB_DISABLE_TELEMETRY"] = "1"  # nothing is sent that need not be
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                # With -P nothing in the user's folder is taken for a module.
                [sys.executable, "-P", "-m", "edgemerge.finding.fetch", json.dumps(question)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us, who end it
            )
        except OSError as error:
            raise RuntimeFailure(
                f"no process to reach the hub can be started ({error.strerror})"
            ) from error
        try:
            out = _wait(process, progress, files, name)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        said.seek(0)
        detail = said.read().decode(errors="replace").strip()
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        raise RuntimeFailure(
            "the process that talks to the hub ended without an answer; run the command again",
            detail=detail,
        ) from None
    if "refusal" in answer:
        raise RecipeError(answer["refusal"])
    return answer


def _wait(
    process: subprocess.Popen[bytes],
    progress: Progress | None,
    files: Sequence[RemoteFile],
    name: HubName | None,
) -> bytes:
    while True:
        try:
            return process.communicate(timeout=POLL)[0]
        except subprocess.TimeoutExpired:
            if progress is not None and name is not None:
                progress(bytes_there(name, files), sum(file.n_bytes for file in files))


def bytes_there(name: HubName, files: Sequence[RemoteFile]) -> int:
    """Count the bytes of files that are in the cache, whole or begun."""
    blobs = _blobs(name.repo)
    total = 0
    for file in files:
        for path in (blobs / file.blob, _begun(blobs / file.blob)):
            try:
                total += min(file.n_bytes, path.stat().st_size)
                break
            except OSError:
                continue
    return total


def _blobs(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}" / "blobs"


def _begun(blob: Path) -> Path:
    """Name the file of what is fetched so far; the client's own names are others."""
    return blob.with_name(f"{blob.name}.edgemerge.incomplete")


# -- in the process --------------------------------------------------------------------------------


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = question["repo"]
    try:
        return _list(question) if question["do"] == "list" else _fetch(question)
    except GatedRepoError as error:
        where = f"{_endpoint()}/{repo}"
        refusal = f"{repo} is gated: ask for access on {where}, then {LOG_IN}"
        if _token() and getattr(error.response, "status_code", 401) == 403:
            refusal = f"{repo} is gated, and your token has no access: ask for it on {where}"
    except RevisionNotFoundError:
        refusal = f"{repo} has no revision {question['revision']!r} on the hub; check the revision"
    except RepositoryNotFoundError:
        refusal = f"the hub has no model {repo}, or it is private; check the name, or {LOG_IN}"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = LOG_IN if status in (401, 403) else "try again later"
        refusal = f"the hub refused {repo} with the status {status}; {remedy}"
    except LocalEntryNotFoundError as error:
        refusal = _unreachable(error.__cause__ or error)
    except OSError as error:
        refusal = f"{repo} could not be written to the hub's cache ({error.strerror or error})"
    except Exception as error:  # the client's own kinds change with the library below it
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        refusal = _unreachable(error)
    return {"refusal": refusal}


def _unreachable(error: BaseException) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"the hub cannot be reached at {_endpoint()} ({reason}); see to the network and give the same "
        "command again, which goes on where this one stopped"
    )


def _list(question: dict[str, Any]) -> dict[str, Any]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(question["repo"], revision=question["revision"], files_metadata=True)
    files = [
        (f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else f.blob_id)
        for f in info.siblings or []
    ]
    return {"commit": info.sha, "files": files, "endpoint": _endpoint(), "token": _token()}


def _fetch(question: dict[str, Any]) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    repo, commit = question["repo"], question["commit"]
    at = ""
    for i, path in enumerate(question["files"]):
        if is_weights(path):
            _fetch_large(repo, commit, path)
        # By the revision's name once, so that the cache knows the commit by it.
        revision = question["revision"] if i == 0 else commit
        at = hf_hub_download(repo, path, revision=revision)
        folder = Path(at).parents[path.count("/")]
        if folder.name != commit:
            return {"refusal": f"{repo} was changed meanwhile; give the same command again"}
    return {"folder": str(folder)}


def _fetch_large(repo: str, commit: str, path: str) -> None:
    """Fetch a file as a blob of the cache, going on with what an earlier process left of it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url, headers = hf_hub_url(repo, path, revision=commit), build_hf_headers()
    found = get_hf_file_metadata(url, headers=headers)
    if found.etag is None or found.size is None or not found.etag.isalnum():
        return  # no blob's name: the client fetches it alone
    blob = _blobs(repo) / found.etag
    begun = _begun(blob)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with begun.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two commands may want the same model
        if blob.exists():
            begun.unlink(missing_ok=True)
            return
        done = os.fstat(file.fileno()).st_size
        if done > found.size:
            file.truncate(done := 0)
        http_get(url, file, resume_size=done, headers=headers, expected_size=found.size)
        file.flush()
        os.fsync(file.fileno())
        if len(blob.name) == 64 and _sha256(begun) != blob.name:
            begun.unlink()
            raise OSError(0, f"{path} arrived damaged; give the same command again")
        begun.rename(blob)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _token() -> str | None:
    from huggingface_hub import get_token

    token = get_token()
    return str(token) if token else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(json.loads(sys.argv[1]))))
