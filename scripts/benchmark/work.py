"""The work that is measured: fio jobs, and what one run of one of them gave.

Each run is one fio process against one server; rounds are interleaved by the caller.
"""

import json
import subprocess
from dataclasses import dataclass

from benchmark.servers import Failed


@dataclass(frozen=True)
class Work:
    """A kind of load. `once`: no block is met twice. `first_writes`: nor that, and a snapshot
    precedes each run."""

    name: str
    about: str
    pattern: str  # fio's rw=
    block: int = 4096
    depth: int = 32
    connections: int = 1
    flush_every: int = 0
    first_writes: bool = False
    once: bool = False

    @property
    def writes(self):
        return "write" in self.pattern


ALL = [
    Work("read-c1", "4 KiB random read, QD 32, 1 connection", "randread"),
    Work("read-c4", "4 KiB random read, QD 32, 4 connections", "randread", connections=4),
    Work("write-c1", "4 KiB random write, QD 32, 1 connection", "randwrite"),
    Work("write-c4", "4 KiB random write, QD 32, 4 connections", "randwrite", connections=4),
    Work("read-qd1", "4 KiB random read, QD 1", "randread", depth=1),
    Work("write-qd1", "4 KiB random write, QD 1", "randwrite", depth=1),
    Work("seqread", "1 MiB sequential read, QD 8", "read", block=1 << 20, depth=8),
    Work("seqwrite", "1 MiB sequential write, QD 8", "write", block=1 << 20, depth=8),
    Work("flush1", "4 KiB random write, flush after each", "randwrite", depth=1, flush_every=1),
    Work("flush32", "4 KiB random write, QD 32, flush after each 32", "randwrite", flush_every=32),
    # Those that leave the blocks scattered come last.
    Work("first-c1", "first writes after a snapshot: 4 KiB random, QD 32, 1 connection",
         "randwrite", first_writes=True),
    Work("first-c4", "first writes after a snapshot: 4 KiB random, QD 32, 4 connections",
         "randwrite", connections=4, first_writes=True),
    Work("first-flush1", "first writes after a snapshot, flush after each", "randwrite", depth=1,
         flush_every=1, first_writes=True),
    Work("first-flush32", "first writes after a snapshot, QD 32, flush after each 32",
         "randwrite", flush_every=32, first_writes=True),
    Work("seqread-scattered", "1 MiB sequential read, QD 8, of what was written at random",
         "read", block=1 << 20, depth=8),
]


@dataclass
class Figures:
    """Of one run. CPU and memory are the server's."""

    requests_per_s: float
    p50_us: float
    p99_us: float
    cpu_us: float  # per request
    memory: int  # bytes, resident at the end of the run


def command(work, target, size, seconds, seed):
    """fio's command line. Connections of first writes have parts of the disk of their own."""
    options = ["fio", "--name=bench", *target, f"--rw={work.pattern}", f"--bs={work.block}",
               f"--iodepth={work.depth}", f"--numjobs={work.connections}", f"--runtime={seconds}",
               f"--randseed={seed}", "--group_reporting=1", "--percentile_list=50:99",
               "--output-format=json"]
    if work.flush_every:
        options.append(f"--fsync={work.flush_every}")
    if work.first_writes or work.once:
        # Without repeats (fio keeps a map of what it has written), so at most once over the disk.
        part = size // work.connections // work.block * work.block
        options += [f"--size={part}", f"--offset_increment={part}", "--norandommap=0"]
    else:
        options += [f"--size={size}", "--time_based", "--norandommap=1"]
    return options


def prefill(server):
    """Writes the whole disk once."""
    job = ["fio", "--name=prefill", *server.target(), "--rw=write", "--bs=1M", "--iodepth=8",
           f"--size={server.size}", "--end_fsync=1", "--output-format=json"]
    done = subprocess.run(job, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"writing {server.name}'s disk: {done.stderr.strip()[-500:]}")


def measure(work, server, seconds, seed):
    """One run. The snapshot before first writes, and its deletion, are not part of the figures."""
    if work.first_writes:
        server.before_first_writes()
    job = command(work, server.target(), server.size, seconds, seed)
    cpu_before = server.cpu_seconds()
    done = subprocess.run(job, capture_output=True, text=True)
    cpu = server.cpu_seconds() - cpu_before
    memory = server.memory_bytes()
    if done.returncode != 0:
        raise Failed(f"fio against {server.name}: {done.stderr.strip()[-500:]}")
    # fio may print notes before its JSON.
    report = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    side = report["write" if work.writes else "read"]
    if work.first_writes:
        server.after_first_writes()
    percentiles = side["clat_ns"]["percentile"]
    requests = side["total_ios"]
    return Figures(
        requests_per_s=side["iops"],
        p50_us=percentiles["50.000000"] / 1000,
        p99_us=percentiles["99.000000"] / 1000,
        cpu_us=cpu * 1e6 / requests,
        memory=memory,
    )
