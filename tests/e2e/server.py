"""The real varved under test, for tests in Python: started, watched, asked, stopped or killed.

Not for tests in bash, which have lib.sh, and no assertion about what the server serves.
"""

import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time


class Refused(Exception):
    """An admin command was refused."""

    def __init__(self, error):
        super().__init__(error["message"])
        self.kind = error.get("data", {}).get("kind", "")


class Dead(Exception):
    """The server ended before it answered."""


class Admin:
    """A connection to the admin socket: one command at a time."""

    def __init__(self, path, timeout=120):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout)
        self._buffer = b""
        try:
            self.sock.connect(path)
        except OSError as error:
            raise Dead(str(error)) from error

    def send(self, method, **parameters):
        """Sends a command; receive() has its answer."""
        line = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        try:
            self.sock.sendall(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise Dead(str(error)) from error

    def receive(self):
        while b"\n" not in self._buffer:
            try:
                got = self.sock.recv(1 << 20)
            except socket.timeout:
                raise
            except OSError as error:
                raise Dead(str(error)) from error
            if not got:
                raise Dead("end of stream")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["result"]

    def call(self, method, **parameters):
        self.send(method, **parameters)
        return self.receive()

    def close(self):
        self.sock.close()


class Server:
    """One varved after the other on one pool."""

    def __init__(self, programs, pool, work, options=()):
        self.programs = programs  # directory of varved and varve
        self.pool = pool
        self.options = list(options)
        self.nbd = os.path.join(work, "nbd.sock")
        self.admin_path = os.path.join(work, "admin.sock")
        self.log = os.path.join(work, "server.log")
        self.address = None  # (host, port)
        self.process = None

    def command(self):
        return [
            os.path.join(self.programs, "varved"), "--pool", self.pool, "--unix", self.nbd,
            "--admin", self.admin_path, "--listen", "127.0.0.1:0", *self.options,
        ]  # fmt: skip

    def start(self, seconds=60):
        """Returns (None, "") when it is ready, or (exit status, what it said) if it ended."""
        self.process = subprocess.Popen(self.command(), stderr=subprocess.PIPE)
        errors, said, end = self.process.stderr, b"", time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            if left <= 0 or not select.select([errors], [], [], left)[0]:
                self.kill9()
                raise TimeoutError(f"varved is not ready after {seconds} s: {said.decode()}")
            got = os.read(errors.fileno(), 65536)
            if not got:
                status = self.process.wait()
                self._keep(said)
                self.process = None
                return status, said.decode(errors="replace")
            said += got
            ready = re.search(rb"varved: ready .*?127\.0\.0\.1:(\d+).*\n", said)
            if ready:
                break
        self._keep(said)
        self.address = ("127.0.0.1", int(ready.group(1)))
        threading.Thread(target=self._drain, args=(errors,), daemon=True).start()
        return None, ""

    def must_start(self):
        status, said = self.start()
        if status is not None:
            raise AssertionError(f"varved ended with {status}: {said}")

    def _keep(self, said):
        with open(self.log, "ab") as log:
            log.write(said)

    def _drain(self, errors):
        while True:
            got = errors.read1(65536)
            if not got:
                return errors.close()
            self._keep(got)

    def stop(self, seconds=60):
        """SIGTERM. Returns (exit status, seconds it took)."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(seconds)
        self.process = None
        return status, time.monotonic() - start

    def kill9(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.process = None

    def running(self):
        return self.process is not None and self.process.poll() is None

    def admin(self):
        return Admin(self.admin_path)

    def call(self, method, **parameters):
        admin = Admin(self.admin_path)
        try:
            return admin.call(method, **parameters)
        finally:
            admin.close()

    def check_offline(self):
        """The exit status of `varve check --pool` and its report or error."""
        done = subprocess.run(
            [os.path.join(self.programs, "varve"), "--json", "check", "--pool", self.pool],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    # What the process holds.
    def memory(self, field="VmRSS"):
        """Bytes resident."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(rf"{field}:\s+(\d+)", status.read()).group(1)) << 10

    def descriptors(self):
        """Without RocksDB's tables, whose number changes by itself."""
        directory, count = f"/proc/{self.process.pid}/fd", 0
        for entry in os.listdir(directory):
            try:
                count += not os.readlink(f"{directory}/{entry}").split(" ")[0].endswith(".sst")
            except FileNotFoundError:
                pass
        return count

    def threads(self):
        """Without the workers of io_uring, which the kernel starts and ends by itself."""
        names = []
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            try:
                with open(f"/proc/{self.process.pid}/task/{task}/comm") as comm:
                    names.append(comm.read().strip())
            except FileNotFoundError:
                pass
        return sum(not name.startswith("iou-") for name in names)


def eventually(what, condition, seconds=30):
    """Until `condition()` holds: for what the server does in the background."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s still not: {what}")
        time.sleep(0.02)
