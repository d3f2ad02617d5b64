"""A small file system that fills up, from the pool itself or from outside, and has room again.

Once ext4, once XFS; the whole pool lies on it, so that the metadata meet the full disk as well.
"""

import errno
import os
import time

import nbd
from load import Ended, Load
from pool_model import Blocks, World, Wrong
from server import eventually
from torturing.common import run, unmount

MIB = 1 << 20
KINDS = ("ext4", "xfs")


def run_one(bench, kind):
    place = mount(bench, kind)
    server = bench.server(os.path.join(place, "pool"), "--cache",
                          bench.source.choice(("direct", "buffered")))  # fmt: skip
    candidates, legal = [World()], Blocks.after_crash
    while bench.more():
        start(bench, server, place)
        world = bench.verify(server, candidates, legal)
        load = Load(server, world, bench.source, may_fail=(errno.ENOSPC, errno.EIO))
        how = bench.source.choice(("from outside, to the last byte", "from outside, almost",
                                   "by the pool"))  # fmt: skip
        try:
            load.begin()
            fill(bench, place, load, how)
        except Ended as ended:
            if not server.running():
                raise Wrong(f"the server ended: {ended}") from ended
        failure = still_right(bench, server, load)
        load.end()
        # Room again, sometimes only while the server is down.
        if not failure and (how == "by the pool" or bench.source.random() < 0.5):
            free(place)
            goes_on(bench, server, load)
        if bench.source.random() < 0.5:
            server.kill9()
        else:
            bench.terminate(server, failed=failure)
        bench.count_load(load)
        candidates, legal = load.candidates(), Blocks.after_crash
        bench.say(f"{kind} full {how}; {load.failed} requests refused, commands refused: "
                  f"{', '.join(load.refusals) or 'none'}; pool {'failed' if failure else 'went on'}")  # fmt: skip
    start(bench, server, place)
    bench.verify(server, candidates, legal)
    status, _ = server.stop()
    if status != 0:
        raise Wrong(f"exit status {status} after SIGTERM")
    bench.verify_offline(server)


def run_scenario(bench):
    for kind in bench.parts(KINDS):
        run_one(bench, kind)


def mount(bench, kind):
    """A new file system in a file."""
    image, place = os.path.join(bench.work, kind), os.path.join(bench.work, f"on-{kind}")
    with open(image, "wb") as file:
        file.truncate((320 if kind == "xfs" else 128) * MIB)
    run("mkfs." + kind, "-q", image)
    os.mkdir(place)
    run("mount", "-o", "loop", image, place)
    bench.undo.append(lambda: unmount(place))
    return place


def ballast(place):
    return os.path.join(place, "ballast")


def free(place):
    if os.path.exists(ballast(place)):
        os.remove(ballast(place))


def start(bench, server, place):
    """On a disk that may be full: it starts, or says clearly why not and starts once there is
    room."""
    status, said = server.start()
    if status is None:
        free(place)
        return
    if status not in (1, 6) or len(said.strip().splitlines()) != 1:
        raise Wrong(f"on a full disk: exit status {status}, {said}")
    bench.count("starts refused on the full disk")
    bench.say(said.strip()[:200])
    free(place)
    server.must_start()


def fill(bench, place, load, how):
    """Load until something was refused, and a while longer."""
    if how == "by the pool":
        fill_from_inside(load.server, load.world)
    else:
        file = os.open(ballast(place), os.O_CREAT | os.O_WRONLY, 0o600)
        leave = 0 if "last byte" in how else bench.source.randrange(1, 16) * MIB
        try:
            system = os.fstatvfs(file)
            length = system.f_bavail * system.f_frsize - leave
            if length > 0:
                try:
                    os.posix_fallocate(file, 0, length)
                except OSError:
                    pass  # it took what there was
            if not leave:
                while True:
                    os.write(file, b"b" * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(file)
    end = time.monotonic() + 3
    while not load.failed and not load.refusals and time.monotonic() < end:
        load.step()
    for _ in range(20):
        load.step()


def fill_from_inside(server, world):
    """A disk that nobody looks at takes all the room there is."""
    world.others.add("filler")
    server.call("disk.create", name="filler", size=1 << 30)
    client = nbd.Client(server.nbd, "filler")
    try:
        for megabyte in range(1024):
            client.write(megabyte * MIB, bytes([megabyte % 255 + 1]) * MIB)
        raise Wrong("a gigabyte fitted")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise Wrong(f"a write in the full pool was answered with {error}") from error
    finally:
        client.close()


def still_right(bench, server, load):
    """In the full pool everything reads right; a failed pool says so. Returns why it failed."""
    admin = server.admin()
    status = admin.call("pool.status")
    failure = status.get("failure") if status.get("failed") else None
    admin.close()
    if load.command and not failure:
        raise Wrong(f"a command failed ({load.refusals}), but the pool's status says nothing")
    def legal(blocks, block):  # a failed pool: what was answered since may be there, or not
        return blocks.now(block) + blocks.after_crash(block)

    worlds = [world.copy() for world in load.candidates()]
    bench.verify(server, worlds, legal if failure else Blocks.now, failed=bool(failure))
    if failure:
        bench.count("pools that failed")
    else:
        bench.count("pools that went on")
    return failure


def goes_on(bench, server, load):
    """With room again and without a restart, writes and commands work."""
    if load.world.others:
        server.call("disk.delete", name="filler", snapshots=True, disconnect=True)
        load.world.others.clear()
    eventually("there is room", lambda: server.call("pool.status")["free"] > 8 * MIB)
    bench.load(server, load.world, 10)
    bench.count("went on without a restart")
