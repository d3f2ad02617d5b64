"""A device that fails: EIO for writes, for reads, for the metadata; and is mended again.

The kernel here has no device-mapper, so that loop devices do it: their backing file lies on a small
tmpfs. Full, it makes writes fail; cut short, it makes reads behind its end fail. Their requests are
limited to a page: of a longer one, Linux 6.18 reports success when only its beginning was written
(seen with 256 KiB in one pwrite on a full tmpfs), and against a device that lies nobody can help.
"""

import errno
import os

import nbd
from load import Ended, Load
from pool_model import BLOCK, Blocks, World, Wrong
from torturing.common import run, unmount
from torturing.full import still_right

MIB = 1 << 20


def run_scenario(bench):
    place = os.path.join(bench.work, "backing")
    os.mkdir(place)
    run("mount", "-t", "tmpfs", "-o", "size=192M", "varve-torture", place)
    bench.undo.append(lambda: unmount(place))
    writes = Writes(bench, place)
    metadata = Metadata(bench, place)
    while bench.more():
        bench.source.choice((writes.cycle, writes.cycle_of_reads, metadata.cycle))()
    writes.finish()
    metadata.finish()


def attach(image):
    """A loop device that fails honestly."""
    device = run("losetup", "--find", "--show", image)
    with open(f"/sys/block/{os.path.basename(device)}/queue/max_sectors_kb", "w") as limit:
        limit.write("4")
    return device


def fill(place):
    """Takes all the room of the tmpfs; returns the file to remove."""
    path = os.path.join(place, "ballast")
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"b" * MIB)
        except OSError:
            pass
        try:
            while True:
                file.write(b"b" * 4096)
        except OSError:
            pass
    return path


def load_until_full(server, load, place):
    """Some steps, then no room under the device, then more steps. Returns the ballast, if there."""
    ballast = None
    try:
        load.begin()
        for _ in range(5):
            load.step()
        ballast = fill(place)
        for _ in range(30):
            load.step()
    except Ended as ended:
        if not server.running():
            raise Wrong(f"the server ended: {ended}") from ended
    return ballast


class Writes:
    """A pool whose data lie on a raw loop device; the metadata are elsewhere."""

    def __init__(self, bench, place):
        self.bench, self.place = bench, place
        self.image = os.path.join(place, "device")
        with open(self.image, "wb") as file:
            file.truncate(1 << 30)
        self.device = attach(self.image)
        bench.undo.append(lambda: run("losetup", "--detach", self.device))
        pool = os.path.join(bench.work, "pool-on-device")
        self.server = bench.server(pool, "--data", self.device)
        self.candidates, self.legal = [World()], Blocks.after_crash

    def cycle(self):
        """Data writes fail, then succeed again, without a restart."""
        bench, server = self.bench, self.server
        server.must_start()
        world = bench.verify(server, self.candidates, self.legal)
        load = Load(server, world, bench.source, may_fail=(errno.EIO, errno.ENOSPC))
        ballast = load_until_full(server, load, self.place)
        failure = still_right(bench, server, load)
        load.end()
        if ballast:
            os.remove(ballast)
        if failure:
            bench.terminate(server, failed=True)
        else:
            mended = bench.load(server, load.world, 10)
            server.kill9()
        bench.count_load(load)
        self.candidates = (load if failure else mended).candidates()
        self.legal = Blocks.after_crash
        bench.say(f"data writes: {load.failed} failed; pool {'failed' if failure else 'went on'}")

    def cycle_of_reads(self):
        """Reads behind a cut fail with EIO, all others are right; then all are, again."""
        bench, server = self.bench, self.server
        server.must_start()
        world = bench.verify(server, self.candidates, self.legal)
        world = bench.load(server, world, 10).world
        used = os.stat(self.image).st_blocks * 512
        cut = bench.source.randrange(min(used, 48 * MIB)) // BLOCK * BLOCK
        rest = os.path.join(bench.work, "rest")
        run("cp", "--sparse=always", self.image, rest)
        os.truncate(self.image, cut)
        failed = read_around(server, world, bench)
        with open(rest, "rb") as source, open(self.image, "r+b") as target:
            source.seek(cut)
            target.seek(cut)
            while chunk := source.read(MIB):
                if chunk.strip(b"\0"):
                    target.write(chunk)
                else:
                    target.seek(len(chunk), os.SEEK_CUR)
            target.truncate(1 << 30)
        os.remove(rest)
        admin = server.admin()
        world.verify(server, admin, Blocks.now)
        admin.close()
        server.kill9()
        self.candidates, self.legal = [world], Blocks.after_crash
        bench.count("reads refused", failed)
        bench.say(f"data reads: {failed} blocks failed behind a cut at {cut}")

    def finish(self):
        self.server.must_start()
        self.bench.verify(self.server, self.candidates, self.legal)
        self.bench.terminate(self.server, failed=False)
        self.bench.verify_offline(self.server)


def read_around(server, world, bench):
    """Each block reads right or gives EIO. Returns how many gave EIO."""
    failed = 0
    for name, disk in world.disks.items():
        client = nbd.Client(server.nbd, name)
        for block in range(len(disk.blocks.settled)):
            client.send(nbd.READ, block * BLOCK, BLOCK)
            _, error, data = client.receive()
            if error == errno.EIO:
                failed += 1
            elif error:
                raise Wrong(f"{name}: a read was answered with error {error}")
            else:
                found = int.from_bytes(data[:8], "little")
                if data != data[:8] * (BLOCK // 8) or found not in disk.blocks.now(block):
                    raise Wrong(f"{name}: block {block} holds {found} while the device fails")
        client.close()
    return failed


class Metadata:
    """A pool on a file system whose device fails under all of it."""

    def __init__(self, bench, place):
        self.bench, self.place = bench, place
        self.image = os.path.join(place, "fs")
        with open(self.image, "wb") as file:
            file.truncate(512 * MIB)
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1", self.image)
        self.mounted = os.path.join(bench.work, "fs")
        os.mkdir(self.mounted)
        self.device = attach(self.image)
        bench.undo.append(lambda: run("losetup", "--detach", self.device))
        run("mount", self.device, self.mounted)
        bench.undo.append(lambda: unmount(self.mounted))
        self.server = bench.server(os.path.join(self.mounted, "pool"))
        self.candidates = [World()]

    def cycle(self):
        bench, server = self.bench, self.server
        server.must_start()
        world = bench.verify(server, self.candidates)
        # EPERM: ext4 has gone read-only.
        may_fail = (errno.EIO, errno.ENOSPC, errno.EPERM)
        load = Load(server, world, bench.source, may_fail=may_fail)
        ballast = load_until_full(server, load, self.place)
        status = server.call("pool.status")
        if bench.source.random() < 0.5:
            server.kill9()
        else:
            bench.terminate(server, failed=status.get("failed"))
        load.end()
        if ballast:
            os.remove(ballast)
        unmount(self.mounted)
        run("mount", self.device, self.mounted)
        bench.count_load(load)
        self.candidates = load.candidates()
        bench.say(f"file system: {load.failed} requests failed; commands refused: "
                  f"{', '.join(load.refusals) or 'none'}; pool "
                  f"{'failed' if status.get('failed') else 'went on'}")  # fmt: skip

    def finish(self):
        self.server.must_start()
        self.bench.verify(self.server, self.candidates)
        self.bench.terminate(self.server, failed=False)
        self.bench.verify_offline(self.server)
