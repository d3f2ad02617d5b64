"""Power cuts below the file system: a pool on ext4 or XFS, on a device whose writes and flushes are
logged, replayed to any point of that log, opened and verified.

  varved -> ext4, XFS -> loop device -> FUSE -> qemu-storage-daemon: blklogwrites -> file and log

The load notes how long the log is whenever something is promised, so that for each point it is
known what must be there and what may be. At a point everything before the last flush is there; what
came later is there in order, in part, or torn between sectors.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import time

from load import Load, outcomes
from pool_model import Blocks, World, Wrong
from torturing import write_log
from torturing.common import run, unmount

KINDS = ("ext4", "xfs")
HOW = ("in order", "dropped", "torn")
MIB = 1 << 20
IMAGE_BYTES = 512 * MIB
LIVES, STEPS = 3, 14
POINTS = 40  # of one log


def run_scenario(bench):
    backing = os.path.join(bench.work, "backing")
    os.mkdir(backing)
    run("mount", "-t", "tmpfs", "-o", "size=2G", "varve-powercut", backing)
    bench.undo.append(lambda: unmount(backing))
    for kind in bench.parts(KINDS):
        place = os.path.join(bench.work, f"on-{kind}")
        os.mkdir(place)
        recording = None
        while bench.more():
            if recording is None or recording.points == POINTS:
                recording = Recording(bench, kind, backing, place)
            recording.replay()


class Recording:
    """Some lives of a pool, and the log of its device."""

    def __init__(self, bench, kind, backing, place):
        self.bench, self.kind, self.place = bench, kind, place
        self.image = os.path.join(backing, f"{kind}.image")  # the device
        self.start = os.path.join(backing, f"{kind}.start")  # as it was when the log began
        self.log = os.path.join(backing, f"{kind}.log")
        self.points = 0
        self.notes = []  # (length of the log, pickled model)
        for path in (self.image, self.log):
            with open(path, "wb") as file:
                file.truncate(IMAGE_BYTES if path == self.image else 0)
        run("mkfs." + kind, "-q", self.image)
        run("cp", "--sparse=always", self.image, self.start)
        self.server = bench.server(os.path.join(place, "pool"))
        self.note(World(), None, None)
        with exported(bench.work, self.image, self.log) as file, loop_device(file) as device:
            with mounted(device, place):
                try:
                    self.live()
                finally:
                    if self.server.running():
                        self.server.kill9()
        self.entries = write_log.read_entries(self.log)
        self.flushes = [i for i, e in enumerate(self.entries) if e.flags & write_log.FLUSH]
        if not self.flushes:
            raise Wrong("no flush of varved's reaches the device: nothing can be learned here")
        self.promises = [at for at, _ in self.notes]
        bench.count(f"writes on {kind}", len(self.entries) - len(self.flushes))
        bench.count(f"flushes on {kind}", len(self.flushes))
        bench.count("logs")

    def position(self):
        return os.path.getsize(self.log)

    def note(self, world, planned, command, moment=None):
        at = self.position() if moment is None else moment
        self.notes.append((at, pickle.dumps((world, planned, command), -1)))

    def live(self):
        """The load of some lives; each ends with SIGTERM or kill -9."""
        bench, server = self.bench, self.server
        candidates, legal = [World()], Blocks.now
        for _ in range(LIVES):
            server.must_start()
            ready = self.position()
            world = bench.verify(server, candidates, legal)
            self.note(world, None, None, ready)  # what it serves now, it serves for good
            load = NotedLoad(self, server, world, bench.source)
            load.begin()
            for _ in range(STEPS):
                load.step()
            if bench.source.random() < 0.5:
                terminate(server)
                legal = Blocks.now
            else:
                server.kill9()
                legal = Blocks.after_crash
            load.end()
            bench.count_load(load)
            candidates = load.candidates()

    def draw_cut(self):
        """How many entries arrive: any number, those that were there when something was answered,
        or all up to a flush that was about to be."""
        source = self.bench.source
        where = source.choice(("anywhere", "promise", "flush"))
        if where == "anywhere":
            return source.randrange(len(self.entries) + 1)
        if where == "flush":
            return source.choice(self.flushes)
        at = source.choice(self.promises)
        return sum(entry.end <= at for entry in self.entries)

    def replay(self):
        """The power fails at some point; the pool opens, and nothing promised is missing."""
        bench, server, source = self.bench, self.server, self.bench.source
        self.points += 1
        cut, how = self.draw_cut(), source.choice(HOW)
        end = self.entries[cut - 1].end if cut else 0
        remains = write_log.draw_remains(self.entries, cut, how, source)
        run("cp", "--sparse=always", self.start, self.image)
        write_log.replay(self.log, remains, self.image)
        pickled = [state for at, state in self.notes if at <= end or at == 0][-1]
        candidates = outcomes(*pickle.loads(pickled))
        loose = cut - write_log.last_flush(self.entries, cut)
        what = f"{self.kind}, {cut} of {len(self.entries)} entries, {loose} after the last flush, {how}"
        try:
            with mounted(self.image, self.place, "-o", "loop"):
                try:
                    opened = self.open_and_verify(candidates)
                finally:
                    if server.running():
                        server.kill9()
        except Wrong as wrong:
            raise Wrong(f"{what}: {wrong}") from wrong
        bench.count(f"points on {self.kind}")
        bench.count(f"points {how}")
        bench.say(f"{what}; opened in {opened * 1e3:.0f} ms")

    def open_and_verify(self, candidates):
        """Returns the seconds that opening took."""
        bench, server = self.bench, self.server
        if os.path.exists(os.path.join(server.pool, "meta")) and bench.source.random() < 0.3:
            bench.verify_offline(server)
            bench.count("offline checks")
        started = time.monotonic()
        status, said = server.start()
        opened = time.monotonic() - started
        if status is not None:
            raise Wrong(f"varved ended with {status}: {said}")
        torn = []
        world = bench.verify(server, candidates, torn=torn)
        bench.count("torn blocks", len(torn))
        if not torn and bench.source.random() < 0.2:
            load = bench.load(server, world, 3)
            bench.verify(server, load.candidates(), Blocks.now)
            terminate(server)
        return opened


def terminate(server):
    """SIGTERM. How long it may take is no matter here: a replayed device is slow."""
    status, _ = server.stop()
    if status != 0:
        raise Wrong(f"exit status {status} after SIGTERM")


class NotedLoad(Load):
    """Keeps the history of its model in a recording."""

    def __init__(self, recording, *arguments):
        super().__init__(*arguments)
        self.recording = recording

    def moment(self):
        return self.recording.position()

    def note(self, moment=None):
        self.recording.note(self.world, self.planned, self.command, moment)


@contextlib.contextmanager
def exported(work, image, log):
    """A file that is `image`, but what is done to it is logged."""
    mountpoint = os.path.join(work, "device")
    with open(mountpoint, "wb"):
        pass
    daemon = subprocess.Popen([
        "qemu-storage-daemon",
        "--blockdev", f"driver=file,node-name=image,filename={image}",
        "--blockdev", f"driver=file,node-name=log,filename={log}",
        "--blockdev", "driver=blklogwrites,node-name=logged,file=image,log=log,"
                      "log-sector-size=512",
        "--export", f"type=fuse,id=export,node-name=logged,mountpoint={mountpoint},writable=on",
    ])  # fmt: skip
    try:
        end = time.monotonic() + 30
        while os.path.getsize(mountpoint) != IMAGE_BYTES:
            if daemon.poll() is not None or time.monotonic() > end:
                raise RuntimeError("qemu-storage-daemon does not export its file over FUSE")
            time.sleep(0.01)
        yield mountpoint
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)


@contextlib.contextmanager
def loop_device(file):
    device = run("losetup", "--find", "--show", file)
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(device, place, *options):
    run("mount", *options, device, place)
    try:
        yield
    finally:
        unmount(place)
