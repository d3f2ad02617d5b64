"""A random life of a pool under a model: writes on all disks at once, with commands in between.

Not a verdict about crashes: scripts/torture causes those and asks the model afterwards.
"""

import errno

import nbd
from pool_model import BLOCK, Wrong, content
from server import Dead, Refused

SIZES = (256, 512, 1024)  # blocks
DISKS_MAX, SNAPSHOTS_MAX = 5, 6
STOPPING = "the server is stopping"
CLEAR = ("no_space", "limit", "busy")  # kinds of a refusal that leaves no doubt


class Ended(Exception):
    """The server has gone, or its pool refuses changes from now on."""


def adopt(world, planned, method, p):
    """The effect of a command on `world`. `planned` is the world when it was sent, and the command's
    effect on that: what counts for a snapshot is what was answered before."""
    disks, disk = world.disks, None
    if method == "snapshot.create":
        for full in p["snapshots"]:
            disk, _, name = full.partition("@")
            disks[disk].snapshots[name] = planned.disks[disk].snapshots[name]
    elif method == "snapshot.restore":
        disk = p["snapshot"].partition("@")[0]
        disks[disk] = planned.disks[disk]
    else:
        world.apply(method, p)


def outcomes(world, planned, command):
    """The worlds that may be left when the server goes: a command under way is done or not."""
    worlds = [world]
    if command:
        done = world.copy()
        adopt(done, planned, *command)
        worlds.append(done)
    return worlds


class Load:
    """One life of a server: from attaching until it goes."""

    def __init__(self, server, world, source, may_fail=(), stops=False):
        self.server, self.world, self.source = server, world, source
        self.may_fail = may_fail  # errno values that requests may be answered with
        self.stops = stops  # the server gets SIGTERM meanwhile, and refuses commands from then on
        self.clients = {}
        self.command = None  # under way: (method, parameters); afterwards: done or not
        self.planned = None
        self.commands = self.requests = self.failed = 0
        self.refusals = {}  # kind -> a message
        self.admin = None

    def begin(self):
        try:
            self.admin = self.server.admin()
            while len(self.world.disks) < 2:
                self.run("disk.create", name=self.fresh("disk", self.world.disks),
                         size=self.source.choice(SIZES) * BLOCK)  # fmt: skip
        except (Dead, nbd.Gone) as error:
            raise self.gone(error) from error

    def gone(self, error):
        """Only a dead server may close connections."""
        try:
            self.server.process.wait(10)
        except Exception as alive:
            raise Wrong(f"the server runs, but: {error}; command {self.command}") from alive
        return Ended(str(error))

    def candidates(self):
        """The worlds that may be left once the server has gone."""
        return outcomes(self.world, self.planned, self.command)

    def moment(self):
        """Now, for those who keep a history."""

    def note(self, moment=None):
        """For those who keep a history: from `moment` (None: now) on the model is as it is now.
        Called before anything is sent, and when something was promised."""

    def step(self):
        """A batch of writes on every disk, a command beside it, sometimes a flush."""
        try:
            self._attach()
            drawn = {name: self._draw_batch(name) for name in self.clients}
            self.note()
            pending = {name: self._send_batch(name, batch) for name, batch in drawn.items()}
            fenced = self._send_command() if self.source.random() < 0.5 else None
            for name, batch in pending.items():
                self._collect(name, batch, name == fenced)
            self._finish_command()
            if self.source.random() < 0.3:
                self._flush()
        except (Dead, nbd.Gone) as error:
            raise self.gone(error) from error

    def end(self):
        for client in self.clients.values():
            client.close()
        if self.admin:
            self.admin.close()

    # ---- requests

    def _attach(self):
        for name in self.world.disks:
            if name not in self.clients:
                self.clients[name] = nbd.Client(self.server.nbd, name)

    def _draw_batch(self, name):
        """Requests for blocks that are all different. The model counts them as sent."""
        source, blocks = self.source, self.world.disks[name].blocks
        batch, taken, size = [], set(), len(blocks.settled)
        for _ in range(source.randrange(16)):
            count = source.choice((1, 1, 1, 2, 5, 16, 64))
            first = source.randrange(size - count)
            if not taken.isdisjoint(range(first, first + count)):
                continue
            taken.update(range(first, first + count))
            kind = source.choice((nbd.WRITE,) * 8 + (nbd.TRIM, nbd.WRITE_ZEROES))
            flags = nbd.FUA if source.random() < 0.1 else 0
            number = self.world.number() if kind == nbd.WRITE else 0
            blocks.started(first, count, number)
            batch.append((kind, flags, first, count, number))
        return batch

    def _send_batch(self, name, drawn):
        batch = {}
        for kind, flags, first, count, number in drawn:
            data = content(number) * count if kind == nbd.WRITE else b""
            try:
                cookie = self.clients[name].send(kind, first * BLOCK, count * BLOCK, data, flags)
            except nbd.Gone:
                break  # the replies say so too
            batch[cookie] = (first, count, number, bool(flags))
        return batch

    def _collect(self, name, batch, fenced):
        blocks = self.world.disks[name].blocks
        try:
            for _ in range(len(batch)):
                cookie, error, _ = self.clients[name].receive()
                self.requests += 1
                if not error:
                    blocks.answered(*batch[cookie])
                    if batch[cookie][3]:
                        self.note()
                elif error in self.may_fail:
                    self.failed += 1
                elif not (fenced and error == errno.ESHUTDOWN):
                    raise Wrong(f"{name}: a write was answered with error {error}")
        except nbd.Gone:
            if not fenced:
                raise

    def _flush(self):
        name = self.source.choice(list(self.clients))
        try:
            self.clients[name].flush()
            self.world.disks[name].blocks.flushed()
            self.note()
        except OSError as error:
            if error.errno not in self.may_fail:
                raise Wrong(f"{name}: a flush was answered with {error}") from error
            self.failed += 1
            if error.errno == errno.EIO:
                raise Ended(str(error)) from error

    # ---- commands

    def run(self, method, **parameters):
        """A command from its sending to its effect on the model."""
        self._send(method, parameters)
        self._finish_command()

    def _send(self, method, parameters):
        # The model as it is now: what was answered before is in, what is under way may be.
        self.command = (method, parameters)
        self.planned = self.world.copy()
        self.planned.apply(method, parameters)
        self.note()
        self.admin.send(method, **parameters)

    def _finish_command(self):
        if not self.command:
            return
        method, parameters = self.command
        try:
            self.admin.receive()
        except Refused as refused:
            self.refusals[refused.kind] = str(refused)
            if self.stops and STOPPING in str(refused):
                if refused.kind == "busy":  # so it is not done
                    self.command = None
                raise self.gone(refused) from refused
            if not self.may_fail:
                raise Wrong(f"{method} {parameters} was refused: {refused}") from refused
            failed = self.admin.call("pool.status").get("failed")
            if failed or refused.kind not in CLEAR:  # nobody knows whether it is durable
                raise Ended(str(refused)) from refused
            self.command = None
            return
        moment = self.moment()
        self.commands += 1
        self.command = None
        adopt(self.world, self.planned, method, parameters)
        if method == "snapshot.create":
            self._settle_snapshots(parameters["snapshots"])
        self.note(moment)
        stale = parameters.get("name") if method != "disk.clone" else None
        if method == "snapshot.restore":
            stale = parameters["snapshot"].partition("@")[0]
        if stale in self.clients:
            self.clients.pop(stale).close()

    def _settle_snapshots(self, names):
        """What a snapshot holds is durable, in the disk too."""
        for full in names:
            disk, _, name = full.partition("@")
            snapshot = self.world.disks[disk].snapshots[name]
            self._verify_snapshot(full, snapshot)
            blocks = self.world.disks[disk].blocks
            for block in list(blocks.sent):
                if block >= snapshot.count:
                    continue
                held = [number for number, _ in blocks.sent[block]]
                number = snapshot.numbers[block]
                if held.count(number) == 1 and number != blocks.settled[block]:
                    blocks.settle(block, held.index(number))

    def _verify_snapshot(self, full, snapshot):
        """It is durable, and closed until a restart if the pool has failed."""
        try:
            self.world.verify_snapshot(self.server, full, snapshot)
        except OSError as error:
            if not self.may_fail or not self.admin.call("pool.status").get("failed"):
                raise
            raise Ended(str(error)) from error

    def fresh(self, prefix, taken):
        while True:
            name = f"{prefix}{self.source.randrange(10**6)}"
            if name not in taken:
                return name

    def _send_command(self):
        """Returns the name of the disk whose clients it fences, if any."""
        source, disks = self.source, self.world.disks
        disk = source.choice(list(disks))
        snapshots = disks[disk].snapshots
        full = f"{disk}@{source.choice(list(snapshots))}" if snapshots else None
        known = full and snapshots[full.partition("@")[2]].numbers is not None
        what = source.choice(("cut", "cut", "cut", "delete", "restore", "clone", "rename", "move",
                              "resize", "create", "drop"))  # fmt: skip
        if what == "cut" or not full:
            chosen = source.sample(list(disks), source.randrange(1, len(disks) + 1))
            chosen = [d for d in chosen if len(disks[d].snapshots) < SNAPSHOTS_MAX]
            if chosen:
                names = [f"{d}@{self.fresh('s', disks[d].snapshots)}" for d in chosen]
                self._send("snapshot.create", {"snapshots": names})
                return None
        if what in ("cut", "delete") and full:
            self._send("snapshot.delete", {"snapshot": full, "disconnect": True})
        elif what == "restore" and known:
            parameters = {"snapshot": full, "disconnect": True}
            if len(snapshots) < SNAPSHOTS_MAX and source.random() < 0.5:
                parameters["keep_as"] = self.fresh("k", snapshots)
            parameters["online"] = True  # its clients come back
            self._send("snapshot.restore", parameters)
            return disk
        elif what == "clone" and known and len(disks) < DISKS_MAX:
            self._send("disk.clone", {"snapshot": full, "name": self.fresh("clone", disks)})
        elif what == "rename" and full:
            self._send("snapshot.rename", {"snapshot": full, "to": self.fresh("r", snapshots)})
        elif what == "move":
            self._send("disk.rename", {"name": disk, "to": self.fresh("moved", disks)})
        elif what == "resize":
            size = source.choice(SIZES) * BLOCK
            self._send("disk.resize", {"name": disk, "size": size, "shrink": True,
                                       "disconnect": True})  # fmt: skip
            return disk
        elif what == "create" and len(disks) < DISKS_MAX:
            self._send("disk.create", {"name": self.fresh("disk", disks),
                                       "size": source.choice(SIZES) * BLOCK})  # fmt: skip
        elif what == "drop" and len(disks) > 2:
            self._send("disk.delete", {"name": disk, "snapshots": True, "disconnect": True})
            return disk
        return None
