"""What a pool may hold: a model of disks and snapshots that knows, for each block, which contents
are legal now, after a crash, and in a snapshot; and the comparison with what a server serves.

Not a client of its own choices: scripts/torture decides what happens and tells the model.
"""

import copy
import hashlib
import struct

import nbd

BLOCK, SECTOR = 4096, 512


def content(number):
    """Block content number `number`; number 0 is zeros."""
    return struct.pack("<Q", number) * (BLOCK // 8)


class Blocks:
    """The contents that each block of a disk may have. Values are content numbers."""

    def __init__(self, count):
        self.settled = [0] * count  # survives a crash
        self.sent = {}  # block -> [content, answered] of each write since, in order

    def started(self, first, count, number):
        for block in range(first, first + count):
            self.sent.setdefault(block, []).append([number, False])

    def answered(self, first, count, number, durable):
        """Without an error. What failed stays as it is: it may have happened or not."""
        for block in range(first, first + count):
            writes = self.sent[block]
            at = next(i for i in range(len(writes) - 1, -1, -1) if writes[i][0] == number)
            writes[at][1] = True
            if durable:
                self.settle(block, at)

    def flushed(self):
        """A FLUSH was answered that was sent when nothing else was under way."""
        for block in list(self.sent):
            at = self._last_answered(block)
            if at is not None:
                self.settle(block, at)

    def _last_answered(self, block):
        writes = self.sent[block]
        return next((i for i in range(len(writes) - 1, -1, -1) if writes[i][1]), None)

    def settle(self, block, at):
        self.settled[block] = self.sent[block][at][0]
        del self.sent[block][: at + 1]
        if not self.sent[block]:
            del self.sent[block]

    def now(self, block):
        """What a read may find, and a snapshot that is taken now."""
        if block not in self.sent:
            return [self.settled[block]]
        at = self._last_answered(block)
        if at is None:
            return [self.settled[block]] + [number for number, _ in self.sent[block]]
        return [number for number, _ in self.sent[block][at:]]

    def after_kill(self, block):
        """The process was killed, the machine goes on: what was answered last, or sent since. What
        was answered and not heard is among the latter."""
        return self.now(block)

    def after_crash(self, block):
        """The power failed: what was flushed last, or sent since."""
        return [self.settled[block]] + [number for number, _ in self.sent.get(block, [])]

    def found(self, numbers):
        """This is what a crash or a restart left."""
        self.settled, self.sent = numbers, {}

    def resize(self, count):
        self.settled = self.settled[:count] + [0] * (count - len(self.settled))
        self.sent = {block: writes for block, writes in self.sent.items() if block < count}


class Snapshot:
    """Legal contents until it is read for the first time; one content from then on."""

    def __init__(self, blocks):
        self.count = len(blocks.settled)
        self.allowed = [blocks.now(block) for block in range(self.count)]
        self.numbers = None
        self.digest = None


class Disk:
    def __init__(self, count):
        self.blocks = Blocks(count)
        self.snapshots = {}  # name -> Snapshot


class Wrong(Exception):
    """What is served is not legal."""


class World:
    """A pool: disks by name. `apply` is what a command does once it is answered."""

    def __init__(self):
        self.disks = {}
        self.next = 1
        self.others = set()  # disks that are no matter of the model's

    def number(self):
        self.next += 1
        return self.next - 1

    def copy(self):
        return copy.deepcopy(self)

    def apply(self, method, p):
        disk, _, name = p.get("snapshot", "").partition("@")
        if method == "disk.create":
            self.disks[p["name"]] = Disk(p["size"] // BLOCK)
        elif method == "disk.delete":
            del self.disks[p["name"]]
        elif method == "disk.rename":
            self.disks[p["to"]] = self.disks.pop(p["name"])
        elif method == "disk.resize":
            self.disks[p["name"]].blocks.resize(p["size"] // BLOCK)
        elif method == "disk.clone":
            self.disks[p["name"]] = self._state_of(self.disks[disk].snapshots[name])
        elif method == "snapshot.create":
            for full in p["snapshots"]:
                disk, _, name = full.partition("@")
                self.disks[disk].snapshots[name] = Snapshot(self.disks[disk].blocks)
        elif method == "snapshot.delete":
            del self.disks[disk].snapshots[name]
        elif method == "snapshot.rename":
            snapshots = self.disks[disk].snapshots
            snapshots[p["to"]] = snapshots.pop(name)
        elif method == "snapshot.restore":
            if p.get("keep_as"):
                kept = Snapshot(self.disks[disk].blocks)
                self.disks[disk].snapshots[p["keep_as"]] = kept
            state = self._state_of(self.disks[disk].snapshots[name])
            self.disks[disk].blocks = state.blocks
        else:
            raise ValueError(method)

    @staticmethod
    def _state_of(snapshot):
        disk = Disk(snapshot.count)
        if snapshot.numbers is None:
            raise ValueError("read the snapshot first")
        disk.blocks.settled = list(snapshot.numbers)
        return disk

    # ---- comparison with a server

    def verify(self, server, admin, legal, failed=False, torn=None):
        """Everything: names, sizes and contents. `legal`: Blocks.now, Blocks.after_kill or
        Blocks.after_crash. What is found becomes what is expected. `failed`: the pool has failed,
        so that it may refuse to open snapshots. `torn`: a list, if the power failed: each sector of a disk is legal by itself; the
        blocks that hold several contents are appended. Raises Wrong. Returns how many blocks were
        compared."""
        self.verify_names(admin)
        compared = 0
        for name, disk in self.disks.items():
            blocks = disk.blocks
            allowed = [legal(blocks, block) for block in range(len(blocks.settled))]
            data = nbd.read_all(server.nbd, name)
            blocks.found(numbers_of(name, data, allowed, torn))
            compared += len(allowed)
            for snapshot_name, snapshot in disk.snapshots.items():
                try:
                    self.verify_snapshot(server, f"{name}@{snapshot_name}", snapshot)
                except OSError as error:
                    if not failed or "cannot open" not in str(error):
                        raise
                    continue
                compared += snapshot.count
        return compared

    def verify_names(self, admin):
        listed = admin.call("disk.list")["disks"]
        served = {d["name"]: d["size"] for d in listed if d["name"] not in self.others}
        expected = {name: len(disk.blocks.settled) * BLOCK for name, disk in self.disks.items()}
        if served != expected:
            raise Wrong(f"disks are {served}, not {expected}")
        for name, disk in self.disks.items():
            listed = admin.call("snapshot.list", disk=name)["snapshots"]
            served = {snapshot["name"]: snapshot["size"] for snapshot in listed}
            expected = {n: snapshot.count * BLOCK for n, snapshot in disk.snapshots.items()}
            if served != expected:
                raise Wrong(f"snapshots of {name} are {served}, not {expected}")

    @staticmethod
    def verify_snapshot(server, export, snapshot):
        data = nbd.read_all(server.nbd, export)
        digest = hashlib.sha1(data).digest()
        if snapshot.digest is None:
            snapshot.numbers = numbers_of(export, data, snapshot.allowed)
            snapshot.digest, snapshot.allowed = digest, None
        elif digest != snapshot.digest:
            numbers_of(export, data, [[number] for number in snapshot.numbers])
            raise Wrong(f"{export} has changed")


def numbers_of(export, data, allowed, torn=None):
    """The content number of each block of `data`. Raises Wrong if one is not among `allowed`, or if
    a block holds several; with a list `torn` that is appended to it, if each sector is legal."""
    if len(data) != len(allowed) * BLOCK:
        raise Wrong(f"{export} has {len(data)} bytes, not {len(allowed) * BLOCK}")
    numbers = []
    for block, legal in enumerate(allowed):
        at = data[block * BLOCK : (block + 1) * BLOCK]
        number = struct.unpack_from("<Q", at)[0]
        if at != content(number):
            if torn is None or not sectors_are_legal(at, legal):
                raise Wrong(f"{export}: block {block} holds parts of several contents, one is "
                            f"{number}; legal are {legal}")  # fmt: skip
            torn.append((export, block))
        if number not in legal:
            raise Wrong(f"{export}: block {block} holds {number}; legal are {legal}")
        numbers.append(number)
    return numbers


def sectors_are_legal(data, legal):
    sectors = {data[at : at + SECTOR] for at in range(0, BLOCK, SECTOR)}
    return sectors <= {content(number)[:SECTOR] for number in legal}
