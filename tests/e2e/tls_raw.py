"""NBD under TLS byte by byte: what no honest client does.

tls_raw.py PORT CA: each misbehaviour, and that an honest client is served afterwards.
tls_raw.py hold PORT DIR: a connection with DIR's client certificate that is kept; for each line
"read" on stdin it reads and says "ok".
"""

import socket
import ssl
import struct
import sys

OPTION, REPLY, REQUEST = 0x49484156454F5054, 0x3E889045565A9, 0x25609513
EXPORT_NAME, LIST, STARTTLS, GO, STRUCTURED = 1, 3, 5, 7, 8
ACK, INFO, TLS_REQD, INVALID = 1, 3, 0x80000005, 0x80000003


def option(number, data=b""):
    return struct.pack(">QII", OPTION, number, len(data)) + data


def go(name):
    return option(GO, struct.pack(">I", len(name)) + name + b"\0\0")


def exactly(sock, count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, "the server closed"
        data += piece
    return data


def reply(sock):
    magic, _, kind, length = struct.unpack(">QIII", exactly(sock, 20))
    assert magic == REPLY
    return kind, exactly(sock, length)


def closed(sock):
    """Until the server has closed; what it says before does not matter."""
    try:
        while sock.recv(65536):
            pass
    except (ConnectionResetError, ssl.SSLError):
        pass
    sock.close()


def connect(port):
    sock = socket.create_connection(("127.0.0.1", port), timeout=60)
    exactly(sock, 18)
    sock.sendall(b"\0\0\0\3")
    return sock


def acknowledged(port):
    sock = connect(port)
    sock.sendall(option(STARTTLS))
    assert reply(sock) == (ACK, b"")
    return sock


def context(authority, certificate=None):
    made = ssl.create_default_context(cafile=authority)
    if certificate:
        made.load_cert_chain(certificate + "/client-cert.pem", certificate + "/client-key.pem")
    return made


def secured(port, made):
    return made.wrap_socket(acknowledged(port), server_hostname="localhost")


def open_export(sock, name=b"disk0"):
    sock.sendall(go(name))
    kind, _ = reply(sock)
    assert kind == INFO, hex(kind)
    assert reply(sock)[0] == ACK


def read(sock):
    sock.sendall(struct.pack(">IHHQQI", REQUEST, 0, 0, 1, 0, 4096))
    assert struct.unpack(">IIQ", exactly(sock, 16))[1:] == (0, 1)
    return exactly(sock, 4096)


def misbehave(port, made):
    print("   everything but STARTTLS asks for TLS, and the server goes on")
    sock = connect(port)
    for number, data in ((LIST, b""), (STRUCTURED, b""), (99, b"x" * 5000)):
        sock.sendall(option(number, data))
        assert reply(sock)[0] == TLS_REQD
    sock.sendall(go(b"disk0"))
    assert reply(sock)[0] == TLS_REQD
    sock.sendall(option(STARTTLS, b"x"))
    assert reply(sock)[0] == INVALID
    sock.sendall(option(EXPORT_NAME, b"disk0"))
    closed(sock)

    print("   options in the clear behind STARTTLS are not taken up")
    sock = connect(port)
    sock.sendall(option(STARTTLS) + go(b"disk0"))
    closed(sock)
    sock = acknowledged(port)
    sock.sendall(go(b"disk0"))
    closed(sock)

    print("   a second STARTTLS; what was agreed on is forgotten")
    sock = secured(port, made)
    sock.sendall(option(STARTTLS))
    assert reply(sock)[0] == INVALID
    sock.sendall(option(STRUCTURED))
    assert reply(sock)[0] == ACK
    open_export(sock)
    sock.close()

    print("   plaintext in the middle of a negotiation, and of transmission")
    sock = secured(port, made)
    socket.socket.sendall(sock, go(b"disk0"))  # past the TLS of the object
    closed(sock)
    sock = secured(port, made)
    open_export(sock)
    read(sock)
    socket.socket.sendall(sock, struct.pack(">IHHQQI", REQUEST, 0, 0, 2, 0, 4096))
    closed(sock)

    print("   an end in the middle of a handshake, and of a record")
    inner, outer = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = made.wrap_bio(inner, outer, server_hostname="localhost")
    sock = acknowledged(port)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    hello = outer.read()
    for cut in (1, 5, len(hello) // 2, len(hello)):
        sock.sendall(hello[:cut])
        sock.shutdown(socket.SHUT_WR)
        closed(sock)
        sock = acknowledged(port)
    sock.close()
    sock = secured(port, made)
    open_export(sock)
    socket.socket.sendall(sock, b"\x17\x03\x03\x10\x00half")
    socket.socket.shutdown(sock, socket.SHUT_WR)
    closed(sock)

    print("   a hundred that fail at once")
    many = [acknowledged(port) for _ in range(100)]
    for sock in many:
        sock.sendall(b"no TLS at all")
    for sock in many:
        closed(sock)

    print("   silence during a handshake ends with the time for negotiation")
    sock = acknowledged(port)
    sock.sendall(hello[:20])
    closed(sock)


def hold(port, directory):
    sock = secured(port, context(directory + "/ca-cert.pem", directory))
    open_export(sock)
    for line in sys.stdin:
        if line.strip() != "read":
            break
        read(sock)
        print("ok", flush=True)
    sock.sendall(struct.pack(">IHHQQI", REQUEST, 0, 2, 3, 0, 0))
    sock.close()


def main():
    if sys.argv[1] == "hold":
        return hold(int(sys.argv[2]), sys.argv[3])
    port, made = int(sys.argv[1]), context(sys.argv[2])
    misbehave(port, made)
    sock = secured(port, made)
    open_export(sock)
    read(sock)
    sock.close()


if __name__ == "__main__":
    main()
