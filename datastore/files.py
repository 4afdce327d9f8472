"""Files: written whole or not at all, checked by their sha256, read through a memory map; and typed JSON.

The header of a safetensors file is written here and not by safetensors, whose order of metadata changes
from run to run: the same input gives the same bytes. Reading goes through safetensors, which refuses
hostile headers.

What the files of a datastore hold is left to `shards` and `manifest`.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from datastore.errors import DamagedStoreError, DiskFullError, StoreError, StoreLockedError

__all__ = [
    "FileEntry",
    "canonical_json",
    "check_free_space",
    "damaged",
    "disk_errors",
    "from_json",
    "hash_file",
    "lock_folder",
    "make_folder",
    "open_tensors",
    "read_through",
    "remove_temporary_files",
    "sync_folder",
    "write_atomic",
    "write_tensors",
]

MAX_HEADER_BYTES = 100_000_000  # safetensors refuses to read a longer one
_CODES = {"<i8": "I64", "<u8": "U64", "<i4": "I32", "<f4": "F32", "<f2": "F16", "|u1": "U8", "|i1": "I8"}
_DTYPES = {code: np.dtype(name) for name, code in _CODES.items()}


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What the manifest knows of a file."""

    sha256: str
    "Of all its bytes, in hexadecimal."
    num_bytes: int
    "Its size."


def damaged(problems: Mapping[Path, str]) -> DamagedStoreError:
    """The error for files, each with what is wrong with it, that the build can make anew."""
    return DamagedStoreError(
        "; ".join(f"{path} is damaged: {what}" for path, what in problems.items())
        + f". Delete {'this file' if len(problems) == 1 else 'these files'} and rerun the same "
        "`gradsift build-datastore` command: it computes only what is missing."
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` in writing `path` into `DiskFullError` or `StoreError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"the disk is full: cannot write {path} ({error.strerror}). Nothing finished is lost: "
                "free some space and rerun the same command."
            ) from error
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}. Choose another place to write to."
        ) from error


def check_free_space(path: str | os.PathLike[str], num_bytes: int) -> None:
    """Raise `DiskFullError` unless the disk that holds (or would hold) `path` has `num_bytes` free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DiskFullError(
            f"not enough room for {path}: {num_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free. "
            "Free some space, choose another --datastore folder, or lower --proj-dim."
        )


def canonical_json(value: object) -> str:
    """The one JSON text of a value: keys sorted, no spaces, ASCII. What is hashed and compared."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(kind: Any, value: Any) -> Any:
    """A value parsed from JSON as the dataclass or type `kind`; `ValueError` unless it is exactly that.

    A field with a default may be absent.
    """
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind) and type(value) is dict:
        kinds = {item.name: item.type for item in fields(kind)}
        needed = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
        if not needed <= value.keys() <= kinds.keys():
            raise ValueError(f"expected the fields {sorted(kinds)}, found {sorted(value)}")
        return kind(**{name: from_json(kinds[name], value[name]) for name in value})
    if origin is list and type(value) is list:
        if set(map(type, value)) <= {args[0]}:  # at once: a store has a label for each row
            return value
        return [from_json(args[0], item) for item in value]
    if origin is dict and type(value) is dict:
        return {name: from_json(args[1], item) for name, item in value.items()}
    if kind is Any or type(value) in (args if origin is UnionType else (kind,)):
        return value
    raise ValueError(f"expected {getattr(kind, '__name__', kind)}, found {str(value)[:100]!r}")


def write_atomic(path: Path, parts: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a file so that its name stands for all of its bytes or does not exist, whatever happens.

    Raises `DiskFullError`, after which the store can be resumed, or `StoreError`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with disk_errors(path):
            make_folder(path.parent)
            temporary.unlink(missing_ok=True)
            with open(temporary, "xb") as file:  # never what a link that lies there leads to
                for part in parts:
                    file.write(part)
                    digest.update(part)
                    num_bytes += len(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return FileEntry(sha256=digest.hexdigest(), num_bytes=num_bytes)


def remove_temporary_files(folder: Path) -> None:
    """Remove what a killed writer left half written; only for the holder of the store's lock."""
    for pattern in (".*.json.tmp", "shards/*/*/.*.safetensors.tmp", "directions/*/.*.safetensors.tmp"):
        for left_over in folder.glob(pattern):
            left_over.unlink()


def lock_folder(folder: Path) -> int:
    """A locked file descriptor of `folder`; closing it frees the lock, and so does the end of the process.

    Raises `StoreLockedError` if another process holds it, `StoreError` for a link in its place.
    """
    file = folder / ".lock"
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        if not file.is_symlink():
            raise
        raise StoreError(
            f"{file} is a link; expected a file, which is written to. Delete the link and rerun the same command"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BlockingIOError:
        holder = os.read(lock, 1000).decode(errors="replace") or "another process"
        os.close(lock)
        raise StoreLockedError(
            f"{folder} is being written by {holder}. Wait for it, or stop it: the lock goes with the process."
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they outlast a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make what was renamed into a folder, or removed from it, outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _map(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return np.memmap(path, np.uint8, "c")  # private, so that torch takes it; the file cannot be altered
    except FileNotFoundError:
        raise damaged({path: "it is missing"}) from None
    except (OSError, ValueError) as error:
        raise damaged({path: str(error)}) from None


def hash_file(path: Path) -> FileEntry:
    """Checksum and size of a file; `DamagedStoreError` if it cannot be read."""
    data = _map(path)
    return FileEntry(sha256=hashlib.sha256(data.data).hexdigest(), num_bytes=len(data))


def read_through(path: Path) -> None:
    """Have the system read a file from the disk, in sequence: through a map it would come a little at a time."""
    buffer = bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def write_tensors(path: Path, metadata: object, tensors: Mapping[str, npt.NDArray[Any]]) -> FileEntry:
    """Write one safetensors file, in the order given, with `metadata` as JSON under the key `gradsift`."""
    header: dict[str, object] = {"__metadata__": {"gradsift": canonical_json(metadata)}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _CODES[tensor.dtype.str], "shape": tensor.shape, "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: a header of {len(encoded)} bytes; safetensors reads {MAX_HEADER_BYTES}")
    data = (np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data for tensor in tensors.values())
    return write_atomic(path, [len(encoded).to_bytes(8, "little"), encoded, *data])


def open_tensors(path: Path, sha256: str | None = None) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """The metadata and the tensors, as views of one memory map, of a file that `write_tensors` wrote.

    With `sha256`, the very bytes handed out are checked against it first. Raises `DamagedStoreError`.
    """
    data = _map(path)
    if sha256 is not None and hashlib.sha256(data.data).hexdigest() != sha256:
        raise damaged({path: "its checksum is not the one in manifest.json"})
    try:
        with safe_open(path, framework="np"):  # refuses what its format forbids: overlaps, gaps, false sizes
            pass
        first = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:first]))
        metadata = json.loads(header.pop("__metadata__")["gradsift"])
        tensors = {}
        for name, spec in header.items():
            start, stop = (first + offset for offset in spec["data_offsets"])
            tensors[name] = data[start:stop].view(_DTYPES[spec["dtype"]]).reshape(spec["shape"])
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged({path: f"not a readable safetensors file ({error})"}) from None
    except KeyError as error:
        raise damaged({path: f"its header has no or an unknown {error}"}) from None
    return metadata, tensors
