"""A file that appears complete or not at all.

It is written beside the target under another name (`.NAME.part`), brought to the disk, and renamed over the target.
Whatever ends the work early (an error, a full disk, Ctrl-C, a killed process), the target keeps its content. The
temporary file goes too, unless the work is to be resumed: then a journal beside it says which tensors are on the disk.
A killed process leaves its temporary file behind; the next one that writes the same target takes its place.
"""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from flux_quant.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be replaced anyway
    fcntl = None


FINGERPRINT = ".fingerprint"  # in a folder that is not complete: which work it belongs to
MODEL_FOLDER_MARKS = ("config.json", "model_index.json")


def check_target(path: Path, force: bool) -> None:
    """Everything about the target that can be known before the work begins, except the space."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not an ordinary file")
    if path.exists() and not force:
        raise UserError(f"{path} exists; use --force to replace it")
    check_folder(path)


def check_folder_target(path: Path, force: bool) -> None:
    """The same for a folder of model files. `force` replaces a folder only if it is one."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    if path.exists() and any(path.iterdir()):
        if not force:
            raise UserError(f"{path} exists and is not empty; use --force to replace it")
        if not any((path / name).is_file() for name in MODEL_FOLDER_MARKS):
            raise UserError(f"{path} is no model folder (no {' or '.join(MODEL_FOLDER_MARKS)}); it is not replaced")
    check_folder(path)


def check_folder(path: Path) -> None:
    """UserError if nothing can be created beside `path`."""
    folder = target_folder(path)
    if not folder.is_dir():
        raise UserError(f"the directory {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write into the directory {folder}")


def check_space(path: Path, nbytes: int, present: int = 0) -> None:
    """`nbytes` are needed in the folder of `path`, `present` of them are taken already."""
    free = shutil.disk_usage(target_folder(path)).free + present
    if free < nbytes:
        raise UserError(f"no space for {path}: it takes {nbytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free")


def target_folder(path: Path) -> Path:
    """Where the bytes will lie: a link is followed, so that it stays a link."""
    return path.resolve().parent


class OutputFile:
    """Context manager around a file of known size. Leaving it without an exception publishes the file.

    With a `fingerprint` of the work, what an earlier process finished of the very same work is kept: `finished` holds
    what it noted, and this process keeps its own part if it is interrupted.
    """

    def __init__(self, path: Path, nbytes: int, force: bool = False, fingerprint: str = "") -> None:
        check_target(path, force)
        self.path, self.nbytes, self.fingerprint = path, nbytes, fingerprint
        self.target = path.resolve()
        self.temporary = self.target.with_name(f".{self.target.name}.part")
        self.journal = self.target.with_name(f".{self.target.name}.journal")
        self.finished: dict[str, object] = {}
        self.present = disk_bytes(self.temporary)  # already taken, by an earlier process
        check_space(path, nbytes, self.present)

    def __enter__(self) -> "OutputFile":
        try:
            self.file = self.locked()
            self.finished = self.read_journal()
            if not self.finished:
                self.file.truncate(0)
                self.file.truncate(self.nbytes)
                self.journal.unlink(missing_ok=True)
                self.note(self.fingerprint)
        except OSError as error:
            self.discard()
            raise self.failure(error) from error
        except BaseException:
            self.discard()
            raise
        return self

    def locked(self):
        """The temporary file, opened; nobody else may have it."""
        while True:
            file = os.fdopen(os.open(self.temporary, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(f"another process is writing {self.path}") from None
            if self.temporary.exists() and os.path.samestat(os.fstat(file.fileno()), self.temporary.stat()):
                return file
            file.close()  # published or discarded by another process between opening and locking

    def read_journal(self) -> dict[str, object]:
        """What is finished; empty if the journal is of other work, or of a file that is not there."""
        if not self.fingerprint or os.fstat(self.file.fileno()).st_size != self.nbytes or not self.journal.exists():
            return {}
        finished = {}
        first, *lines = self.journal.read_text(encoding="utf-8").split("\n")
        try:
            if json.loads(first) != self.fingerprint:
                return {}
            for line in lines[:-1]:  # what follows the last line end was cut off by the interruption
                finished |= json.loads(line)
        except ValueError:
            return {}
        return finished

    def write(self, offset: int, data: bytes | memoryview) -> None:
        try:
            self.file.seek(offset)
            self.file.write(data)
        except OSError as error:
            raise self.failure(error) from error

    def finish(self, notes: dict[str, object]) -> None:
        """What was written so far is on the disk, and stays if the work is interrupted and resumed."""
        self.flush()
        self.note(notes)

    def note(self, entry: object) -> None:
        if self.fingerprint:
            with self.journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(entry) + "\n")

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
                self.publish()
        finally:
            self.discard(keep=kind is not None and not isinstance(error, UserError))

    def publish(self) -> None:
        self.flush()
        self.file.close()  # some systems do not rename an open file
        os.replace(self.temporary, self.target)
        self.journal.unlink(missing_ok=True)

    def discard(self, keep: bool = False) -> None:
        """Close, and let nothing stay; with `keep`, everything stays if the work can be resumed."""
        if not hasattr(self, "file") or self.file.closed:
            return
        remove = () if keep and self.fingerprint else (self.temporary, self.journal)
        try:
            for path in remove:  # while the lock is held: nobody else's file can have these names
                path.unlink(missing_ok=True)
            remove = ()
        except PermissionError:
            pass  # some systems do not remove an open file
        self.file.raw.close()  # without writing what is still buffered: the disk may be full
        for path in remove:
            path.unlink(missing_ok=True)

    def failure(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path} ({self.nbytes / 1e9:.3f} GB): {error.strerror}")


class OutputFolder:
    """Context manager around a folder that appears complete or not at all: `staging` becomes `path` at the end.

    With a fingerprint, an interruption keeps `staging`, and the next run finds in it what is finished.
    """

    def __init__(self, path: Path, force: bool, fingerprint: str = "") -> None:
        check_folder_target(path, force)
        self.target, self.fingerprint = path.resolve(), fingerprint
        self.staging = staging_folder(path)

    def __enter__(self) -> "OutputFolder":
        mark = self.staging / FINGERPRINT
        if not self.fingerprint or not mark.exists() or mark.read_text(encoding="utf-8") != self.fingerprint:
            shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(exist_ok=True)
        if self.fingerprint:
            mark.write_text(self.fingerprint, encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            if not self.fingerprint or isinstance(error, UserError):
                shutil.rmtree(self.staging, ignore_errors=True)
            return
        (self.staging / FINGERPRINT).unlink(missing_ok=True)
        old = self.target.with_name(f".{self.target.name}.old")
        if self.target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.target, old)
        os.replace(self.staging, self.target)
        shutil.rmtree(old, ignore_errors=True)


def staging_folder(path: Path) -> Path:
    """Where the files of a folder are written before it appears."""
    target = path.resolve()
    return target.with_name(f".{target.name}.part")


def disk_bytes(path: Path) -> int:
    """What a file takes on the disk; 0 if there is none."""
    try:
        return getattr(path.stat(), "st_blocks", 0) * 512
    except FileNotFoundError:
        return 0
