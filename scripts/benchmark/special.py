"""What is no plain fio job: taking snapshots under load, and restarting after kill -9."""

import json
import math
import os
import signal
import socket
import statistics
import subprocess
import time

from benchmark import work
from benchmark.servers import EXPORT, Failed, run

BLOCK = 4096


def percentile(values, fraction):
    """The smallest value that at least that fraction of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * fraction) - 1)]


def metadata_bytes(server):
    """Bytes of all files of the pool but its data."""
    return sum(os.path.getsize(os.path.join(base, name))
               for base, _, names in os.walk(server.pool)
               for name in names
               if name != "data" and os.path.isfile(os.path.join(base, name)))


class Admin:
    """One connection to the admin socket: what a snapshot costs without starting a program."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("rw")
        self._id = 0

    def call(self, method, **parameters):
        self._id += 1
        request = {"jsonrpc": "2.0", "id": self._id, "method": method, "params": parameters}
        self._file.write(json.dumps(request) + "\n")
        self._file.flush()
        answer = json.loads(self._file.readline())
        if "error" in answer:
            raise Failed(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def close(self):
        self._file.close()
        self._socket.close()


def snapshots_under_load(server, count, seed):
    """Takes `count` snapshots, ten a second, beside 4 KiB random writes at QD 32 x 4.

    Half by the command line, half over one connection of the admin socket. Between them /bin/true
    is started in the same way, as often as the command: what starting any program costs then. Also
    the load's own latency, with snapshots and without. Times in milliseconds.
    """
    load = next(kind for kind in work.ALL if kind.name == "write-c4")
    seconds = count // 10 + 1
    plain = work.measure(load, server, min(seconds, 5), seed)

    job = work.command(load, server.target(), server.size, seconds + 1, seed)
    running = subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    admin = Admin(server.admin)
    by_command, by_socket, by_nothing = [], [], []
    started = time.monotonic()

    def sleep_until(seconds):
        time.sleep(max(0.0, started + 0.5 + seconds - time.monotonic()))

    try:
        for number in range(count):
            sleep_until(0.1 * number)
            name = f"{EXPORT}@load{number}"
            before = time.perf_counter()
            if number % 2:
                server.varve("snapshot", name)
                by_command.append((time.perf_counter() - before) * 1000)
                sleep_until(0.1 * number + 0.05)
                before = time.perf_counter()
                run("/bin/true")
                by_nothing.append((time.perf_counter() - before) * 1000)
            else:
                admin.call("snapshot.create", snapshots=[name])
                by_socket.append((time.perf_counter() - before) * 1000)
        output, errors = running.communicate()
    finally:
        admin.close()
        if running.poll() is None:
            running.kill()
            running.communicate()
    if running.returncode != 0:
        raise Failed(f"fio beside snapshots: {errors.strip()[-500:]}")
    side = json.loads(output[output.index("{"):])["jobs"][0]["write"]
    for number in range(count):
        server.varve("delete", f"{EXPORT}@load{number}", "--yes")
    server.wait_for_reclaim()
    return {
        "snapshots": count,
        "command_p50_ms": statistics.median(by_command),
        "command_p99_ms": percentile(by_command, 0.99),
        "start_p50_ms": statistics.median(by_nothing),
        "start_p99_ms": percentile(by_nothing, 0.99),
        "socket_p50_ms": statistics.median(by_socket),
        "socket_p99_ms": percentile(by_socket, 0.99),
        "io_requests_per_s_without": plain.requests_per_s,
        "io_requests_per_s": side["iops"],
        "io_p99_ms_without": plain.p99_us / 1000,
        "io_p99_ms": side["clat_ns"]["percentile"]["99.000000"] / 1e6,
        "io_longest_ms": side["clat_ns"]["max"] / 1e6,
    }


def kill_under_load(server, seed):
    """kill -9 after a second of random writes; seconds from starting it again to its ready line."""
    load = next(kind for kind in work.ALL if kind.name == "write-c4")
    job = work.command(load, server.target(), server.size, 60, seed)
    running = subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1)
    server.stop(signal.SIGKILL)
    running.wait()
    before = time.monotonic()
    server.start()
    return time.monotonic() - before


def restart_after_kill(server_class, directory, blocks, rounds, seed, scattered):
    """kill -9 under random writes on a disk whose blocks are all mapped, and start again.

    `scattered`: they were written at random, else in order (which takes less time).

    Times from starting the process to its ready line, and to the first read answered, in seconds.
    """
    server = server_class(directory, blocks * BLOCK)
    server.prepare()
    server.start()
    ready, first_read = [], []
    try:
        if scattered:
            fill = work.Work("fill", "", "randwrite", connections=4, first_writes=True)
            job = work.command(fill, server.target(), server.size, 600, seed)
            if subprocess.run(job, capture_output=True).returncode != 0:
                raise Failed("fio could not fill the disk")
        else:
            work.prefill(server)
        for number in range(rounds):
            ready.append(kill_under_load(server, seed + number))
            before = time.monotonic() - ready[-1]
            read = ["qemu-io", "-r", "-f", "raw", "-c", f"read -q {server.size // 2} 4k",
                    f"nbd+unix:///{EXPORT}?socket={server.socket}"]
            if subprocess.run(read, capture_output=True).returncode != 0:
                raise Failed("the first read after a restart failed")
            first_read.append(time.monotonic() - before)
        used = server.status()["used"]
        memory = server.memory_bytes()
    finally:
        server.stop()
    return {
        "mapped_blocks": used // BLOCK,
        "ready_s": statistics.median(ready),
        "ready_longest_s": max(ready),
        "first_read_s": statistics.median(first_read),
        "memory": memory,
        "metadata": metadata_bytes(server),
    }
