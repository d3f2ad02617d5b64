"""Random reads and writes on a disk with many snapshots, against one without any.

Both disks are of the same size, served by the same process; runs alternate between them.
"""

import statistics
import time

import nbd
from benchmark import work
from benchmark.servers import EXPORT, VarveDisk
from benchmark.special import Admin, metadata_bytes, percentile

BLOCK = 4096
DISK_BYTES = 256 << 20
WRITES_BETWEEN = 4  # blocks written between two snapshots

WORKS = [
    work.Work("read", "4 KiB random read, QD 32", "randread"),
    work.Work("write", "4 KiB random write, QD 32", "randwrite"),
    work.Work("first", "first writes after one more snapshot", "randwrite", first_writes=True),
]
COLD = work.Work("cold", "each block read once, at random, map cache cold", "randread", once=True)


def steps_to(count):
    """0, 10, 100 ... count."""
    steps, step = [0], 10
    while step < count:
        steps.append(step)
        step *= 10
    return steps + [count]


def take_snapshots(server, first, end, draw):
    """Takes snapshots `first` to `end` - 1 of the disk, writing some blocks before each.

    Milliseconds that each took over one connection of the admin socket.
    """
    admin, client = Admin(server.admin), nbd.Client(server.socket, EXPORT)
    took = []
    try:
        for number in range(first, end):
            for _ in range(WRITES_BETWEEN):
                block = draw.randrange(server.size // BLOCK)
                client.write(block * BLOCK, number.to_bytes(8, "big") * (BLOCK // 8))
            before = time.perf_counter()
            admin.call("snapshot.create", snapshots=[f"{EXPORT}@s{number}"])
            took.append((time.perf_counter() - before) * 1000)
    finally:
        client.close()
        admin.close()
    return took


def compare(kind, disks, rounds, seconds, seed, before_each=None):
    """Rates and p99 of the first disk, and ratios to the second: medians over rounds.

    On a machine that others share the ratio of the server's CPU per request varies least.
    """
    runs = {disk.export: [] for disk in disks}
    for number in range(rounds):
        for disk in disks if number % 2 else disks[::-1]:
            if before_each:
                before_each()
            runs[disk.export].append(work.measure(kind, disk, seconds, seed + number))
    many, none = (runs[disk.export] for disk in disks)
    return {
        "requests_per_s": statistics.median(one.requests_per_s for one in many),
        "ratio": statistics.median(a.requests_per_s / b.requests_per_s
                                   for a, b in zip(many, none)),
        "p99_us": statistics.median(one.p99_us for one in many),
        "cpu_ratio": statistics.median(a.cpu_us / b.cpu_us for a, b in zip(many, none)),
        "p99_ratio": statistics.median(a.p99_us / b.p99_us for a, b in zip(many, none)),
    }


def measure(server_class, directory, count, rounds, seconds, draw, note):
    """Rates at 0, 10, 100 ... `count` snapshots. `draw`: the source of randomness.

    `rounds` for the first and the last, half as many for those between.
    """
    server = server_class(directory, DISK_BYTES)
    server.prepare()
    server.start()
    steps, series = steps_to(count), []
    try:
        server.varve("create", "plain", str(DISK_BYTES))
        disks = [VarveDisk(server, EXPORT), VarveDisk(server, "plain")]
        taken = 0
        for step in steps:
            took = take_snapshots(server, taken, step, draw)
            taken = step
            server.wait_for_checksums()
            entry = {"snapshots": step}
            if took:
                entry["snapshot_p50_ms"] = statistics.median(took)
                entry["snapshot_p99_ms"] = percentile(took, 0.99)
            for disk in disks:  # all blocks belong to the present generation
                work.prefill(disk)
            repeats = rounds if step in (0, count) else max(1, rounds // 2)
            for kind in WORKS:
                entry[kind.name] = compare(kind, disks, repeats, seconds, draw.randrange(10**6))
            series.append(entry)
            note(f"{step} snapshots: " + ", ".join(
                f"{kind.name} {entry[kind.name]['ratio']:.2f}" for kind in WORKS) + " of none")

        def restart():
            server.stop()
            server.start()

        cold = compare(COLD, disks, rounds, 60, draw.randrange(10**6), restart)
        memory = server.memory_bytes()
    finally:
        server.stop()
    last = series[-1]
    figures = {"snapshots": count}
    for kind in WORKS:
        figures[f"{kind.name}_requests_per_s"] = last[kind.name]["requests_per_s"]
        figures[f"{kind.name}_ratio"] = last[kind.name]["ratio"]
        figures[f"{kind.name}_cpu_ratio"] = last[kind.name]["cpu_ratio"]
        figures[f"{kind.name}_p99_ratio"] = last[kind.name]["p99_ratio"]
    figures["cold_read_requests_per_s"] = cold["requests_per_s"]
    figures["cold_read_ratio"] = cold["ratio"]
    figures["snapshot_p50_ms"] = last["snapshot_p50_ms"]
    figures["snapshot_p99_ms"] = last["snapshot_p99_ms"]
    figures["memory"] = memory
    figures["metadata"] = metadata_bytes(server)
    return figures, series


def table(series):
    columns = ["snapshots"] + [f"{kind.about}: requests/s (of none)" for kind in WORKS]
    columns.append("taking one, p50 ms")
    rows = []
    for entry in series:
        row = [f"{entry['snapshots']:,}"]
        row += [f"{entry[kind.name]['requests_per_s']:,.0f} ({entry[kind.name]['ratio']:.2f})"
                for kind in WORKS]
        row.append(f"{entry['snapshot_p50_ms']:.2f}" if "snapshot_p50_ms" in entry else "-")
        rows.append(row)
    return {"columns": columns, "rows": rows}
