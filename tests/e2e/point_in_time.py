#!/usr/bin/env python3
"""Proves that snapshots are points in time, of one disk or of several in one cut.

A writer puts a counter into one block after the other, round after round, over all disks in turn,
each write sent after the last was answered. Meanwhile snapshots are taken. In each of them all
blocks up to some place must be of one round and the rest of the round before; and that place must
lie between what had been answered when the command started and what had been sent when it ended.
"""

import argparse
import mmap
import multiprocessing
import struct
import subprocess
import sys
import time

import nbd

BLOCK = 4096


def record(number):
    """A block that holds write `number` in all of its words, so that a torn one shows."""
    return struct.pack("<Q", number) * (BLOCK // 8)


class Progress:
    """How many writes were sent and answered: shared by the writer and the taker of snapshots."""

    def __init__(self):
        self._words = memoryview(mmap.mmap(-1, 16)).cast("Q")

    def get(self, word):
        return self._words[word]

    def set(self, word, value):
        self._words[word] = value

    SENT, ANSWERED = 0, 1


def write_forever(path, disks, first, blocks, progress, stop):
    """Write n (from 1) goes to place (n - 1) % (blocks * disks), disk by disk in each block."""
    clients = [nbd.Client(path, disk) for disk in disks]
    places = blocks * len(disks)
    number = 0
    while not stop.is_set():
        number += 1
        place = (number - 1) % places
        block, disk = divmod(place, len(disks))
        progress.set(Progress.SENT, number)
        clients[disk].write((first + block) * BLOCK, record(number))
        progress.set(Progress.ANSWERED, number)
    for client in clients:
        client.close()


def last_write(path, exports, first, blocks):
    """The number of the last write that a cut holds. ValueError if it is no point in time."""
    data = [nbd.read_all(path, export, first * BLOCK, blocks * BLOCK) for export in exports]
    numbers = []
    for block in range(blocks):
        for disk, export in enumerate(exports):
            at = data[disk][block * BLOCK : (block + 1) * BLOCK]
            number = struct.unpack_from("<Q", at)[0]
            if at != record(number):
                raise ValueError(f"{export}: block {block} holds parts of several writes")
            numbers.append(number)
    places = len(numbers)
    last = max(numbers)
    for place, number in enumerate(numbers):
        # The greatest write number at or below `last` that goes to this place, or 0: never written.
        expected = max(0, last - (last - 1 - place) % places) if last else 0
        if number != expected:
            raise ValueError(
                f"{'+'.join(exports)}: write {last} is there, but place {place} holds write "
                f"{number} instead of {expected}"
            )
    return last


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--socket", required=True, help="the server's NBD socket")
    arguments.add_argument("--varve", required=True, help="the program (with VARVE_ADMIN)")
    arguments.add_argument("--disks", required=True, nargs="+")
    arguments.add_argument("--first", type=int, default=0, help="of the counted blocks")
    arguments.add_argument("--blocks", type=int, default=400, help="counted blocks of each disk")
    arguments.add_argument("--snapshots", type=int, default=40)
    arguments.add_argument("--prefix", default="cut")
    options = arguments.parse_args()

    progress, stop = Progress(), multiprocessing.Event()
    writer = multiprocessing.Process(
        target=write_forever,
        args=(options.socket, options.disks, options.first, options.blocks, progress, stop),
        daemon=True,
    )
    writer.start()
    cuts = []
    started = time.monotonic()
    for number in range(options.snapshots):
        # One every 100 ms, or as fast as they go.
        time.sleep(max(0.0, started + 0.1 * number - time.monotonic()))
        names = [f"{disk}@{options.prefix}{number}" for disk in options.disks]
        answered = progress.get(Progress.ANSWERED)
        subprocess.run([options.varve, "snapshot"] + names, check=True)
        cuts.append((names, answered, progress.get(Progress.SENT)))
        if not writer.is_alive():
            sys.exit("the writer ended early")
    seconds = time.monotonic() - started
    stop.set()
    writer.join()
    if writer.exitcode != 0:
        sys.exit(f"the writer failed: {writer.exitcode}")

    wrong = 0
    for names, answered, sent in cuts:
        try:
            last = last_write(options.socket, names, options.first, options.blocks)
            if not answered <= last <= sent:
                raise ValueError(
                    f"{'+'.join(names)}: holds writes up to {last}, but {answered} were answered "
                    f"before the command and {sent} sent before it returned"
                )
        except ValueError as error:
            print(error)
            wrong += 1
    total = progress.get(Progress.ANSWERED)
    places = options.blocks * len(options.disks)
    print(
        f"   {len(cuts)} snapshots in {seconds:.1f} s beside {total} counted writes "
        f"({total / places:.1f} rounds): {len(cuts) - wrong} are points in time"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
