"""Loads on speed: one disk and many threads, large lists, clones and restores without end."""

import os
import random
import subprocess
import time

import nbd
from loading.common import (GIB, KIB, MIB, Fio, Watcher, fill, list_exports, processor_seconds,
                            running, seconds_text, stopped, until, write_blocks)  # fmt: skip


def threads(place):
    """An 8 GiB disk whose map is full, written at random by one client, with 2 threads and 64."""
    size = place.scaled(8 * GIB, least=GIB)
    seconds = place.scaled(10, least=2)

    def pool(server):
        command = [os.path.join(server.programs, "varve-fill-map"), server.pool, "large",
                   str(size), "at-random"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)

    found = []
    for count in (2, 64):
        with running(place, threads=count, pool=pool) as server:
            Fio(server, "large", seconds, depth=32).finish()
            rate, p99, _ = Fio(server, "large", seconds, depth=32).finish()
        found.append((f"{size // GIB} GiB, {count} threads", f"{rate:,.0f} writes/s, p99 {p99:.2f} ms"))
    return found


def listing(place):
    """LIST with 200,000 snapshots, again and again, beside a client that reads, writes and
    flushes."""
    disks, each = 200, place.scaled(1000, least=20)
    with running(place, "--list-size-max", "32M") as server:
        admin = server.admin()
        for number in range(disks):
            admin.call("disk.create", name=f"d{number}", size=MIB)
        begin = time.monotonic()
        for cut in range(each):
            names = [f"d{number}@s{cut}" for number in range(disks)]
            admin.call("snapshot.create", snapshots=names)
        made = time.monotonic() - begin
        admin.call("disk.create", name="watched", size=MIB)
        watcher = Watcher(server, "watched")
        time.sleep(5)
        alone = watcher.finish()
        watcher, lists = Watcher(server, "watched"), []
        begin, cpu = time.monotonic(), processor_seconds(server)
        while time.monotonic() < begin + 5:
            lists.append(list_exports(server.nbd))
        cpu = processor_seconds(server) - cpu
        beside = watcher.finish()
        admin.close()
    took = sorted(seconds for seconds, _ in lists)
    return [
        (f"making {disks * each:,} snapshots", f"{made:.0f} s"),
        (f"LIST of {lists[0][1]:,} exports", f"{took[len(took) // 2] * 1e3:.0f} ms, "
         f"{cpu / len(lists) * 1e3:.0f} ms of processor time"),
        ("reads of another client, p99 / most", f"{alone[0]} alone, {beside[0]} beside"),
        ("write and flush, likewise", f"{alone[1]} alone, {beside[1]} beside"),
    ]  # fmt: skip


def clones(place):
    """A golden snapshot deleted under 10 clones and under 1,000, ten of which then overwrite what
    they have of it: what a block costs that one of many no longer needs."""
    found, blocks = [], place.scaled(4096, least=512)
    for count in (10, place.scaled(1000, least=100)):
        with running(place) as server:
            admin = server.admin()
            admin.call("disk.create", name="golden", size=16 * MIB)
            fill(server, "golden", 16 * MIB)
            admin.call("snapshot.create", snapshots=["golden@s"])
            for number in range(count):
                admin.call("disk.clone", snapshot="golden@s", name=f"c{number}")
            begin = time.monotonic()
            admin.call("disk.delete", name="golden", snapshots=True)
            deleted = time.monotonic() - begin
            begin, cpu = time.monotonic(), processor_seconds(server)
            for number in range(10):
                write_blocks(server, f"c{number}", list(range(0, blocks * 4096, 4096)))
            wrote = time.monotonic() - begin
            settled = until(lambda: admin.call("pool.status", hurry=True)["reclaim_pending"] == 0,
                            300)  # fmt: skip
            cpu = (processor_seconds(server) - cpu) / (10 * blocks)
            admin.close()
        found.append((f"{count:,} clones",
                      f"deleting took {deleted * 1e3:.1f} ms; overwriting {10 * blocks:,} blocks "
                      f"{wrote:.1f} s and {cpu * 1e6:.0f} us of processor time each; settled "
                      f"{seconds_text(settled, 300)} later"))  # fmt: skip
    return found


def restores(place):
    """A chain of 10,000 restores, each of a snapshot taken after the one before; then it is deleted."""
    count, size = place.scaled(10_000, least=300), 64 * MIB
    with running(place) as server:
        admin = server.admin()
        admin.call("disk.create", name="disk", size=size)
        fill(server, "disk", size)
        source, deepest, begin = random.Random(1), 0, time.monotonic()
        for number in range(count):
            write_blocks(server, "disk", [source.randrange(size // 4096) * 4096])
            if number % 10 == 0:
                deepest = max(deepest, admin.call("disk.show", name="disk")["depth"])
            admin.call("snapshot.create", snapshots=[f"disk@s{number}"])
            admin.call("snapshot.restore", snapshot=f"disk@s{number}", disconnect=True, online=True)
        took = time.monotonic() - begin
        depth = admin.call("disk.show", name="disk")["depth"]
        admin.close()
        server.stop()
        begin = time.monotonic()
        server.must_start()
        opened = time.monotonic() - begin
        client, reads = nbd.Client(server.nbd, "disk"), []
        for chunk in range(0, size, 256 * KIB * 16):  # a group of rows each
            begin = time.perf_counter()
            client.read(chunk, 4096)
            reads.append(time.perf_counter() - begin)
        client.close()
        admin, begin = server.admin(), time.monotonic()
        admin.call("disk.delete", name="disk", snapshots=True)
        deleted, slowest = time.monotonic() - begin, 0
        while True:
            asked = time.monotonic()
            status = admin.call("pool.status", hurry=True)
            slowest = max(slowest, time.monotonic() - asked)
            if status["used"] == 0 and not status["reclaim_pending"]:
                break
            time.sleep(0.05)
        back = time.monotonic() - begin
        admin.close()
    reads.sort()
    return [
        (f"{count:,} snapshots and restores", f"{took:.0f} s, {took / count * 1e3:.1f} ms each"),
        ("depth", f"{deepest} at most, {depth} in the end"),
        ("the next start", f"{opened:.2f} s"),
        ("cold read of 4 KiB", f"{reads[len(reads) // 2] * 1e3:.2f} ms, {reads[-1] * 1e3:.2f} at most"),
        ("all of it deleted", f"{deleted:.2f} s; all space back after {back:.1f} s"),
        ("a status meanwhile", f"{slowest * 1e3:.0f} ms at most"),
    ]


def zeroes(place):
    """1,024 pipelined requests of a GiB of zeroes, and SIGTERM; with and without holes."""
    found, size = [], place.scaled(4 * GIB, least=GIB)
    for flags, kind in ((0, "holes"), (2, "NO_HOLE")):
        with running(place) as server:
            server.call("disk.create", name="zeroed", size=size)
            server.call("disk.create", name="other", size=MIB)
            fill(server, "zeroed", min(size, GIB))
            client = nbd.Client(server.nbd, "zeroed")
            for number in range(1024):
                client.send(nbd.WRITE_ZEROES, number * GIB % size, GIB, flags=flags)
            time.sleep(1)
            begin = time.monotonic()
            server.call("snapshot.create", snapshots=["other@s"])
            server.call("disk.delete", name="other", snapshots=True, disconnect=True)
            others = time.monotonic() - begin
            found.append((f"1,024 x 1 GiB, {kind}: commands on another disk, SIGTERM",
                          f"{others * 1e3:.0f} ms, {stopped(server):.2f} s"))  # fmt: skip
    return found
