"""Write a file as a whole: it appears when it is complete, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a file beside `path`, in its folder, which is created; afterwards it replaces `path`.

    Its mode is what the umask says, whatever writes it: safetensors would make it 0600. After an
    error the partial file is removed, and `path` is as it was. Raises OSError where no file can be
    written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_place(path: Path) -> None:
    """Check that a file can be written, before anything is computed for it.

    Creates its folder. Raises OSError, and ValueError for a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
