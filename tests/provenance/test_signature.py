"""Signatures with real keys: whatever is changed, be it one bit, they do not hold."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemerge.errors import EdgemergeError, FormatError, OutputError, VerificationError
from edgemerge.provenance.keys import create_keys, key_id, read_private_key, read_public_key
from edgemerge.provenance.signature import CHUNK, check_signature, sign_model, signature_path
from tests.support.bits import flip_bit

CONTENT = b"GGUF" + bytes(range(200))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of keys, private and public."""
    return create_keys(tmp_path_factory.mktemp("keys") / "ward")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Path:
    """A signed file."""
    path = tmp_path_factory.mktemp("signed") / "model.gguf"
    path.write_bytes(CONTENT)
    sign_model(path, read_private_key(keys[0]))
    return path


def copy(path: Path, folder: Path) -> Path:
    """Copy a model and its signature."""
    shutil.copy(signature_path(path), folder)
    return Path(shutil.copy(path, folder))


# -- what holds


def test_a_signed_file_is_accepted(signed: Path, keys: tuple[Path, Path]) -> None:
    public = read_public_key(keys[1])
    found = check_signature(signed, public)
    assert (found.path, found.key) == (signed.with_name("model.gguf.sig"), key_id(public))
    found.check_unchanged()
    assert signed.read_bytes() == CONTENT


def test_a_large_file_in_pieces(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * CHUNK + 5))
    sign_model(path, read_private_key(keys[0]))
    done: list[tuple[int, int]] = []
    check_signature(path, read_public_key(keys[1]), progress=lambda *at: done.append(at))
    assert [n for n, _ in done] == [CHUNK, 2 * CHUNK, 2 * CHUNK + 5]


def test_openssl_agrees(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """What is signed is all lines but the last, and nothing of ours is needed to check it."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    *message, last = signature_path(signed).read_text().splitlines(keepends=True)
    (tmp_path / "message").write_text("".join(message))
    (tmp_path / "signature").write_bytes(bytes.fromhex(last.split()[1]))
    command: list[str | Path] = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        keys[1],
        "-rawin",
    ]
    command += ["-in", tmp_path / "message", "-sigfile", tmp_path / "signature"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Signature Verified Successfully" in done.stdout, done.stderr


def test_all_files_of_a_split_in_their_order(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i, part in enumerate(parts):
        part.write_bytes(bytes([i]) * 9)
    private, public = read_private_key(keys[0]), read_public_key(keys[1])
    assert sign_model(parts[1], private) == tmp_path / "m-00001-of-00003.gguf.sig"
    assert [file.path for file in check_signature(parts[2], public).files] == parts
    first, second = parts[0].read_bytes(), parts[1].read_bytes()
    parts[0].write_bytes(second)
    parts[1].write_bytes(first)
    with pytest.raises(VerificationError, match=r"m-00001-of-00003.*is not what was signed"):
        check_signature(parts[0], public)
    parts[1].unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00003.*cannot be read"):
        check_signature(parts[0], public)


def test_a_signature_of_fewer_files_does_not_do_for_a_split(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    (tmp_path / "one.gguf").write_bytes(b"1")
    sign_model(tmp_path / "one.gguf", read_private_key(keys[0]))
    for i in (1, 2):
        (tmp_path / f"m-0000{i}-of-00002.gguf").write_bytes(b"1")
    (tmp_path / "one.gguf.sig").rename(tmp_path / "m-00001-of-00002.gguf.sig")
    with pytest.raises(VerificationError, match="is not what was signed"):
        check_signature(tmp_path / "m-00001-of-00002.gguf", read_public_key(keys[1]))


# -- what does not


@given(st.data())
def test_any_flipped_bit_is_refused(
    signed: Path,
    keys: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    """Of the file, of its signature, or of the key."""
    folder = tmp_path_factory.mktemp("flipped")
    model, public = copy(signed, folder), Path(shutil.copy(keys[1], folder))
    victim = data.draw(st.sampled_from([model, signature_path(model), public]))
    flip_bit(victim, data.draw(st.integers(0, 8 * victim.stat().st_size - 1)))
    with pytest.raises(EdgemergeError) as caught:
        check_signature(model, read_public_key(public))
    message = str(caught.value)
    assert message.startswith(f"{victim}: ") or "is a signature by the key" in message
    assert message.isprintable()
    shutil.rmtree(folder)


def test_any_flipped_bit_of_the_keys_own_bytes(signed: Path, keys: tuple[Path, Path]) -> None:
    """Written as a file should be: then it is another key, or none."""
    head, body, tail = keys[1].read_text().splitlines()
    raw = base64.b64decode(body)
    for i_bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[i_bit // 8] ^= 1 << i_bit % 8
        path = keys[1].with_name("flipped.pem")
        path.write_text(f"{head}\n{base64.b64encode(flipped).decode()}\n{tail}\n")
        with pytest.raises(EdgemergeError):
            check_signature(signed, read_public_key(path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: None, "has no signature: there is no model.gguf.sig beside it"),
        (lambda text: "", "is damaged, or no signature"),
        (lambda text: text + "\n", "is damaged, or no signature"),
        (lambda text: text.upper(), "is damaged, or no signature"),
        (lambda text: text.replace("\n", "\r\n"), "is damaged, or no signature"),
        (lambda text: "\xff" + text, "is damaged, or no signature"),
        (lambda text: text.replace(" 204\n", " 0204\n"), "is damaged, or no signature"),
        (lambda text: text.replace(" 204\n", " 205\n"), "is forged or damaged"),
        (lambda text: text[:-129] + 128 * "0" + "\n", "is forged or damaged"),
    ],
)
def test_signatures_that_are_none(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, change: object, sentence: str
) -> None:
    model = copy(signed, tmp_path)
    path = signature_path(model)
    text = change(path.read_text())  # type: ignore[operator]
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    with pytest.raises(VerificationError, match=sentence):
        check_signature(model, read_public_key(keys[1]))


def test_another_key(signed: Path, tmp_path: Path) -> None:
    _, other = create_keys(tmp_path / "other")
    with pytest.raises(VerificationError, match=r"is a signature by the key \w{32}, not by \w{32}"):
        check_signature(signed, read_public_key(other))


def test_longer_shorter_and_empty_files(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    model = copy(signed, tmp_path)
    for content in (CONTENT + b"\0", CONTENT[:-1], b""):
        model.write_bytes(content)
        with pytest.raises(VerificationError, match="is not what was signed"):
            check_signature(model, read_public_key(keys[1]))


def test_a_file_that_is_swapped_or_written_after_the_check(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    model = copy(signed, tmp_path)
    found = check_signature(model, read_public_key(keys[1]))
    (tmp_path / "other").write_bytes(CONTENT)
    os.replace(tmp_path / "other", model)
    with pytest.raises(VerificationError, match="changed while it was loaded"):
        found.check_unchanged()
    found = check_signature(model, read_public_key(keys[1]))
    flip_bit(model, 0)
    os.utime(model, ns=(found.files[0].state[3], found.files[0].state[3]))
    with pytest.raises(VerificationError, match="changed while it was loaded"):
        found.check_unchanged()
    model.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        found.check_unchanged()


# -- keys, and where signatures are written


def test_keys_are_private_and_never_replaced(tmp_path: Path) -> None:
    private, public = create_keys(tmp_path / "ward.7")
    assert (private.name, public.name) == ("ward.7.pem", "ward.7.pub.pem")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(OutputError, match="exists already, and a key is never replaced"):
        create_keys(tmp_path / "ward.7")
    public.unlink()
    with pytest.raises(OutputError, match="exists already"):
        create_keys(tmp_path / "ward.7")
    assert not public.exists()
    private.unlink()
    public.symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already"):
        create_keys(tmp_path / "ward.7")
    assert not private.exists()
    assert before[0] != before[1]
    with pytest.raises(OutputError, match="cannot be written"):
        create_keys(tmp_path / "absent" / "ward")


def test_keys_that_are_none(keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    private, public = keys
    other = ec.generate_private_key(ec.SECP256R1())
    forms = (Encoding.PEM, PrivateFormat.PKCS8)
    locked = read_private_key(private).private_bytes(*forms, BestAvailableEncryption(b"word"))
    files = {
        "empty": b"",
        "text": b"no key",
        "locked": locked,
        "curve": other.private_bytes(*forms, NoEncryption()),
        "curve.pub": other.public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        ),
        "more.pub": public.read_bytes() + b"\n",
        "large": bytes(1 << 20),
    }
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
        (tmp_path / name).chmod(0o600)
    for name, sentence in {
        "empty": "is no private key in PEM",
        "text": "is no private key in PEM",
        "locked": "has a passphrase",
        "curve": "is no Ed25519 key",
        "curve.pub": "is a public key; sign with the private one",
        "large": "is larger than",
        "absent": "there is no such file",
    }.items():
        with pytest.raises(FormatError, match=sentence):
            read_private_key(tmp_path / name)
    for name, sentence in {
        "empty": "is no public key in PEM",
        "locked": "is a private key; give the public one",
        "curve.pub": "is no Ed25519 key",
        "more.pub": "holds more than the key",
        "absent": "there is no such file",
    }.items():
        with pytest.raises(FormatError, match=sentence):
            read_public_key(tmp_path / name)


def test_a_key_that_others_may_read_is_not_used(keys: tuple[Path, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(keys[0], tmp_path))
    path.chmod(0o640)
    with pytest.raises(FormatError, match="others than its owner may read"):
        read_private_key(path)


def test_a_signature_is_replaced_only_by_force(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    model = copy(signed, tmp_path)
    model.write_bytes(b"new")
    private = read_private_key(keys[0])
    with pytest.raises(OutputError, match="exists already"):
        sign_model(model, private)
    sign_model(model, private, force=True)
    check_signature(model, read_public_key(keys[1]))


def test_what_is_no_file_is_not_signed(keys: tuple[Path, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    private = read_private_key(keys[0])
    for name in ("pipe", "absent"):
        with pytest.raises(FormatError):
            sign_model(tmp_path / name, private)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
