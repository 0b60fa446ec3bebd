"""Folders and files that nobody else may have put there: what is made private, and which ones are an error.

Owns the rules about owners, modes and links. Knows nothing of what lies in them.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

_OTHERS_MAY_WRITE = 0o022
_OTHERS_MAY_DO_ANYTHING = 0o077
_IS_LINK = (errno.ELOOP, errno.EMLINK)  # of O_NOFOLLOW: Linux and macOS, BSD
_REMEDY = "remove it, or name a folder of your own as shard_cache"


def make_folder(path: Path, private: bool) -> bool:
    """Make a folder unless it is there.

    What is made is this user's alone (mode 0700).

    Args:
        path: of the folder.
        private: the folder and the one that holds it must be this user's alone if they are there already. Nobody else may be
            able to move them away.

    Returns:
        Whether this user alone may write in it.

    Raises:
        ValueError: it is no folder or a link to one; with `private` also where another user may write in it.
    """
    for missing in reversed([folder for folder in (path, *path.parents) if not os.path.lexists(folder)]):
        with contextlib.suppress(FileExistsError):  # another process was faster; what it made is looked at below
            missing.mkdir(mode=0o700)
    if private:
        _check_private(path.parent)
        _check_private(path)
        _check_above(path.parent)
        if path.stat().st_mode & _OTHERS_MAY_DO_ANYTHING:
            path.chmod(0o700)
    return is_ours_alone(_status(path))


def is_ours_alone(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user and nobody else may write to it.

    Args:
        status: of it.

    Returns:
        True where both hold.
    """
    return status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file that is no link, nor a pipe or device; a new one may be written by whom the umask allows.

    Args:
        path: of the file.
        flags: as of `os.open`.

    Returns:
        A descriptor.

    Raises:
        ValueError: it is something else.
        OSError: as `os.open`.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _IS_LINK:
            raise ValueError(f"{path} is a link, which is never followed here; {_REMEDY}") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is no regular file; {_REMEDY}")
    return handle


def _status(path: Path) -> os.stat_result:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(f"{path} is a link, which is never followed here; name the folder itself as shard_cache")
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is no folder; {_REMEDY}")
    return status


def _check_private(path: Path) -> None:
    status = _status(path)
    if status.st_uid != os.geteuid():
        raise ValueError(
            f"{path} belongs to user {status.st_uid}, not to this one ({os.geteuid()}), who could change what is read from it; {_REMEDY}"
        )
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise ValueError(
            f"{path} may be written by others (mode {stat.S_IMODE(status.st_mode):04o}), who could change what is read from it; remove it, "
            "or run `chmod 700` on it if you trust all that lies there"
        )


def _check_above(path: Path) -> None:
    """Whoever may rename a folder above could put another in the place of the one below. Links above are followed."""
    for above in path.resolve().parents:
        status = above.stat()
        open_to_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if open_to_all or status.st_uid not in (0, os.geteuid()):
            whose = f"belongs to user {status.st_uid}" if not open_to_all else "may be written by everybody"
            raise ValueError(
                f"{above}, which holds {path}, {whose}, who could put another folder in its place; name a folder as shard_cache"
            )
