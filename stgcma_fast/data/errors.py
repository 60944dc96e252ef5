"""What goes wrong with a media file, said so that it can be mended."""

from __future__ import annotations

import os


class MediaError(Exception):
    """A file that can not be read as what it should be.

    Args:
        path: the file.
        cause: what is wrong with it, in words.
    """

    def __init__(self, path: str | os.PathLike[str], cause: str) -> None:
        # Both are the exception's arguments, so that it survives the way out of a worker process.
        super().__init__(os.fspath(path), cause)
        self.path, self.cause = self.args

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}"
