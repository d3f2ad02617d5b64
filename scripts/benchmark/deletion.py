"""Deleting a snapshot after much of its disk was written again: time, bytes, and what others feel.

Blocks are written again at random, so that each 256 KiB has up to 64 pieces to give back.
"""

import statistics
import subprocess
import time

from benchmark import work
from benchmark.logs import LoggedLoad, mean_rate
from benchmark.servers import EXPORT, Failed
from benchmark.special import Admin

BESIDE = work.Work("beside", "4 KiB random read and write, half each, QD 32", "randrw")
SNAPSHOT = f"{EXPORT}@deleted"
WINDOW_MS = 50


def rewrite(server, size, seed):
    """Writes each block of the first `size` bytes once, in random order."""
    job = work.Work("rewrite", "", "randwrite", once=True)
    command = work.command(job, server.target(), size, 3600, seed) + ["--end_fsync=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"fio: {done.stderr.strip()[-500:]}")


def delete(admin):
    """Deletes the snapshot and waits until its space is back; (begin, end) by time.time()."""
    begin = time.time()
    admin.call("snapshot.delete", snapshot=SNAPSHOT)
    while admin.call("pool.status")["reclaim_pending"]:
        time.sleep(0.02)
    return begin, time.time()


def alone(server, admin, size, seed):
    """A deletion with nothing beside it."""
    admin.call("snapshot.create", snapshots=[SNAPSHOT])
    server.wait_for_checksums()
    rewrite(server, size, seed)
    used = admin.call("pool.status")["used"]  # also brings all changes into map rows
    written, cpu = server.written_bytes(), server.cpu_seconds()
    begin, end = delete(admin)
    return {
        "seconds": end - begin,
        "freed": used - admin.call("pool.status")["used"],
        "written": server.written_bytes() - written,
        "cpu_seconds": server.cpu_seconds() - cpu,
    }


def beside_load(server, admin, size, seconds, seed, directory):
    """A deletion beside random reads and writes in place, in the stretch that was written."""
    admin.call("snapshot.create", snapshots=[SNAPSHOT])
    server.wait_for_checksums()
    rewrite(server, size, seed)
    admin.call("pool.status")
    quiet = max(2.0, seconds)  # before and after the deletion
    # Deletions give way to a load: they take many times as long beside one.
    longest = 3 * quiet + 60 * size / 2**30 + 8
    job = work.command(BESIDE, server.target(), size, round(longest), seed + 1)
    load = LoggedLoad(job, directory, WINDOW_MS)
    try:
        time.sleep(quiet + 0.5)
        begin, end = delete(admin)
        time.sleep(quiet + 0.2)
        load.end()
    finally:
        load.stop()
    rates = load.rates()
    # A window may lie half within; the first half second is fio's start.
    first, last = rates[0][0] + 0.5, rates[-1][0] - 0.1
    edge = WINDOW_MS / 1000
    without = mean_rate(rates, (first, begin - edge), (end + edge, last))
    during = mean_rate(rates, (begin, end))
    if end > last or not during:
        raise Failed("the deletion and the load beside it did not overlap")
    return {"seconds": end - begin, "without_per_s": without, "during_per_s": during,
            "ratio": during / without}


def median_beside_load(rounds, *arguments):
    """The median of each figure over rounds; `ratios`: all of them."""
    runs = [beside_load(*arguments) for _ in range(rounds)]
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {**middle, "ratios": sorted(run["ratio"] for run in runs)}


def measure(server_class, directory, most, rounds, seed, note):
    """For 0.1, 0.25, 0.5 and 1 of `most` bytes of changes: figures of deletions."""
    server = server_class(directory, most)
    server.prepare()
    server.start()
    admin, found = Admin(server.admin), []
    try:
        work.prefill(server)
        for part in (0.1, 0.25, 0.5, 1):
            size = int(most * part) >> 20 << 20
            quiet = alone(server, admin, size, seed)
            loaded = median_beside_load(rounds, server, admin, size, quiet["seconds"], seed,
                                        directory)
            found.append({"changed": size, "alone": quiet, "beside": loaded})
            note(f"deleting {size / 2**30:.2f} GiB of changes: {quiet['seconds']:.2f} s, beside a "
                 f"load {loaded['seconds']:.2f} s, which keeps {loaded['ratio']:.2f} of its rate")
    finally:
        admin.close()
        server.stop()
    return found


def figures(found):
    last = found[-1]
    return {
        "changed": last["changed"],
        "seconds": last["alone"]["seconds"],
        "seconds_per_gib_least": min(per_gib(one) for one in found),
        "seconds_per_gib_most": max(per_gib(one) for one in found),
        "written_of_freed": last["alone"]["written"] / last["alone"]["freed"],
        "beside_ratio": last["beside"]["ratio"],
        "beside_seconds": last["beside"]["seconds"],
    }


def per_gib(one):
    return one["alone"]["seconds"] / (one["changed"] / 2**30)


def table(found):
    columns = ["changed, GiB", "time alone, s", "s/GiB", "server CPU, s", "freed, MiB",
               "written, MiB", "time beside a load, s", "load's requests/s (of without)"]
    rows = []
    for one in found:
        quiet, loaded = one["alone"], one["beside"]
        rows.append([f"{one['changed'] / 2**30:.2f}", f"{quiet['seconds']:.2f}",
                     f"{per_gib(one):.2f}", f"{quiet['cpu_seconds']:.2f}",
                     f"{quiet['freed'] / 2**20:,.0f}", f"{quiet['written'] / 2**20:,.1f}",
                     f"{loaded['seconds']:.2f}",
                     f"{loaded['during_per_s']:,.0f} ({loaded['ratio']:.2f})"])
    return {"columns": columns, "rows": rows}
