"""What the scenarios of scripts/torture share: a place to work, time, counters, verification.

No scenario of its own.
"""

import collections
import os
import subprocess
import sys
import time

from load import Load
from pool_model import Blocks, Wrong
from server import Server


def needs_namespace(names):
    """Mounts of the scenarios end with a mount namespace of their own, whatever happens."""
    if {"full", "eio", "powercut"}.isdisjoint(names) or os.environ.get("VARVE_IN_NAMESPACE"):
        return
    os.environ["VARVE_IN_NAMESPACE"] = "1"
    os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])


def run(*command):
    """Its output; raises if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
    return done.stdout.strip()


def unmount(place):
    """Of a process that has ended the system may hold files a moment longer: what was under way on
    its rings."""
    end = time.monotonic() + 30
    while True:
        done = subprocess.run(["umount", place], capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return
        if "busy" not in done.stderr or time.monotonic() > end:
            raise RuntimeError(f"umount {place}: {done.stderr}")
        time.sleep(0.01)


class Bench:
    """A scenario's place, choices and figures."""

    def __init__(self, programs, work, source):
        self.programs, self.work, self.source = programs, work, source
        self.cycle = 0
        self.counts = collections.Counter()
        self.servers, self.undo = [], []

    def limit(self, seconds, cycles):
        self._end, self._cycles = time.monotonic() + seconds, cycles

    def parts(self, names):
        """Cuts what there is of time or cycles into equal parts: sets each limit, yields each name."""
        seconds, cycles = self._end - time.monotonic(), self._cycles
        for name in names:
            self.limit(seconds / len(names), cycles and self.cycle + max(1, cycles // len(names)))
            yield name

    def more(self):
        """Whether there is to be another cycle."""
        enough = self._cycles and self.cycle >= self._cycles
        if enough or (not self._cycles and time.monotonic() > self._end):
            return False
        self.cycle += 1
        return True

    def server(self, pool, *options):
        # On a busy machine the device may take its time while a client asks for a disk.
        always = ("--log-level", "warning", "--negotiation-timeout", "100")
        server = Server(self.programs, pool, self.work, (*always, *options))
        self.servers.append(server)
        return server

    def terminate(self, server, failed):
        """SIGTERM. A failed pool cannot commit any more and says so; it does not crash."""
        status, seconds = server.stop()
        if status != (1 if failed else 0) or seconds > 2:
            raise Wrong(f"exit status {status} {seconds:.1f} s after SIGTERM; failed: {failed}")
        self.count("SIGTERM")

    def load(self, server, world, steps):
        """A load of `steps` steps that must all succeed."""
        load = Load(server, world, self.source)
        load.begin()
        for _ in range(steps):
            load.step()
        load.end()
        self.count_load(load)
        return load

    def count(self, what, number=1):
        self.counts[what] += number

    def count_load(self, load):
        self.count("requests", load.requests)
        self.count("commands", load.commands)
        if load.failed:
            self.count("requests refused", load.failed)
        for kind in load.refusals:
            self.count(f"commands refused ({kind})")

    def say(self, text):
        print(f"   {self.cycle}: {text}", flush=True)

    def summary(self):
        return ", ".join(f"{number} {what}" for what, number in self.counts.items())

    def show_log(self):
        for server in self.servers:
            if os.path.exists(server.log):
                with open(server.log, errors="replace") as log:
                    lines = [line for line in log if line.strip() and "ready" not in line]
                    print("--- the server's log:", *lines[-20:], file=sys.stderr)
                break

    def clean_up(self):
        for server in self.servers:
            if server.running():
                server.kill9()
        for undo in reversed(self.undo):
            try:
                undo()
            except RuntimeError as error:
                print(error, file=sys.stderr)

    # ---- verification

    def verify(self, server, candidates, legal=Blocks.after_crash, failed=False, torn=None):
        """The one of `candidates` that the server serves, with what was found in it. `failed`: the
        pool has failed, and refuses some things. `torn`: see World.verify()."""
        errors = []
        admin = server.admin()
        for number, world in enumerate(candidates):
            try:
                # Its copy: a comparison that fails half-way must leave nothing behind.
                if torn is not None:
                    torn.clear()
                trial = world.copy() if len(candidates) > 1 else world
                self.count("blocks compared", trial.verify(server, admin, legal, failed, torn))
                break
            except Wrong as wrong:
                errors.append(("done: " if number else "not done: ") + str(wrong))
        else:
            raise Wrong("; ".join(errors))
        if not failed:
            check_clean(admin)
        admin.close()
        return trial

    def verify_offline(self, server):
        """`varve check --pool`, without a server."""
        status, said = server.check_offline()
        if status != 0:
            raise Wrong(f"varve check --pool: exit status {status}: {said}")


def check_clean(admin):
    report = admin.call("pool.check")
    if not report["ok"] or report["errors"] or report["leaked_blocks"]:
        raise Wrong(f"varve check: {report}")
