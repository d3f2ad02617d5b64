"""What a disk and a connection cost in memory when nobody uses them."""

import resource

import nbd
from benchmark.servers import EXPORT
from benchmark.special import Admin

WARM = 10  # connections before the first figure: what the first ones cost is nobody's in particular


def measure(server_class, directory, count):
    """Bytes of resident memory for each of `count` disks, and for each of as many connections.

    Disks: just created, and after a restart of the server. Connections: negotiated and silent; and
    after each has read a block. Memory of the kernel (sockets) is not counted.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 100:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 100), hard))
    server = server_class(directory, 1 << 30)
    server.prepare()
    server.start()
    clients = []
    try:
        nothing = server.memory_bytes()
        admin = Admin(server.admin)
        for number in range(WARM):
            admin.call("disk.create", name=f"warm{number}", size=1 << 30)
        before = server.memory_bytes()
        for number in range(count):
            admin.call("disk.create", name=f"idle{number}", size=1 << 30)
        created = server.memory_bytes() - before
        admin.close()
        server.stop()
        server.start()
        reopened = server.memory_bytes() - nothing

        clients = [nbd.Client(server.socket, EXPORT) for _ in range(WARM)]
        before = server.memory_bytes()
        for number in range(count):
            clients.append(nbd.Client(server.socket, f"idle{number}"))
        silent = server.memory_bytes() - before
        for client in clients:
            client.read(0, 4096)
        used = server.memory_bytes() - before
        # The server answers all of them, so all are still there.
    finally:
        for client in clients:
            client.sock.close()
        server.stop()
    return {
        "disks": count,
        "connections": count,
        "bytes_per_disk_created": max(created, 0) / count,
        "bytes_per_disk_after_restart": max(reopened, 0) / count,
        "bytes_per_silent_connection": max(silent, 0) / count,
        "bytes_per_connection_after_a_read": max(used, 0) / count,
        "server_without_disks": nothing,
    }
