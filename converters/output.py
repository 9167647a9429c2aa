"""A file that appears complete or not at all.

It is written beside the target under another name, brought to the disk, and renamed over the target. Whatever ends the
work early (an error, a full disk, Ctrl-C), the target keeps its content and the temporary file goes.
"""

import os
import shutil
from pathlib import Path
from types import TracebackType

from flux_quant.errors import UserError


def check_target(path: Path, force: bool) -> None:
    """Everything about the target that can be known before the work begins, except the space."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not an ordinary file")
    if path.exists() and not force:
        raise UserError(f"{path} exists; use --force to replace it")
    folder = target_folder(path)
    if not folder.is_dir():
        raise UserError(f"the directory {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write into the directory {folder}")


def check_space(path: Path, nbytes: int) -> None:
    free = shutil.disk_usage(target_folder(path)).free
    if free < nbytes:
        raise UserError(f"no space for {path}: it takes {nbytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free")


def target_folder(path: Path) -> Path:
    """Where the bytes will lie: a link is followed, so that it stays a link."""
    return path.resolve().parent


class OutputFile:
    """Context manager around a file of known size. Leaving it without an exception publishes the file."""

    def __init__(self, path: Path, nbytes: int, force: bool = False) -> None:
        check_target(path, force)
        check_space(path, nbytes)
        self.path, self.nbytes = path, nbytes
        self.target = path.resolve()
        self.temporary = self.target.with_name(f".{self.target.name}.{os.getpid()}.part")

    def __enter__(self) -> "OutputFile":
        try:
            self.file = self.temporary.open("xb")
            self.file.truncate(self.nbytes)
        except OSError as error:
            self.discard()
            raise self.failure(error) from error
        except BaseException:
            self.discard()
            raise
        return self

    def write(self, offset: int, data: bytes | memoryview) -> None:
        try:
            self.file.seek(offset)
            self.file.write(data)
        except OSError as error:
            raise self.failure(error) from error

    def flush(self) -> None:
        """After it another reader of `temporary` sees everything, and the disk has it."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self.failure(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.flush()
                self.file.close()
                os.replace(self.temporary, self.target)
        finally:
            self.discard()

    def discard(self) -> None:
        if hasattr(self, "file"):
            self.file.raw.close()  # without writing what is still buffered: the disk may be full
        self.temporary.unlink(missing_ok=True)

    def failure(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path} ({self.nbytes / 1e9:.3f} GB): {error.strerror}")
