"""Files that are whole or not there: written under a temporary name, flushed to disk, then renamed.

What a killed process leaves behind ends in .partial and is overwritten or swept by the next one. This file knows nobody
but errors.py.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import CheckpointError


def flush(path):
    """Force a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def replacing(path, writers_differ: bool = False):
    """`with replacing(path) as temporary:` the file written under the temporary name takes its place when complete.

    Its folder is made. writers_differ: several processes may write it at once, each needs a temporary name of its own.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, name a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{os.uname().nodename}-{os.getpid()}" if writers_differ else ""
    partial = path.with_name(f"{path.name}{own}.partial")
    try:
        yield str(partial)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial, path):
    """Give a file its name once its content is on disk, then put the name there too."""
    flush(partial)
    os.replace(partial, path)
    flush(Path(path).parent)


def write_whole(path, content, writers_differ: bool = False):
    """Write text, bytes, or what JSON can hold, to `path`."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content, indent=1, default=str) + "\n"
    with replacing(path, writers_differ) as temporary, open(temporary, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode(errors="replace"))


@contextmanager
def folder_written_whole(path):
    """Yield an empty directory that becomes `path` when the block ends, and vanishes when the block fails.

    Raises CheckpointError where the disk is full or the files cannot be written; `path` is then as it was.
    """
    from safetensors import SafetensorError

    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in [*partial.iterdir(), partial]:
            flush(file)
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)  # a kill may have left it
        if path.exists():
            path.rename(old)  # rename() replaces no directory that holds files
        partial.rename(path)
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as e:  # what os, torch.save and safetensors say to a full disk
        free = shutil.disk_usage(path.parent).free / 1e6  # torch does not say that it is the disk
        raise CheckpointError(f"cannot write {path}: {e} ({free:.1f} MB free)") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_held: dict[tuple, int] = {}  # {device and inode of a folder: the descriptor that this process holds it by}


def hold(folder):
    """Keeps other processes from holding a folder until this one ends. Raises CheckpointError where another holds it."""
    about = os.stat(folder)
    if (about.st_dev, about.st_ino) in _held:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        what = f"another run is writing to {folder}: wait for its end, or name another out_dir"
        raise CheckpointError(what) from None
    except OSError:  # a file system without locks
        pass
    _held[about.st_dev, about.st_ino] = descriptor


@contextmanager
def locked(folder):
    """Waits for other processes that are in such a block, where the file system has locks."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def append_lines(path, lines: list[str]):
    """Append `lines` to a file and empty the list. On an OSError the file is as before and the list still full."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "a") as f:
            f.writelines(lines)
    except OSError:
        if os.path.exists(path):
            os.truncate(path, size)
        raise
    lines.clear()


def sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
