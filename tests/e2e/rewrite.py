#!/usr/bin/env python3
"""Writes the same blocks over and over, so that the map changes without end.

  rewrite.py SOCKET DISK trim TIMES    trims the disk and fills it again
  rewrite.py SOCKET DISK fua TIMES     one block, with FUA, one after the other
"""

import struct
import sys

import nbd

BLOCK = 4096
PIECE = 1 << 20
TOGETHER = 16


def content(number):
    return struct.pack("<Q", number) * (BLOCK // 8)


def done(client):
    _, error, _ = client.receive()
    if error:
        raise OSError(error, "a request failed")


def fill(client, size, number):
    """Trims all, then writes all, some requests at a time."""
    client.send(nbd.TRIM, 0, size, b"", 0)
    done(client)
    data = content(number) * (PIECE // BLOCK)
    pending = 0
    for offset in range(0, size, PIECE):
        client.send(nbd.WRITE, offset, PIECE, data, 0)
        pending += 1
        if pending == TOGETHER:
            done(client)
            pending -= 1
    for _ in range(pending):
        done(client)


def main():
    socket, disk, what, times = sys.argv[1:]
    client = nbd.Client(socket, disk)
    for number in range(1, int(times) + 1):
        if what == "trim":
            fill(client, client.size, number)
        else:
            client.send(nbd.WRITE, 0, BLOCK, content(number), nbd.FUA)
            done(client)
    client.close()


main()
