"""Signed addresses of files in S3, made in a process of its own, as s3fs takes 65 MiB.

`Signer` starts `python -m edgemerge.remote.stores.signing`, which answers each line of JSON with one. The
client is s3fs: it finds credentials, region and endpoint where the user's other programs do. Its answer is
an address at https:// that is good for some hours. What lies there is then read as any other file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from edgemerge.errors import RecipeError, RuntimeFailure
from edgemerge.remote.address import Address, read_address
from edgemerge.remote.stores.address import EXTRA, StoreAddress

__all__ = ["Signer"]

GOOD_FOR = 12 * 3600  # seconds; a longer merge asks again
CA_BUNDLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
)  # of these botocore knows one
LOGIN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"


class Signer:
    """A process that signs addresses, until `close`.

    Parameters
    ----------
    address : StoreAddress
        Whose login, where it has one, is used for all.

    Raises
    ------
    RecipeError
        s3fs is not installed.
    RuntimeFailure
        The process could not be started.
    """

    def __init__(self, address: StoreAddress) -> None:
        if find_spec("s3fs") is None:
            raise RecipeError(f"{address} needs s3fs: {EXTRA}")
        bundle = next(filter(None, map(os.environ.get, CA_BUNDLES)), None)
        known = {} if bundle is None else {"AWS_CA_BUNDLE": bundle}
        try:
            self._process = subprocess.Popen(
                # With -P nothing in the user's folder is taken for a module.
                [sys.executable, "-P", "-m", "edgemerge.remote.stores.signing"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a library's traceback may have what is secret
                env={**known, **os.environ},
                text=True,
                start_new_session=True,  # Ctrl-C is for us, who end it
            )
        except OSError as error:
            raise RuntimeFailure(
                f"no process to sign addresses can be started ({error.strerror})"
            ) from error

    def sign(self, address: StoreAddress) -> Address:
        """Return where a file is asked for; its text is the address.

        Raises
        ------
        RecipeError
            There are no credentials, or the store's settings are wrong.
        RuntimeFailure
            The process ended without an answer.
        """
        path = f"{address.host}{address.path}" + (f"?{address.query}" if address.query else "")
        question = json.dumps({"path": path, "login": address.login})
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{question}\n")
            self._process.stdin.flush()
            answer: dict[str, str] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            raise RuntimeFailure(
                f"{address}: the process that signs addresses ended without an answer; see that s3fs "
                f"can be imported: {EXTRA}"
            ) from None
        if "refusal" in answer:
            raise RecipeError(f"{address} {answer['refusal']}")
        return replace(
            read_address(answer["url"]), shown=str(address), renew=partial(_sign_again, address)
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _sign_again(address: StoreAddress) -> Address:
    signer = Signer(address)
    try:
        return signer.sign(address)
    finally:
        signer.close()


# -- in the process --------------------------------------------------------------------------------


def _answer(question: dict[str, Any]) -> dict[str, str]:
    import fsspec
    from botocore.exceptions import BotoCoreError, NoCredentialsError

    known: dict[str, object] = {"version_aware": "versionId=" in question["path"]}
    theirs = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    known["config_kwargs"] = {
        "signature_version": "s3v4",
        **theirs,
    }  # not all regions take the older
    if question["login"] is not None:
        known["key"], known["secret"] = question["login"]
    try:
        # Not asked for: the bucket's list and the file, which the merge asks for itself.
        store = fsspec.filesystem("s3", cache_regions=True, **known)
        return {"url": store.sign(question["path"], expiration=GOOD_FOR)}
    except NoCredentialsError:
        return {"refusal": f"needs credentials: {LOGIN}, or FSSPEC_S3_ANON=1 for a public bucket"}
    except (BotoCoreError, OSError) as error:  # whose sentences have no secrets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {"refusal": f"cannot be asked for ({reason}); see to the network, or {LOGIN}"}
    except Exception as error:
        return {"refusal": f"cannot be asked for ({type(error).__name__}); {LOGIN}"}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(json.loads(line))) + "\n")
        sys.stdout.flush()
