"""Changed bytes in the superblock, in RocksDB's files, in the data file.

What cannot be served is refused, at the start or by EIO, with a reason; what is served is right. Every
second cycle flips one bit, and goes through all files of metadata and evenly through each. Known and
counted: blocks of data carry no checksums, so that changed ones are served as they are read. Logs are
not cut short: whole records missing at their end cannot be told from a crash.
"""

import errno
import os
import shutil

import nbd
from pool_model import BLOCK, Blocks, World, Wrong
from server import Refused
from torturing.common import run

CLEAR_STATUS = (1, 2, 3, 4, 5, 8)


def run_scenario(bench):
    pool, kept = os.path.join(bench.work, "pool"), os.path.join(bench.work, "kept")
    server = bench.server(pool)
    world = grow_pool(bench, server, kept)
    flips = flip_everywhere(bench.source, pool)
    while bench.more():
        shutil.rmtree(pool)
        run("cp", "-r", "--sparse=always", kept, pool)
        if bench.cycle % 2:
            kind, what = next(flips)
            changed = False
        else:
            kind, (what, changed) = "", change(bench, pool)
        outcome = look(server, world.copy(), changed)
        bench.count(f"{kind}{outcome.split(':')[0]}")
        bench.say(f"{what}: {outcome}")


def flip_everywhere(source, pool):
    """Flips a bit of one file after the other, at places that cover each evenly however long it goes
    on. The pool is a copy of the same one each time. Yields what it flipped."""
    meta = os.path.join(pool, "meta")
    places = [(os.path.join(pool, "lock"), None), (os.path.join(pool, "data"), BLOCK)]
    places += [(os.path.join(meta, name), None) for name in sorted(os.listdir(meta))]
    start, turn = source.random(), 0
    while True:
        for path, length in places:
            length = length or os.path.getsize(path)
            if not length:
                continue
            offset = int((start + turn * 0.6180339887) % 1 * length)
            bit = source.randrange(8)
            with open(path, "r+b") as file:
                file.seek(offset)
                byte = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([byte ^ 1 << bit]))
            name = os.path.basename(path)
            kind = os.path.splitext(name)[1].lstrip(".") or name.split("-")[0]
            kind = "superblock" if name == "data" else kind
            yield f"bit in {kind}: ", f"{name}, bit {bit} of byte {offset} of {length}"
        turn += 1


def grow_pool(bench, server, kept):
    """A pool with a history, some of it in tables and some in the log: a copy in `kept`."""
    world = World()
    for life in range(4):
        server.must_start()
        world = bench.verify(server, [world], Blocks.now)
        bench.load(server, world, 60)
        for name in world.disks:
            client = nbd.Client(server.nbd, name)
            client.flush()
            client.close()
        # The last record of the log may be lost: let it be one that nobody misses.
        last = f"last{life}"
        world.others.add(last)
        server.call("disk.create", name=last, size=BLOCK)
        server.kill9()
    shutil.copytree(server.pool, kept)
    server.must_start()
    world = bench.verify(server, [world], Blocks.now)
    bench.terminate(server, failed=False)
    return world


def change(bench, pool):
    """Changes some bytes of one file. Returns what it says of that, and whether it was data."""
    source, meta = bench.source, os.path.join(pool, "meta")
    kinds = {"log": ".log", "table": ".sst", "manifest": "MANIFEST", "CURRENT": "CURRENT",
             "options": "OPTIONS"}  # fmt: skip
    kind = source.choice(("superblock", "data") + ("log", "table", "manifest") * 2
                         + ("CURRENT", "options"))  # fmt: skip
    if kind in ("superblock", "data"):
        path = os.path.join(pool, "data")
    else:
        names = [name for name in sorted(os.listdir(meta)) if kinds[kind] in name
                 and os.path.getsize(os.path.join(meta, name))]  # fmt: skip
        if not names:
            kind, path = "data", os.path.join(pool, "data")
        else:
            path = os.path.join(meta, source.choice(names))
    size = os.path.getsize(path)
    low, high = {"superblock": (0, BLOCK), "data": (BLOCK, size)}.get(kind, (0, size))
    if source.random() < 0.15 and kind not in ("superblock", "log"):
        length = source.randrange(size)
        os.truncate(path, length)
        return f"{kind} cut to {length} of {size} bytes", False
    length = min(source.choice((1, 1, 4, 512, 4096)), high - low)
    offset = source.randrange(low, high - length + 1)
    with open(path, "r+b") as file:
        file.seek(offset)
        before = file.read(length)
        after = bytes(byte ^ source.randrange(1, 256) for byte in before)
        file.seek(offset)
        file.write(after)
    return f"{kind}, {length} bytes at {offset} of {size}", kind == "data"


def look(server, world, data_changed):
    """What the server makes of it."""
    offline, report = server.check_offline()
    if offline not in (0, *CLEAR_STATUS) or (offline and not report.strip()):
        raise Wrong(f"varve check --pool: exit status {offline}: {report}")
    status, said = server.start()
    if status is not None:
        if status not in CLEAR_STATUS or len(said.strip().splitlines()) != 1:
            raise Wrong(f"exit status {status}: {said}")
        return f"refused at the start: {said.strip()[:120]}"
    try:
        wrong, refused = compare(server, world)
    finally:
        server.kill9()
    if data_changed and len(set(wrong.values())) <= 2:  # the changed bytes lie in two blocks at most
        return f"changed data served as read (known limit): {len(wrong)} places"
    if wrong:
        raise Wrong(f"served wrong without a word: {list(wrong)[:5]}; offline check {offline}")
    if refused:
        return f"refused while serving: {refused}"
    return f"served right: offline check {offline}"


def compare(server, world):
    """What is served wrong (with the content that it should be), and how many requests were
    refused."""
    wrong, refused = {}, 0
    admin = server.admin()
    served = {disk["name"] for disk in admin.call("disk.list")["disks"]}
    wrong.update({f"disk {name} is not there": name for name in world.disks if name not in served})
    for name, disk in world.disks.items():
        exports = [(name, disk.blocks.settled)] if name in served else []
        exports += [(f"{name}@{s}", snapshot.numbers) for s, snapshot in disk.snapshots.items()]
        for export, numbers in exports:
            try:
                client = nbd.Client(server.nbd, export)
            except OSError as error:
                wrong[str(error)] = export
                continue
            for block, number in enumerate(numbers):
                client.send(nbd.READ, block * BLOCK, BLOCK)
                _, error, data = client.receive()
                if error == errno.EIO:
                    refused += 1
                elif error or data != number.to_bytes(8, "little") * (BLOCK // 8):
                    wrong[f"{export} block {block}: error {error}, {data[:8].hex()}"] = number
            client.close()
    try:
        report = admin.call("pool.check")
        refused += not report["ok"]
    except Refused:
        refused += 1
    admin.close()
    return wrong, refused
