"""The near end of a comparison: peers on one piece of work, each in a process of its own that waits for its turns."""

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from flux_quant.benchmarks.bench.record import OURS, Row, Scalar
from flux_quant.benchmarks.bench.suite import Case
from flux_quant.benchmarks.peers.catalogue import PEERS, Peer
from flux_quant.benchmarks.peers.environments import installed, interpreter

HERE = Path(__file__).parent
RERUN = "flux-quant bench peers"
RATIOS = {"seconds": "times_ours", "cpu_seconds": "cpu_times_ours"}  # by the clock; of the processor, if others use it
COMPLAINTS = ("wrong shape", "not in model file", "GGML_ASSERT")
LONGEST = 600.0  # seconds that a worker may take for an answer


class Worker:
    """A process of `worker.py` in `python`. RuntimeError with what it said when it cannot do its task."""

    def __init__(self, python: str, peer: Peer, task: dict, threads: int, log: Path) -> None:
        command = [python, "-I", str(HERE / "worker.py"), str(HERE / "runners" / f"{peer.runner}.py"), str(threads)]
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(threads))}
        self.log = log
        with log.open("w") as errors:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            self.process = subprocess.Popen(command, env=environment, **pipes)
        try:
            self.started = self.say(json.dumps({**task, "distribution": peer.distribution}))
        except BaseException:
            self.close()
            raise

    def say(self, line: str) -> dict:
        """One line there, one line back."""
        timer = threading.Timer(LONGEST, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            heard = self.process.stdout.readline()
        except BrokenPipeError:
            heard = ""
        finally:
            timer.cancel()
        answer = json.loads(heard) if heard else {"error": f"ended with code {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError("; its log: ".join(filter(None, (answer["error"], self.complaint()))))
        return answer

    def complaint(self) -> str:
        """The line of its log that tells what it did not like; empty if none does."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line.strip()[:200] for line in lines if any(word in line for word in COMPLAINTS)), "")

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@dataclass
class Entry:
    """A peer in a contest. `task` is what its runner gets on top of the contest's own; `against` the entry of ours that
    its seconds are compared with; `note` is told with its row."""

    peer: str
    what: dict[str, Scalar]
    task: dict = field(default_factory=dict)
    against: str = ""
    note: str = ""
    worker: Worker | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    found: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Ours has one entry of a format or type in a contest."""
        return f"{self.peer} {self.what.get('format', self.what.get('type', ''))}"


class Contest:
    """Cases of one group: the same work for all, material made at the first call, processes ended by `close`.

    material: makes the files in a folder and gives what tasks share, among it `kind`
    judge:    of an entry's `out`, against the material
    """

    def __init__(
        self,
        what: dict[str, Scalar],
        entries: list[Entry],
        material: Callable[[Path], dict],
        judge: Callable[[dict, Entry, Path], dict[str, Scalar]],
        needs: float,
    ) -> None:
        self.what, self.entries, self.material, self.judge, self.needs = what, entries, material, judge, needs
        self.folder: tempfile.TemporaryDirectory | None = None
        self.shared: dict = {}

    def cases(self) -> list[Case]:
        """Ours are left out where nobody is there to be compared with."""
        group = " ".join(map(str, (*self.what.values(), self.entries[0].name)))
        others = any(installed(PEERS[entry.peer]) for entry in self.entries if entry.peer != OURS)
        entries = [entry for entry in self.entries if others or entry.peer != OURS]
        return [
            Case(
                what={**self.what, **entry.what},
                work=lambda entry=entry: self.turn(entry),
                subject=subject_of(PEERS[entry.peer]),
                needs=self.needs,
                group=group,
                close=self.close,
            )
            for entry in entries
        ]

    def turn(self, entry: Entry) -> Row:
        """One sample of one entry; its first turn begins with a warm-up and ends with a look at what it made."""
        first = entry.worker is None
        if first:
            self.start(entry)
            entry.worker.say("once")
        sample = entry.worker.say("once")
        for kind, seconds in sample.items():
            entry.samples.setdefault(kind, []).append(seconds)
        if first:
            entry.found = entry.worker.say("found")
            entry.found |= self.judge(self.shared, entry, Path(self.out(entry)))
        values = {name: value for name, value in entry.found.items() if name != "peak"}
        ours = next((other for other in self.entries if other.name == entry.against and other.samples), None)
        for kind, ratio in RATIOS.items() if ours is not None else ():
            if entry.samples.get(kind) and ours.samples.get(kind):
                values[ratio] = median(entry.samples[kind]) / median(ours.samples[kind])
        values["begun_bytes"] = entry.worker.started["begun"]
        memory = {"host_rss": entry.found["peak"]}
        samples = {kind: [seconds] for kind, seconds in sample.items()}
        return Row(samples=samples, values=values, memory=memory, note=entry.note, rerun=RERUN)

    def start(self, entry: Entry) -> None:
        peer = PEERS[entry.peer]
        if not peer.runner:
            raise RuntimeError(peer.refusal)
        python = interpreter(peer)  # says what is missing before anything is made
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="flux-quant-peers-")
            self.shared = self.material(Path(self.folder.name))
        task = {**self.shared, **entry.task, "out": self.out(entry)}
        log = Path(self.folder.name) / f"{self.entries.index(entry)}.log"
        entry.worker = Worker(python, peer, task, torch.get_num_threads(), log)

    def out(self, entry: Entry) -> str:
        return str(Path(self.folder.name) / f"{self.entries.index(entry)}.out")

    def close(self) -> None:
        for entry in self.entries:
            if entry.worker is not None:
                entry.worker.close()
                entry.worker, entry.samples, entry.found = None, {}, {}
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


def subject_of(peer: Peer) -> str:
    """Ours, or the peer with its version where it is installed."""
    if peer.name == OURS:
        return OURS
    return f"{peer.name} {installed(peer) or ''}".strip()
