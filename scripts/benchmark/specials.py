"""What is measured beside the groups of servers: each special makes entries for the results.

An entry: name, title, figures {name: value}; it may have tables {title: {columns, rows}} and
curves, which plots.py draws.
"""

import contextlib
import random
import tempfile

from benchmark import curves, deletion, history, idle, large, servers, special, work

MIB = 1 << 20


class Place:
    """What a special has: the options, room for its files, and where it says how far it is."""

    def __init__(self, options, room, note):
        self.options, self._room, self.note = options, room, note

    @contextlib.contextmanager
    def directory(self, parent, need):
        """A directory with at least `need` free bytes, removed afterwards."""
        self._room(parent, need)
        with tempfile.TemporaryDirectory(prefix="varve-bench-", dir=parent) as directory:
            yield directory

    @contextlib.contextmanager
    def filled(self, size, room=3):
        """A server on tmpfs with a disk of `size` bytes, written once; room for so many of it."""
        with self.directory(self.options.tmpfs, room * size) as directory:
            server = servers.Varve(directory, size)
            server.prepare()
            server.start()
            try:
                work.prefill(server)
                yield server
            finally:
                server.stop()


def snapshots(place):
    options = place.options
    with place.filled(options.size * MIB) as server:
        count = 40 if options.quick else 200
        figures = special.snapshots_under_load(server, count, options.seed)
    place.note(f"p99 of varve snapshot {figures['command_p99_ms']:.1f} ms, "
               f"of /bin/true {figures['start_p99_ms']:.1f} ms")
    return [{"name": "snapshots", "figures": figures,
             "title": "Snapshots under load (4 KiB random writes, QD 32 x 4, tmpfs)"}]


def around(place):
    options = place.options
    with place.filled(options.size * MIB, room=10) as server:
        found = curves.around_snapshots(server, 8 if options.quick else 24, 3, options.seed)
    edges = [(when, when + 0.2) for when in found["snapshots"]]
    near = [value for when, value in found["longest_ms"]
            if any(begin <= when < end for begin, end in edges)]
    # Without the load's beginning and end.
    last = found["snapshots"][-1] + 1
    far = [value for when, value in found["longest_ms"]
           if 0.5 < when < last and not any(begin <= when < end for begin, end in edges)]
    figures = {"snapshots": len(edges), "p99_in_the_second_of_a_snapshot_ms": found["p99_ms"],
               "p99_usual_ms": found["usual_p99_ms"],
               "longest_in_20_ms_near_snapshots_p50_ms": special.percentile(near, 0.5),
               "longest_in_20_ms_near_snapshots_ms": max(near),
               "longest_in_20_ms_elsewhere_p50_ms": special.percentile(far, 0.5),
               "longest_in_20_ms_elsewhere_ms": max(far)}
    return [{"name": "around", "figures": figures, "curves": found,
             "title": "A load around snapshots, one in three seconds (4 KiB random writes, QD 32 x 4, tmpfs)"}]


def restart(place):
    options, blocks = place.options, 1_000_000
    with place.directory(options.tmpfs, blocks * special.BLOCK * 5 // 4) as directory:
        figures = special.restart_after_kill(servers.Varve, directory, blocks,
                                             2 if options.quick else 7, options.seed,
                                             scattered=not options.quick)
    place.note(f"ready after {figures['ready_s']:.2f} s")
    order = "in order" if options.quick else "at random"
    return [{"name": "restart", "figures": figures,
             "title": f"Restart after kill -9, a million blocks written {order} (tmpfs)"}]


def many(place):
    options = place.options
    with place.directory(options.tmpfs, 8 * history.DISK_BYTES) as directory:
        figures, series = history.measure(servers.Varve, directory, options.snapshots,
                                          options.rounds, options.seconds,
                                          random.Random(options.seed), place.note)
    return [{"name": "many", "figures": figures, "curves": series,
             "tables": {"By number of snapshots": history.table(series)},
             "title": f"A disk with {options.snapshots:,} snapshots, against one without (tmpfs)"}]


def full_map(place):
    options, entries = place.options, []
    size = options.large_gib << 30
    for order in ("in-order", "at-random"):
        # 500 bytes a chunk, twice that while RocksDB compacts, and what is written.
        with place.directory(options.disk, size // 200 + (2 << 30)) as directory:
            figures = large.measure(servers.VarveDirect, directory, size, order, options.rounds,
                                    options.seconds, options.seed, place.note,
                                    options.large_pools)
        entries.append({"name": f"large-{order}", "figures": figures,
                        "title": f"A disk of {options.large_gib} GiB, fully mapped "
                                 f"{order.replace('-', ' ')} (the disk's file system, O_DIRECT)"})
    return entries


def deleting(place):
    options = place.options
    most = options.change_mib * MIB
    with place.directory(options.disk, 3 * most) as directory:
        found = deletion.measure(servers.VarveDirect, directory, most, options.rounds,
                                 options.seed, place.note)
    return [{"name": "deletion", "figures": deletion.figures(found), "curves": found,
             "tables": {"By amount": deletion.table(found)},
             "title": "Deleting a snapshot (the disk's file system, O_DIRECT)"}]


def nobody(place):
    options = place.options
    with place.directory(options.tmpfs, 1 << 30) as directory:
        figures = idle.measure(servers.Varve, directory, 200 if options.quick else 1000)
    place.note(f"{figures['bytes_per_disk_after_restart'] / 1024:.1f} KiB a disk, "
               f"{figures['bytes_per_silent_connection'] / 1024:.1f} KiB a connection")
    return [{"name": "idle", "figures": figures, "title": "Idle disks and connections"}]


def depths(place):
    options = place.options
    classes = [one for one in (servers.Varve, servers.Nbdkit, servers.QemuNbd)
               if not servers.available(one)]
    size = options.size * MIB
    with place.directory(options.tmpfs, (len(classes) + 1) * size) as directory:
        found = curves.by_depth(classes, directory, size, options.rounds,
                                max(1, options.seconds // 2), options.seed, place.note)
    tables = {title: curves.depth_table(found, pattern) for title, pattern in
              (("4 KiB random read", "randread"), ("4 KiB random write", "randwrite"))}
    return [{"name": "depths", "figures": {}, "curves": found, "tables": tables,
             "title": "By queue depth, one connection (tmpfs)"}]


ALL = {"snapshots": snapshots, "restart": restart, "idle": nobody, "around": around,
       "depths": depths, "many": many, "deletion": deleting, "large": full_map}
QUICK = ("snapshots", "restart", "idle")
