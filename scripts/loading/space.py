"""Loads on space: how fast it comes back, and how much little disks take."""

import os
import time

import nbd
from loading.common import (GIB, KIB, MIB, Fio, fill, running, seconds_text, stopped, until,
                            write_blocks)  # fmt: skip

CHUNK = 256 * KIB


def churn(place):
    """One disk at 4,000 random writes of 4 KiB a second; each second a snapshot is made and the
    one before deleted."""
    seconds = place.scaled(60, least=5)
    with running(place) as server:
        server.call("disk.create", name="busy", size=GIB)
        fill(server, "busy", GIB)
        admin = server.admin()
        used = admin.call("pool.status")["used"]
        load, begin, number = Fio(server, "busy", seconds, depth=16, rate=4000), time.monotonic(), 0
        longest = 0
        while time.monotonic() < begin + seconds - 1:
            number += 1
            asked = time.monotonic()
            admin.call("snapshot.create", snapshots=[f"busy@s{number}"])
            if number > 1:
                admin.call("snapshot.delete", snapshot=f"busy@s{number - 1}")
            longest = max(longest, time.monotonic() - asked)
            time.sleep(max(0, begin + number - time.monotonic()))
        admin.call("snapshot.delete", snapshot=f"busy@s{number}")
        rate, p99, writes = load.finish()
        status = admin.call("pool.status")
        during, left = status["reclaimed_bytes"], status["used"] - used
        back = until(lambda: admin.call("pool.status")["used"] <= used + MIB, 120, step=0.2)
        status = admin.call("pool.status")
        return [
            ("writes", f"{rate:,.0f}/s for {seconds} s ({writes * 4 // KIB} MiB), p99 {p99:.2f} ms; "
                       f"making and deleting took {longest * 1e3:.0f} ms at most"),
            ("given back meanwhile", f"{during // MIB} MiB; {left // MIB} MiB were still to come"),
            ("the rest came back after", seconds_text(back, 120)),
            ("given back in all", f"{status['reclaimed_bytes'] // MIB} MiB"),
        ]  # fmt: skip


def golden(place):
    """Ten clones of a golden disk that is deleted, each with a write in every chunk; then an
    unrelated disk of 64 MiB is deleted."""
    size = place.scaled(4 * GIB, least=256 * MIB)
    with running(place) as server:
        server.call("disk.create", name="golden", size=size)
        fill(server, "golden", size)
        server.call("disk.create", name="other", size=64 * MIB)
        fill(server, "other", 64 * MIB)
        server.call("snapshot.create", snapshots=["golden@s"])
        for number in range(10):
            server.call("disk.clone", snapshot="golden@s", name=f"clone{number}")
        server.call("disk.delete", name="golden", snapshots=True)
        begin = time.monotonic()
        for number in range(10):  # each another block, so that none is dead
            offsets = [chunk + number * 4096 for chunk in range(0, size, CHUNK)]
            write_blocks(server, f"clone{number}", offsets)
        took = time.monotonic() - begin
        admin = server.admin()
        reclaimed = admin.call("pool.status")["reclaimed_bytes"]
        admin.call("disk.delete", name="other")
        back = until(
            lambda: admin.call("pool.status")["reclaimed_bytes"] >= reclaimed + 64 * MIB, 120)  # fmt: skip
        pending = admin.call("pool.status")["reclaim_pending"]
        admin.close()
        ends = stopped(server)
    return [
        (f"writes, one in each chunk of ten clones of {size // MIB} MiB", f"{took:.1f} s"),
        ("64 MiB came back after", seconds_text(back, 120)),
        (f"SIGTERM, {pending} steps of reclaim pending", f"{ends:.2f} s"),
    ]


def little(place):
    """Many disks with a first write of 4 KiB each: the space they take, and how fast they get it."""
    few, many = place.scaled(1200, least=100), place.scaled(8000, least=200)
    with running(place, "--connections-max", str(few + many + 100)) as server:
        admin = server.admin()
        clients = []
        took = 0

        def first_writes(names):
            nonlocal took
            for name in names:
                admin.call("disk.create", name=name, size=64 * MIB)
            new = [nbd.Client(server.nbd, name) for name in names]
            begin = time.monotonic()
            for client in new:
                client.send(nbd.WRITE, 0, data=b"1" * 4096)
            for client in new:
                assert client.receive()[1] == 0
            took = time.monotonic() - begin
            clients.extend(new)

        first_writes([f"few{number}" for number in range(few)])
        status = admin.call("pool.status")
        there = os.stat(os.path.join(server.pool, "data")).st_blocks * 512
        first_writes([f"many{number}" for number in range(many)])
        for client in clients:
            client.close()
        return [
            (f"{few:,} disks with 4 KiB each", f"{(status['used'] + status['leased']) // MIB} MiB "
             f"used and leased; the data file takes {there // MIB} MiB"),
            (f"first writes of {many:,} disks at once", f"{many / took:,.0f}/s"),
        ]  # fmt: skip
