"""What the loads share: a server with a room of its own, fio, a client that watches latencies.

Not a benchmark: each load runs once, and its figures tell orders of magnitude.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import socket
import struct
import subprocess
import tempfile
import time

import nbd
from server import Server

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@contextlib.contextmanager
def running(place, *options, threads=2, pool=None):
    """A server on a new pool in `place`, which `pool` may make; stopped and removed afterwards."""
    programs = os.path.abspath(os.environ.get("VARVE_BIN", place.programs))
    with tempfile.TemporaryDirectory(prefix="varve-loads-", dir=place.parent) as directory:
        server = Server(programs, os.path.join(directory, "pool"), directory,
                        ("--threads", str(threads), *options))  # fmt: skip
        if pool:
            pool(server)
        server.must_start()
        try:
            yield server
        finally:
            if server.running():
                server.stop(300)


def stopped(server):
    """Seconds that SIGTERM takes."""
    status, seconds = server.stop(300)
    assert status == 0, status
    return seconds


def processor_seconds(server):
    with open(f"/proc/{server.process.pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def until(condition, seconds, step=0.02):
    """Seconds until `condition()` holds; None if it does not within `seconds`."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            return None
        time.sleep(step)
    return time.monotonic() - begin


def seconds_text(seconds, most):
    return f"not in {most} s" if seconds is None else f"{seconds:.2f} s"


def raise_descriptors():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def fill(server, disk, size):
    """Writes all of the disk once."""
    client = nbd.Client(server.nbd, disk)
    data = os.urandom(MIB)
    for done in range(0, size, 8 * MIB):
        count = min(8, (size - done) // MIB)
        for part in range(count):
            client.send(nbd.WRITE, done + part * MIB, data=data)
        for _ in range(count):
            assert client.receive()[1] == 0
    client.flush()
    client.close()


def write_blocks(server, disk, offsets, data=b"w" * 4096):
    """4 KiB at each offset, some at a time."""
    client = nbd.Client(server.nbd, disk)
    for begin in range(0, len(offsets), 64):
        some = offsets[begin : begin + 64]
        for offset in some:
            client.send(nbd.WRITE, offset, data=data)
        for _ in some:
            assert client.receive()[1] == 0
    client.flush()
    client.close()


class Fio:
    """Random writes of 4 KiB on a disk, in a process of their own."""

    def __init__(self, server, disk, seconds, depth, rate=0):
        job = ["fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///{disk}?socket={server.nbd}",
               "--rw=randwrite", "--bs=4k", f"--iodepth={depth}", "--time_based",
               f"--runtime={seconds}", "--norandommap=1", "--percentile_list=50:99",
               "--output-format=json"]  # fmt: skip
        if rate:
            job.append(f"--rate_iops={rate}")
        self._process = subprocess.Popen(job, stdout=subprocess.PIPE, text=True)

    def finish(self):
        """(writes a second, p99 in ms, writes)"""
        said, _ = self._process.communicate()
        assert self._process.returncode == 0, said[-500:]
        side = json.loads(said[said.index("{") :])["jobs"][0]["write"]
        return side["iops"], side["clat_ns"]["percentile"]["99.000000"] / 1e6, side["total_ios"]


class Watcher:
    """Reads a block of a disk again and again, a millisecond apart, in a process of its own, and
    writes one with a flush each 16th time: how long both take."""

    def __init__(self, server, disk):
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (server.nbd, disk, theirs)
        self._process = multiprocessing.Process(target=self._run, args=arguments, daemon=True)
        self._process.start()
        assert self._pipe.recv() == "attached"

    @staticmethod
    def _run(path, disk, pipe):
        client = nbd.Client(path, disk)
        pipe.send("attached")
        reads, flushes = [], []
        while not pipe.poll(0.001):
            begin = time.perf_counter()
            client.read(4096 * (len(reads) % 64), 4096)
            reads.append(time.perf_counter() - begin)
            if len(reads) % 16 == 0:
                begin = time.perf_counter()
                client.write(4096 * (len(reads) % 64), b"f" * 4096)
                client.flush()
                flushes.append(time.perf_counter() - begin)
        client.close()
        pipe.send((reads, flushes))

    def finish(self):
        """Of reads, and of writes with a flush: "p99 / most ms"."""
        self._pipe.send("stop")
        found = self._pipe.recv()
        self._process.join()
        return [self._text(sorted(took)) for took in found]

    @staticmethod
    def _text(took):
        return f"{took[int(0.99 * (len(took) - 1))] * 1e3:.1f} / {took[-1] * 1e3:.1f} ms"


def list_exports(path):
    """An NBD client's LIST: (seconds, exports)."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(120)
    sock.connect(path)
    stream = sock.makefile("rb")
    stream.read(18)
    begin, count = time.monotonic(), 0
    sock.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 3, 0))
    while True:
        _, _, kind, length = struct.unpack(">QIII", stream.read(20))
        stream.read(length)
        if kind == 1:
            break
        assert kind == 2, kind
        count += 1
    sock.close()
    return time.monotonic() - begin, count
