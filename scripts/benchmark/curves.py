"""Curves: throughput and latency by queue depth, and a load's latency around snapshots."""

import statistics
import tempfile
import time

from benchmark import work
from benchmark.logs import LoggedLoad
from benchmark.servers import EXPORT
from benchmark.special import Admin

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
WINDOW_MS = 20


def by_depth(classes, directory, size, rounds, seconds, seed, note):
    """[{server, pattern, depth, requests_per_s, p50_us, p99_us}], medians over rounds."""
    running, found = [], []
    try:
        for server_class in classes:
            server = server_class(directory, size)
            running.append(server)
            server.prepare()
            server.start()
            work.prefill(server)
        for pattern in ("randread", "randwrite"):
            for depth in DEPTHS:
                kind = work.Work("depth", "", pattern, depth=depth)
                runs = {server.name: [] for server in running}
                for number in range(rounds):
                    turn = number % len(running)
                    for server in running[turn:] + running[:turn]:
                        runs[server.name].append(
                            work.measure(kind, server, seconds, seed + number))
                for name, figures in runs.items():
                    entry = {"server": name, "pattern": pattern, "depth": depth}
                    for field in ("requests_per_s", "p50_us", "p99_us"):
                        entry[field] = statistics.median(getattr(one, field) for one in figures)
                    found.append(entry)
                note(f"{pattern}, depth {depth}: " + ", ".join(
                    f"{entry['server']} {entry['requests_per_s']:,.0f}/s"
                    for entry in found[-len(running):]))
    finally:
        for server in running:
            server.stop()
    return found


def depth_table(found, pattern):
    names = sorted({entry["server"] for entry in found}, key=lambda name: name != "varve")
    columns = ["depth"] + [f"{name}: requests/s, p50, p99 us" for name in names]
    rows = []
    for depth in DEPTHS:
        row = [str(depth)]
        for name in names:
            entry = next(one for one in found if (one["server"], one["pattern"], one["depth"]) ==
                         (name, pattern, depth))
            row.append(f"{entry['requests_per_s']:,.0f}, {entry['p50_us']:,.0f}, "
                       f"{entry['p99_us']:,.0f}")
        rows.append(row)
    return {"columns": columns, "rows": rows}


def around_snapshots(server, seconds, every, seed):
    """A load of 4 KiB random writes, QD 32 x 4, and a snapshot each `every` seconds.

    Rates and longest latencies in windows of 20 ms; times from the load's start, in seconds. And
    the p99 of all requests in the seconds that begin with a snapshot, and in the two seconds before
    the first one (`usual`). REQUIRES: every >= 2.5.
    """
    load = next(kind for kind in work.ALL if kind.name == "write-c4")
    admin = Admin(server.admin)
    count, moments = 0, []
    with tempfile.TemporaryDirectory(prefix="varve-bench-") as directory:
        job = work.command(load, server.target(), server.size, seconds, seed)
        began = time.monotonic()
        running = LoggedLoad(job, directory, WINDOW_MS)
        try:
            while (count + 1) * every < seconds - 0.5:
                count += 1
                time.sleep(max(0.0, began + count * every - time.monotonic()))
                moments.append(time.time())
                admin.call("snapshot.create", snapshots=[f"{EXPORT}@around{count}"])
            running.wait()
            rates, longest = running.rates(), running.longest()
            after = running.percentile(0.99, *((when, when + 1) for when in moments))
            usual = running.percentile(0.99, (moments[0] - 2, moments[0] - 0.1))
        finally:
            running.stop()
    for number in range(count):
        admin.call("snapshot.delete", snapshot=f"{EXPORT}@around{number + 1}")
    admin.close()
    server.wait_for_reclaim()
    zero = rates[0][0]
    shifted = [[[when - zero, value] for when, value in pairs] for pairs in (rates, longest)]
    return {"snapshots": [when - zero for when in moments], "rates": shifted[0],
            "longest_ms": shifted[1], "window_ms": WINDOW_MS, "p99_ms": after,
            "usual_p99_ms": usual}
