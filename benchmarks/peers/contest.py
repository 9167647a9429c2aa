"""The near end of a comparison: peers on one piece of work, each in a process of its own that waits for its turns."""

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from flux_quant.benchmarks.bench.record import OURS, Row, Scalar
from flux_quant.benchmarks.bench.runner import LACK
from flux_quant.benchmarks.bench.suite import Case
from flux_quant.benchmarks.peers.catalogue import PEERS, Peer
from flux_quant.benchmarks.peers.environments import installed, interpreter
from flux_quant.errors import UserError

HERE = Path(__file__).parent
RERUN = "flux-quant bench peers"
RATIOS = {  # by the clock; of the processor, if others use it; of the device by itself
    "seconds": "times_ours",
    "cpu_seconds": "cpu_times_ours",
    "device_seconds": "device_times_ours",
}
COMPLAINTS = ("wrong shape", "not in model file", "GGML_ASSERT")
LONGEST = {"cpu": 600.0, "cuda": 50.0}  # seconds that a worker may take for an answer; a GPU is not held for longer
TOGETHER = 2.0  # seconds of a first turn where everybody has prepared before
OFFLINE = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # nobody asks the network; many compile at once


class Worker:
    """A process of `worker.py` in `python`. RuntimeError with what it said when it cannot do its task."""

    def __init__(self, python: str, peer: Peer, threads: int, log: Path, longest: float = LONGEST["cpu"]) -> None:
        command = [python, "-I", str(HERE / "worker.py"), str(HERE / "runners" / f"{peer.runner}.py"), str(threads)]
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = {**os.environ, **OFFLINE, **dict.fromkeys(names, str(threads))}
        self.peer, self.log, self.longest = peer, log, longest
        self.started: dict = {}
        self.lost = False  # it has said why, or nothing more
        with log.open("w") as errors:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            self.process = subprocess.Popen(command, env=environment, **pipes)

    def begin(self, task: dict) -> None:
        """It prepares its task from now on; `ready` waits for that."""
        self.tell(json.dumps({**task, "distribution": self.peer.distribution}))

    def ready(self) -> None:
        self.started = self.hear()

    def say(self, line: str) -> dict:
        """One line there, one line back."""
        self.tell(line)
        return self.hear()

    def tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it has ended, and `hear` says so
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def hear(self) -> dict:
        late = threading.Event()
        timer = threading.Timer(self.longest, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            heard = self.process.stdout.readline()
        finally:
            timer.cancel()
        if heard:
            answer = json.loads(heard)
        else:
            code = self.process.wait()
            answer = {"error": f"took longer than {self.longest:.0f} s" if late.is_set() else f"ended with code {code}"}
        if "error" in answer:
            self.lost = True
            raise RuntimeError("; its log: ".join(filter(None, (answer["error"], self.complaint()))))
        return answer

    def complaint(self) -> str:
        """The line of its log that tells what it did not like; empty if none does."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line.strip()[:200] for line in lines if any(word in line for word in COMPLAINTS)), "")

    def end(self) -> None:
        """It comes to its end from now on; `close` waits for that."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        self.end()
        try:
            self.process.wait(1 if self.lost else 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Crew:
    """Processes that contests share, one for each way of doing the work: they begin, and load what they need, once.

    They end with the last of the contests, whether it was held or not.
    """

    def __init__(self) -> None:
        self.contests: set[Contest] = set()
        self.workers: dict[tuple[str, str], Worker] = {}
        self.folder: tempfile.TemporaryDirectory | None = None

    def worker(self, entry: "Entry", python: str, longest: float) -> Worker:
        """A process that lives; another one where the last was lost."""
        key = (entry.peer, json.dumps(entry.task, sort_keys=True))
        if key in self.workers and self.workers[key].lost:
            self.workers.pop(key).close()
        if key not in self.workers:
            self.folder = self.folder or tempfile.TemporaryDirectory(prefix="flux-quant-logs-")
            log = Path(self.folder.name) / f"{len(os.listdir(self.folder.name))}.log"
            self.workers[key] = Worker(python, PEERS[entry.peer], torch.get_num_threads(), log, longest)
        return self.workers[key]

    def leave(self, contest: "Contest") -> None:
        self.contests.discard(contest)
        if self.contests:
            return
        for worker in self.workers.values():
            worker.end()
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


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
    refusal: Exception | None = None
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
    needs:    seconds of a first turn. Of a `crew`, the first of all: there everybody prepares at once, then they turn
    crew:     of other contests too, for devices where memory is counted by the device; else each has its own processes
    """

    def __init__(
        self,
        what: dict[str, Scalar],
        entries: list[Entry],
        material: Callable[[Path], dict],
        judge: Callable[[dict, Entry, Path], dict[str, Scalar]],
        needs: float,
        crew: Crew | None = None,
    ) -> None:
        self.what, self.entries, self.material, self.judge, self.needs = what, entries, material, judge, needs
        self.together, self.crew = crew is not None, crew or Crew()
        self.crew.contests.add(self)
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
                needs=TOGETHER if self.together and entry is not entries[0] else self.needs,
                group=group,
                close=self.close,
            )
            for entry in entries
        ]

    def turn(self, entry: Entry) -> Row:
        """One sample of one entry; its first turn begins with a warm-up and ends with a look at what it made."""
        self.start(entry)
        first = not entry.samples
        if first and not self.together:
            entry.worker.say("once")
        sample = entry.worker.say("once")
        for kind, seconds in sample.items():
            entry.samples.setdefault(kind, []).append(seconds)
        if first:
            entry.found = entry.worker.say("found")
            entry.found |= self.judge(self.shared, entry, Path(self.out(entry)))
        values = {name: value for name, value in entry.found.items() if name != "memory"}
        ours = next((other for other in self.entries if other.name == entry.against and other.samples), None)
        for kind, ratio in RATIOS.items() if ours is not None else ():
            if entry.samples.get(kind) and ours.samples.get(kind):
                values[ratio] = median(entry.samples[kind]) / median(ours.samples[kind])
        if not self.together:
            values["begun_bytes"] = entry.worker.started["begun"]
        samples = {kind: [seconds] for kind, seconds in sample.items()}
        memory = dict(entry.found["memory"])
        return Row(samples=samples, values=values, memory=memory, note=entry.note, rerun=RERUN)

    def start(self, entry: Entry) -> None:
        """Those who work together begin together, so that nobody prepares while another is measured."""
        if self.together and not self.shared and entry is not self.entries[0]:
            raise RuntimeError(f"{LACK} to begin")
        beginners = self.entries if self.together and not self.shared else [entry]
        for one in beginners:
            if one.worker is None and one.refusal is None:
                self.attempt(one, self.begin)
        for one in beginners:
            if one.worker is not None and not one.worker.started and one.refusal is None:
                self.attempt(one, lambda one: one.worker.ready())
        if entry.refusal is not None:
            raise entry.refusal

    def attempt(self, entry: Entry, work: Callable[[Entry], None]) -> None:
        try:
            work(entry)
        except (RuntimeError, UserError, OSError) as error:
            entry.refusal = error

    def begin(self, entry: Entry) -> None:
        peer = PEERS[entry.peer]
        if not peer.runner:
            raise RuntimeError(peer.refusal)
        python = interpreter(peer)  # says what is missing before anything is made
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="flux-quant-peers-")
            self.shared = self.material(Path(self.folder.name))
        device = torch.device(self.shared.get("device", "cpu")).type
        entry.worker = self.crew.worker(entry, python, LONGEST.get(device, LONGEST["cpu"]))
        entry.worker.started = {}
        entry.worker.begin({**self.shared, **entry.task, "out": self.out(entry)})

    def out(self, entry: Entry) -> str:
        return str(Path(self.folder.name) / f"{self.entries.index(entry)}.out")

    def close(self) -> None:
        self.crew.leave(self)
        for entry in self.entries:
            entry.worker, entry.refusal, entry.samples, entry.found = None, None, {}, {}
        self.shared = {}
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


def subject_of(peer: Peer) -> str:
    """Ours, or the peer with its version where it is installed."""
    if peer.name == OURS:
        return OURS
    return f"{peer.name} {installed(peer) or ''}".strip()
