"""Folders that are there when they are complete, and not before, on a disk or in a bucket.

On a disk the folder is written beside its place and renamed. In a bucket it is written in its place, with
the lease UNFINISHED in it until it is complete. What was left by a process that was killed is removed by
the next one that writes the same folder.
"""

import contextlib
import errno
import fcntl
import glob
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator

from mmada_jax import storage
from mmada_jax.bucket import Bucket

UNFINISHED = ".unfinished"
_LOCK = "lock"


def refuse_used(place: storage.Path) -> None:
    """Raises ValueError unless a folder is new or empty, or was left unfinished in a bucket."""
    left = isinstance(place, Bucket) and is_unfinished(place)
    if storage.has_files(place) and not left:
        raise ValueError(f"{place} is there already and not an empty folder; name another one")
    if not isinstance(place, Bucket) and place.is_mount():
        raise ValueError(f"{place} is a mount point and can't be replaced; name a folder in it")


def is_unfinished(folder: storage.Path) -> bool:
    """Whether a folder of a bucket isn't complete."""
    return isinstance(folder, Bucket) and (folder / UNFINISHED).is_file()


@contextlib.contextmanager
def written(place: storage.Path, needed: int) -> Iterator[storage.Path]:
    """A folder to write into, which becomes the folder at `place` if the block ends without an error, and
    is removed if not. Raises OSError if there isn't room for `needed` bytes, ValueError if `place` is
    used."""
    if isinstance(place, Bucket):
        with _in_bucket(place):
            yield place
        return
    made = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(place)
    free = shutil.disk_usage(place.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the disk is too full: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            str(place.parent),
        )
    unfinished, lock = _claim(place)
    try:
        folder = unfinished / "folder"
        folder.mkdir()
        yield folder
        refuse_used(place)  # nobody else may have made it by now
        folder.rename(place)
    except Exception as error:  # an error of a library may have any type
        if storage.is_full(error):
            text = f"the disk is full, nothing was written ({str(error)[:200]})"
            raise OSError(errno.ENOSPC, text, str(place)) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)
        for parent in made:
            with contextlib.suppress(OSError):  # it isn't empty
                parent.rmdir()


@contextlib.contextmanager
def _in_bucket(place: Bucket) -> Iterator[None]:
    mark = place / UNFINISHED
    with storage.locked(mark, f"another process is writing {place}") as lease:
        there = [path for path in storage.files_below(place) if path != UNFINISHED]
        if lease.is_new and there:  # another process has completed it since this one looked
            raise ValueError(f"{place} is there already and not an empty folder; name another one")
        place.rmtree(keep=(mark,))
        try:
            yield
            storage.refuse_lost(mark)
            mark.unlink()  # now it is complete; what the storage refuses here is an error
        except BaseException:
            if not lease.lost:
                storage.rmtree(place, ignore_errors=True)
            raise


def _claim(place: pathlib.Path) -> tuple[pathlib.Path, int]:
    """A new folder beside `place`, and a file in it that is locked as long as it is open.

    A lock ends with its process, however the process ends. The number of a process doesn't tell whether
    it lives: in a container the next process has the same number.
    """
    for again in itertools.count():
        suffix = f"-{again}" if again else ""
        unfinished = place.with_name(f".{place.name}.unfinished-{os.getpid()}{suffix}")
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # or cleared before it was locked
            unfinished.mkdir()
            lock = os.open(unfinished / _LOCK, os.O_RDWR | os.O_CREAT)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(unfinished / _LOCK)):
                    return unfinished, lock
            os.close(lock)


def _clear_leftovers(place: pathlib.Path) -> None:
    """Removes what processes have left that were killed while they wrote `place`: nobody holds their
    locks."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.unfinished-*"):
        with contextlib.suppress(OSError):  # its process lives, or has just cleared it away
            lock = os.open(left / _LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)
