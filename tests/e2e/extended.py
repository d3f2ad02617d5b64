"""An NBD client that speaks extended headers, written from the specification.

extended.py SOCKET EXPORT: asks and trims a whole disk in single requests, and writes at its ends.
"""

import socket
import struct
import sys
import time

OPT_GO, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = 7, 10, 11
REP_ACK, REP_INFO, REP_META_CONTEXT = 1, 3, 4
READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 3, 4, 6, 7
FUA, PAYLOAD = 1, 32
NONE, DATA, HOLE, STATUS_EXT = 0, 1, 2, 6
HOLE_ZERO = 3


class Client:
    def __init__(self, path, export, contexts):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(path)
        assert self.exactly(16) == b"NBDMAGICIHAVEOPT"
        self.exactly(2)
        self.sock.sendall(struct.pack(">I", 3))
        assert self.option(OPT_EXTENDED_HEADERS, b"") == []
        name = struct.pack(">I", len(export)) + export.encode()
        queries = b"".join(struct.pack(">I", len(c)) + c.encode() for c in contexts)
        replies = self.option(OPT_SET_META_CONTEXT, name + struct.pack(">I", len(contexts)) + queries)
        self.contexts = {data[4:].decode(): struct.unpack(">I", data[:4])[0]
                         for kind, data in replies if kind == REP_META_CONTEXT}
        for kind, data in self.option(OPT_GO, name + struct.pack(">H", 0)):
            if kind == REP_INFO and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:12])

    def exactly(self, count):
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            assert more, "the server has closed the connection"
            data += more
        return data

    def option(self, option, data):
        """Its replies but the ACK, which must come."""
        self.sock.sendall(struct.pack(">8sII", b"IHAVEOPT", option, len(data)) + data)
        replies = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", self.exactly(20))
            assert magic == 0x3E889045565A9 and echoed == option
            data = self.exactly(length)
            assert kind < 1 << 31, (option, hex(kind), data)
            if kind == REP_ACK:
                return replies
            replies.append((kind, data))

    def ask(self, command, offset=0, length=0, flags=0, payload=b""):
        """The chunks of the reply: (type, body)."""
        if payload:
            length, flags = len(payload), flags | PAYLOAD
        self.sock.sendall(struct.pack(">IHHQQQ", 0x21E41C71, flags, command, 42, offset, length) + payload)
        chunks = []
        while True:
            magic, done, kind, cookie, echoed, length = struct.unpack(">IHHQQQ", self.exactly(32))
            assert (magic, cookie, echoed) == (0x6E8A278C, 42, offset)
            chunks.append((kind, self.exactly(length)))
            assert kind < 1 << 15, (command, chunks[-1])
            if done & 1:
                return chunks

    def status(self, offset, length, contexts=()):
        """By context: its extents, (length, flags)."""
        ids = [self.contexts[name] for name in contexts]
        payload = struct.pack(f">Q{len(ids)}I", length, *ids) if ids else b""
        told = {}
        for kind, body in self.ask(BLOCK_STATUS, offset, length, payload=payload):
            assert kind == STATUS_EXT
            context, count = struct.unpack(">II", body[:8])
            assert len(body) == 8 + 16 * count
            name = next(n for n, i in self.contexts.items() if i == context)
            told[name] = list(struct.iter_unpack(">QQ", body[8:]))
        assert len({sum(length for length, _ in extents) for extents in told.values()}) == 1
        return told


def main(path, disk):
    allocation, bitmap = "base:allocation", "qemu:dirty-bitmap:before"
    client = Client(path, disk, [allocation, bitmap])
    size = client.size
    assert client.flags >> 12 & 1, "a payload of BLOCK_STATUS is offered"
    began = time.monotonic()
    assert client.status(0, size)[allocation] == [(size, HOLE_ZERO)]
    client.ask(WRITE, 0, payload=b"a" * 4096, flags=FUA)
    client.ask(WRITE, size - 8192, payload=b"z" * 8192)
    written = [(4096, 0), (size - 12288, HOLE_ZERO), (8192, 0)]
    dirty = [(4096, 1), (size - 12288, 0), (8192, 1)]
    assert client.status(0, size) == {allocation: written, bitmap: dirty}
    assert client.status(0, size, [bitmap]) == {bitmap: dirty}
    assert client.ask(READ, 0, 8192) == [
        (DATA, struct.pack(">Q", 0) + b"a" * 4096), (HOLE, struct.pack(">QI", 4096, 4096))]
    assert client.ask(WRITE_ZEROES, 4096, size - 8192) == [(NONE, b"")]
    assert client.status(0, size)[allocation] == [(4096, 0), (size - 8192, HOLE_ZERO), (4096, 0)]
    assert client.ask(TRIM, 0, size, FUA) == [(NONE, b"")]
    assert client.status(0, size) == {allocation: [(size, HOLE_ZERO)], bitmap: [(size, 0)]}
    assert client.ask(FLUSH) == [(NONE, b"")]
    print(f"   {size >> 40} TiB: {time.monotonic() - began:.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
