"""The servers that are measured side by side: Varve and its peers, and the raw file without any.

Each serves one disk, fully written once. Not a test harness: nothing is verified here.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

EXPORT = "disk0"


class Failed(Exception):
    """Something that had to work for the benchmark did not; the message says what."""


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Server:
    """A server process on a directory of its own. Starts, stops, and tells what it has used."""

    name = "?"
    about = "?"  # the command line, in short
    only_if_asked = False

    def __init__(self, directory, size):
        self.directory = os.path.join(directory, self.name)
        self.size = size
        self.socket = os.path.join(self.directory, "nbd.sock")
        self.process = None
        os.makedirs(self.directory)

    def prepare(self):
        """Makes what is served, before the first start."""

    def command(self):
        raise NotImplementedError

    def start(self):
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        self.log = open(os.path.join(self.directory, "log"), "ab")
        self.process = subprocess.Popen(self.command(), stdout=self.log, stderr=self.log)
        self._wait_until_ready()

    def _wait_until_ready(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(self.socket)
                return
            except OSError:
                time.sleep(0.01)
        with open(os.path.join(self.directory, "log"), errors="replace") as log:
            raise Failed(f"{self.name} did not start: {log.read()[-500:].strip()}")

    def stop(self, how=signal.SIGTERM):
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def before_first_writes(self):
        """Makes every block one that a snapshot holds, if the server has snapshots."""

    def after_first_writes(self):
        """Drops that snapshot."""

    def target(self):
        """fio's options that name the disk."""
        return ["--ioengine=nbd", f"--uri=nbd+unix:///{EXPORT}?socket={self.socket}"]

    def cpu_seconds(self):
        """User and system time of all its threads so far."""
        if not self.process:
            return 0.0
        with open(f"/proc/{self.process.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def written_bytes(self):
        """What it has caused to be sent to storage so far; nothing on tmpfs."""
        with open(f"/proc/{self.process.pid}/io") as counters:
            return next(int(line.split()[1]) for line in counters
                        if line.startswith("write_bytes:"))

    def memory_bytes(self):
        """Resident memory now, without pages of files on tmpfs, which are the file system's."""
        if not self.process:
            return 0
        with open(f"/proc/{self.process.pid}/status") as status:
            return sum(int(line.split()[1]) * 1024 for line in status
                       if line.startswith(("RssAnon:", "RssFile:")))


class RawFile(Server):
    """Base of those that serve a preallocated raw file."""

    def prepare(self):
        self.file = os.path.join(self.directory, "raw")
        run("fallocate", "-l", str(self.size), self.file)


class Nbdkit(RawFile):
    name = "nbdkit"
    about = "nbdkit file (page cache)"

    def command(self):
        return ["nbdkit", "-f", "-U", self.socket, "file", self.file]


class QemuNbd(RawFile):
    name = "qemu-raw"
    about = "qemu-nbd -f raw --cache=writeback --aio=threads"
    image_format = "raw"
    modes = ["--cache=writeback", "--aio=threads"]

    def command(self):
        return ["qemu-nbd", "-f", self.image_format, *self.modes, "--discard=unmap", "--shared=0",
                "--persistent", "-x", EXPORT, "-k", self.socket, self.file]


class QemuNbdDirect(QemuNbd):
    name = "qemu-raw-direct"
    about = "qemu-nbd -f raw --cache=none --aio=io_uring"
    modes = ["--cache=none", "--aio=io_uring"]


class Qcow2(QemuNbd):
    name = "qcow2"
    about = "qemu-nbd -f qcow2 --cache=writeback --aio=threads"
    image_format = "qcow2"

    def prepare(self):
        self.file = os.path.join(self.directory, "qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", self.file,
            str(self.size))

    # qemu-nbd cannot take an internal snapshot of an image that it serves.
    def before_first_writes(self):
        self.stop()
        run("qemu-img", "snapshot", "-c", "before", self.file)
        self.start()

    def after_first_writes(self):
        self.stop()
        run("qemu-img", "snapshot", "-d", "before", self.file)
        self.start()


class Qcow2Direct(Qcow2):
    name = "qcow2-direct"
    about = "qemu-nbd -f qcow2 --cache=none --aio=io_uring"
    modes = QemuNbdDirect.modes


class NoServer(RawFile):
    name = "raw-file"
    about = "no server: fio's io_uring engine on the raw file, O_DIRECT"

    def start(self):
        pass

    def target(self):
        return ["--ioengine=io_uring", f"--filename={self.file}", "--direct=1"]


class Wire(Server):
    """A measuring stick, not a server: what no server can do better."""

    name = "wire"
    about = "varve-wire-limit, which answers from its memory"
    only_if_asked = True

    def command(self):
        return [os.path.join(Varve.binaries, "varve-wire-limit"), self.socket,
                str(self.size >> 20)]


class WireFile(RawFile, Wire):
    name = "wire-file"
    about = "varve-wire-limit with a file: sends from a mapping, writes by pwrite"

    def command(self):
        return [*super().command(), self.file]


class Varve(Server):
    name = "varve"
    about = "varved --cache buffered"
    cache = "buffered"
    binaries = None  # directory of varved and varve; set by main

    def __init__(self, directory, size):
        super().__init__(directory, size)
        self.pool = os.path.join(self.directory, "pool")
        self.admin = os.path.join(self.directory, "admin.sock")
        self.snapshots = 0

    def prepare(self):
        self.start()
        self.varve("create", EXPORT, str(self.size))
        self.stop()

    def command(self):
        return [os.path.join(self.binaries, "varved"), "--pool", self.pool, "--unix", self.socket,
                "--admin", self.admin, "--cache", self.cache]

    def start(self):
        self.process = subprocess.Popen(self.command(), stderr=subprocess.PIPE)
        said = []
        for line in self.process.stderr:
            said.append(line.decode(errors="replace").strip())
            if said[-1].startswith("varved: ready"):
                break
        else:
            raise Failed(f"varved did not start: {' / '.join(said[-3:])}")
        # The rest of its log goes on into a file.
        self.log = subprocess.Popen(["cat"], stdin=self.process.stderr,
                                    stdout=open(os.path.join(self.directory, "log"), "ab"))
        self.process.stderr.close()

    def stop(self, how=signal.SIGTERM):
        super().stop(how)
        self.log.wait()

    def varve(self, *verb):
        return run(os.path.join(self.binaries, "varve"), "--admin", self.admin, *verb)

    def status(self):
        return json.loads(self.varve("--json", "status"))

    def before_first_writes(self):
        self.snapshots += 1
        self.varve("snapshot", f"{EXPORT}@bench{self.snapshots}")

    def after_first_writes(self):
        self.varve("delete", f"{EXPORT}@bench{self.snapshots}", "--yes")
        self.wait_for_reclaim()

    def wait_for_reclaim(self):
        while self.status()["reclaim_pending"]:
            time.sleep(0.05)

    def wait_for_checksums(self):
        while self.status()["checksums_pending"]:
            time.sleep(0.05)


class VarveDisk:
    """One of several disks of a running Varve server, as something to measure."""

    def __init__(self, server, export):
        self.server, self.export = server, export
        self.name, self.size, self.snapshots = export, server.size, 0
        self.cpu_seconds, self.memory_bytes = server.cpu_seconds, server.memory_bytes

    def target(self):
        return ["--ioengine=nbd", f"--uri=nbd+unix:///{self.export}?socket={self.server.socket}"]

    def before_first_writes(self):
        self.snapshots += 1
        self.server.varve("snapshot", f"{self.export}@bench{self.snapshots}")

    def after_first_writes(self):
        self.server.varve("delete", f"{self.export}@bench{self.snapshots}", "--yes")
        self.server.wait_for_reclaim()


class VarveDirect(Varve):
    name = "varve-direct"
    about = "varved --cache direct"
    cache = "direct"


def available(server):
    """Why it cannot be measured here, or an empty string."""
    if issubclass(server, Varve):
        program = os.path.join(server.binaries, "varved")
    elif issubclass(server, Wire):
        program = os.path.join(Varve.binaries, "varve-wire-limit")
    else:
        program = {Nbdkit: "nbdkit", NoServer: "fio"}.get(server, "qemu-nbd")
    return "" if shutil.which(program) else f"{program} not found"
