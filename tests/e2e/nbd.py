"""A small NBD client for writers that must know exactly what was answered and when.

Not a general client: fixed newstyle, GO, simple replies. Real clients are tested by clients_test.
"""

import hashlib
import os
import socket
import struct
import sys

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
FUA = 1

_REPLY_MAGIC = 0x67446698
_REQUEST_MAGIC = 0x25609513
_OPTION_MAGIC = 0x49484156454F5054
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_OPT_GO, _REP_ACK, _REP_INFO, _INFO_EXPORT = 7, 1, 3, 0
_REP_ERR_SHUTDOWN = 0x80000007


class Gone(Exception):
    """The server closed or reset the connection, or says that it is about to end."""


class Client:
    """One connection to one export. Requests may be pipelined: send() several, then receive().

    `path` is that of a unix socket, or (host, port).
    """

    def __init__(self, path, export):
        family = socket.AF_INET if isinstance(path, tuple) else socket.AF_UNIX
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(120)
        try:
            self.sock.connect(path)
            if family == socket.AF_INET:
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise Gone(str(error)) from error
        self._cookie = 0
        self._lengths = {}
        self._negotiate(export.encode())

    def _negotiate(self, name):
        self._exactly(18)
        self._put(struct.pack(">I", 3))
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._put(struct.pack(">QII", _OPTION_MAGIC, _OPT_GO, len(data)) + data)
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._exactly(20))
            assert magic == _OPTION_REPLY_MAGIC
            data = self._exactly(length)
            if kind == _REP_ACK:
                return
            if kind == _REP_INFO and data[:2] == struct.pack(">H", _INFO_EXPORT):
                self.size, self.flags = struct.unpack(">QH", data[2:12])
            elif kind == _REP_ERR_SHUTDOWN:
                raise Gone(data.decode())
            elif kind != _REP_INFO:
                raise OSError(f"export {name.decode()}: error {kind:#x} {data.decode()}")

    def _put(self, data):
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise Gone(str(error)) from error

    def _exactly(self, count):
        buffer = bytearray(count)
        view, have = memoryview(buffer), 0
        while have < count:
            try:
                got = self.sock.recv_into(view[have:])
            except socket.timeout:
                raise
            except OSError as error:
                raise Gone(str(error)) from error
            if got == 0:
                raise Gone("end of stream")
            have += got
        return bytes(buffer)

    def send(self, command, offset=0, length=0, data=b"", flags=0):
        """Sends one request without waiting for its reply; returns its cookie."""
        self._cookie += 1
        length = len(data) or length
        self._lengths[self._cookie] = length if command == READ else 0
        request = (_REQUEST_MAGIC, flags, command, self._cookie, offset, length)
        self._put(struct.pack(">IHHQQI", *request) + data)
        return self._cookie

    def receive(self):
        """The next reply: (cookie, errno, data)."""
        magic, error, cookie = struct.unpack(">IIQ", self._exactly(16))
        assert magic == _REPLY_MAGIC, hex(magic)
        length = self._lengths.pop(cookie)
        return cookie, error, self._exactly(length) if length and not error else b""

    def _call(self, *arguments, **named):
        sent = self.send(*arguments, **named)
        cookie, error, data = self.receive()
        assert cookie == sent
        if error:
            raise OSError(error, os.strerror(error))
        return data

    def read(self, offset, length):
        return self._call(READ, offset, length)

    def write(self, offset, data, flags=0):
        self._call(WRITE, offset, data=data, flags=flags)

    def flush(self):
        self._call(FLUSH)

    def close(self):
        try:
            self.send(DISC)
        except Gone:
            pass
        self.sock.close()


def read_all(path, export, offset=0, length=None):
    """The bytes of a stretch of an export."""
    client = Client(path, export)
    end = client.size if length is None else offset + length
    parts = []
    for start in range(offset, end, 1 << 20):
        parts.append(client.read(start, min(1 << 20, end - start)))
    client.close()
    return b"".join(parts)


def main():
    """nbd.py SOCKET LENGTH EXPORT...: a line for each, with the checksum of its first bytes."""
    path, length = sys.argv[1], int(sys.argv[2])
    for export in sys.argv[3:]:
        print(export, hashlib.sha256(read_all(path, export, 0, length)).hexdigest())


if __name__ == "__main__":
    main()
