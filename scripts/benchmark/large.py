"""A disk with a full map of any size, which a tool makes without writing the disk's data."""

import os
import signal
import statistics
import subprocess
import time

from benchmark import work
from benchmark.servers import EXPORT, Failed, run
from benchmark.special import Admin, kill_under_load, metadata_bytes

READ = work.Work("read", "4 KiB random read over all of the disk, QD 32", "randread")
READ_ONE = work.Work("read-one", "the same, QD 1", "randread", depth=1)
MAP_CACHE = 256 << 20  # the server's default


def forget_pages(server):
    """Drops the pool's metadata from the page cache."""
    for base, _, names in os.walk(os.path.join(server.pool, "meta")):
        for name in names:
            file = os.open(os.path.join(base, name), os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def restarted(server, how, forget):
    """Restarts the server; seconds to its ready line."""
    server.stop(how)
    if forget:
        forget_pages(server)
    before = time.monotonic()
    server.start()
    return time.monotonic() - before


def cold_reads(server, kind, seconds, seed, forget):
    restarted(server, signal.SIGTERM, forget)
    return work.measure(kind, server, seconds, seed)


def make_map(server, size, order, note):
    began = time.monotonic()
    run(os.path.join(server.binaries, "varve-fill-map"), server.pool, EXPORT, str(size), order)
    note(f"{size >> 30} GiB {order}: map made in {time.monotonic() - began:.0f} s")


def measure(server_class, directory, size, order, rounds, seconds, seed, note, kept=None):
    """`order`: in-order or at-random, how the disk's blocks lie in the data file.

    `kept`: a directory of pools that are made once and used again.
    """
    server = server_class(directory, size)
    if kept:
        server.pool = os.path.join(kept, f"{order}-{size >> 30}")
    if not os.path.exists(server.pool):
        make_map(server, size, order, note)
    server.start()
    ready, resident = [], []
    rates = {"read": [], "read-one": [], "disk": []}
    try:
        for number in range(rounds):
            for kind in (READ, READ_ONE):
                figures = cold_reads(server, kind, seconds, seed + number, forget=False)
                rates[kind.name].append(figures)
                resident.append(figures.memory)
            figures = cold_reads(server, READ, seconds, seed + number, forget=True)
            rates["disk"].append(figures)
        figures = work.measure(READ, server, 4 * seconds, seed)
        resident.append(figures.memory)
        note(f"{size >> 30} GiB {order}: {figures.requests_per_s:,.0f} reads/s, "
             f"{max(resident) >> 20} MiB resident")
        admin = Admin(server.admin)
        for number in range(rounds):
            # First writes all over the disk: the journal and the memory tables are full of them.
            admin.call("snapshot.create", snapshots=[f"{EXPORT}@s{number}"])
            admin.close()
            ready.append(kill_under_load(server, seed + number))
            admin = Admin(server.admin)
        for number in range(rounds):
            admin.call("snapshot.delete", snapshot=f"{EXPORT}@s{number}")
        admin.close()
        server.wait_for_reclaim()
    finally:
        server.stop()
    check = run(os.path.join(server.binaries, "varve"), "check", "--pool", server.pool, "--json")
    if '"ok":true' not in check.replace(" ", ""):
        raise Failed(f"the pool is damaged: {check[:500]}")
    return {
        "size_gib": size >> 30,
        "ready_s": statistics.median(ready),
        "ready_longest_s": max(ready),
        "memory": max(resident),
        "memory_over_map_cache": max(resident) - MAP_CACHE,
        "metadata": metadata_bytes(server),
        **cold_figures("cold", rates["read"]),
        **cold_figures("cold_qd1", rates["read-one"]),
        **cold_figures("cold_no_page_cache", rates["disk"]),
    }


def cold_figures(name, runs):
    return {f"{name}_{field}": statistics.median(getattr(one, field) for one in runs)
            for field in ("requests_per_s", "p50_us", "p99_us")}
