"""The log of a block device, as the kernel's dm-log-writes and QEMU's blklogwrites write it, and
what the device may hold if the power fails at some point of it.

Format: a superblock in the first log sector (magic, version, number of entries, bytes of a log
sector), then entries: a header of one log sector (sector, sectors, flags, bytes of data), then what
was written. Numbers are little-endian; `sector` and `sectors` count 512 bytes.
"""

import collections
import os
import struct

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SECTOR = 512
_MAGIC, _VERSION = 0x6A736677736872, 1

# `at`: of the data in the log; `end`: of the entry in the log; both in bytes.
Entry = collections.namedtuple("Entry", "sector sectors flags at end")


def read_entries(path):
    """All entries of a log whose writer has ended, in order."""
    entries, size = [], os.path.getsize(path)
    with open(path, "rb") as log:
        magic, version, _, step = struct.unpack("<QQQI", log.read(28))
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError(f"{path} is no log of writes")
        place = step
        while place + step <= size:
            log.seek(place)
            sector, sectors, flags, _ = struct.unpack("<QQQQ", log.read(32))
            at = place + step
            place = at + (0 if flags & DISCARD else sectors * SECTOR)
            entries.append(Entry(sector, sectors, flags, at, place))
    return entries


def last_flush(entries, cut):
    """How many of the first `cut` entries a completed flush has made durable."""
    return next((i + 1 for i in range(cut - 1, -1, -1) if entries[i].flags & FLUSH), 0)


def draw_remains(entries, cut, how, source):
    """What is left of the first `cut` entries when the power fails: (entry, sectors of it). All up to
    the last flush, and of the rest: all ("in order"), any of them ("dropped"), or any of them and of
    some only the first sectors ("torn")."""
    durable = last_flush(entries, cut)
    remains = [(entry, entry.sectors) for entry in entries[:durable]]
    keep = source.choice((0.1, 0.5, 0.9))
    for entry in entries[durable:cut]:
        sectors = entry.sectors
        if how != "in order" and source.random() > keep:
            continue
        if how == "torn" and sectors and source.random() < 0.5:
            sectors = source.randrange(sectors)
        remains.append((entry, sectors))
    return remains


def replay(log_path, remains, image):
    """Writes what is left onto the file `image`, which is as the device was at first."""
    with open(log_path, "rb") as log, open(image, "r+b") as device:
        for entry, sectors in remains:
            if not sectors or entry.flags & DISCARD:
                continue  # discarded blocks may keep what they hold
            log.seek(entry.at)
            device.seek(entry.sector * SECTOR)
            device.write(log.read(sectors * SECTOR))
