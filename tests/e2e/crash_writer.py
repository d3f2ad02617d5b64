#!/usr/bin/env python3
"""Writes to a disk until the server is killed, and afterwards checks that nothing is missing.

`write` keeps, for each block, what it may hold then: the last content that was answered, and
everything sent to it since. It ends when the server does, and saves that to a file. `check` reads
the disk and compares; what it found becomes the state from which the next `write` goes on.
"""

import argparse
import json
import os
import random
import struct
import sys

import nbd
from pool_model import BLOCK, Blocks, content


class State(Blocks):
    """What each block may hold, kept from one life of the server to the next."""

    def __init__(self, count):
        super().__init__(count)
        self.next = 1

    def save(self, path):
        with open(path + ".new", "w") as out:
            json.dump({"next": self.next, "settled": self.settled, "sent": self.sent}, out)
        os.rename(path + ".new", path)

    @staticmethod
    def load(path, blocks):
        state = State(blocks)
        if os.path.exists(path):
            with open(path) as file:
                saved = json.load(file)
            state.next, state.settled = saved["next"], saved["settled"]
            state.sent = {int(block): writes for block, writes in saved["sent"].items()}
        return state


def one_batch(clients, state, source):
    """Some requests at once over all connections, to blocks of their own; then their replies."""
    pending = {}
    taken = set()
    for _ in range(source.randrange(1, 24)):
        which = source.randrange(len(clients))
        count = source.choice((1, 1, 1, 2, 5, 16))
        first = source.randrange(len(state.settled) - count)
        if not taken.isdisjoint(range(first, first + count)):
            continue
        taken.update(range(first, first + count))
        fua = nbd.FUA if source.random() < 0.1 else 0
        kind = source.choice((nbd.WRITE,) * 8 + (nbd.TRIM, nbd.WRITE_ZEROES))
        number = 0
        if kind == nbd.WRITE:
            number = state.next
            state.next += 1
        state.started(first, count, number)
        data = content(number) * count if kind == nbd.WRITE else b""
        cookie = clients[which].send(kind, first * BLOCK, count * BLOCK, data, fua)
        pending[which, cookie] = (first, count, number, bool(fua))
    for which in [which for which, _ in pending]:
        cookie, error, _ = clients[which].receive()
        if error:
            raise OSError(error, os.strerror(error))
        state.answered(*pending[which, cookie])


def write(options):
    source = random.Random(options.seed)
    state = State.load(options.state, options.blocks)
    writes = flushes = 0
    try:
        clients = [nbd.Client(options.socket, options.disk) for _ in range(4)]
        while True:
            one_batch(clients, state, source)
            writes = state.next
            if source.random() < 0.2:
                source.choice(clients).flush()
                state.flushed()
                flushes += 1
                if flushes == 1:
                    print("flushing", flush=True)  # now it may be killed
    except nbd.Gone:
        pass
    state.save(options.state)


def check(options):
    state = State.load(options.state, options.blocks)
    data = nbd.read_all(options.socket, options.disk, 0, options.blocks * BLOCK)
    wrong = unflushed = 0
    for block in range(options.blocks):
        at = data[block * BLOCK : (block + 1) * BLOCK]
        number = struct.unpack_from("<Q", at)[0]
        allowed = state.after_kill(block)
        unflushed += len(state.after_crash(block)) > 1
        if at != content(number):
            print(f"block {block} holds parts of several writes, one of them {number}")
            wrong += 1
        elif number not in allowed:
            print(f"block {block} holds {number}; legal are {allowed}")
            wrong += 1
        state.settled[block] = number
    state.sent = {}
    state.save(options.state)
    print(f"   {options.blocks} blocks, {unflushed} of them written after the last flush: "
          f"{wrong} wrong")
    sys.exit(1 if wrong else 0)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("what", choices=("write", "check"))
    arguments.add_argument("--socket", required=True, help="the server's NBD socket")
    arguments.add_argument("--disk", required=True)
    arguments.add_argument("--state", required=True, help="where the state is kept")
    arguments.add_argument("--blocks", type=int, default=4096)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    write(options) if options.what == "write" else check(options)


if __name__ == "__main__":
    main()
