"""kill -9, SIGSTOP and SIGTERM at any moment. Not a power cut: the kernel lives on, and with it
what was answered."""

import os
import signal
import subprocess
import threading
import time

from load import Ended, Load
from pool_model import Blocks, World, Wrong


def run_scenario(bench):
    server = bench.server(os.path.join(bench.work, "pool"))
    candidates, legal = [World()], Blocks.after_kill
    while bench.more():
        if bench.source.random() < 0.25:
            kill_while_starting(bench, server)
        start = time.monotonic()
        server.must_start()
        opened = time.monotonic() - start
        world = bench.verify(server, candidates, legal)
        what = bench.source.choice(("kill",) * 6 + ("stop and continue", "kill while stopped",
                                                    "terminate"))  # fmt: skip
        load = Load(server, world, bench.source, stops=what == "terminate")
        ending = start_ending(bench, server, what)
        try:
            load.begin()
            while True:
                load.step()
        except Ended:
            pass
        ending.join()
        load.end()
        bench.count_load(load)
        bench.count(what)
        server.process = None
        candidates = load.candidates()
        # What a server that was asked to end had answered, it has committed.
        legal = Blocks.now if what == "terminate" else Blocks.after_kill
        if bench.source.random() < 0.2:
            bench.verify_offline(server)
            bench.count("offline checks")
        snapshots = sum(len(disk.snapshots) for disk in world.disks.values())
        bench.say(f"opened in {opened * 1e3:.0f} ms; {len(world.disks)} disks, {snapshots} "
                  f"snapshots; {load.requests} requests, {load.commands} commands; {what}")  # fmt: skip
    finish(bench, server, candidates, legal)


def kill_while_starting(bench, server):
    process = subprocess.Popen(server.command(), stderr=subprocess.DEVNULL)
    time.sleep(bench.source.uniform(0, 0.06))  # the moment is left to chance
    process.kill()
    process.wait()
    bench.count("kills while starting")


def start_ending(bench, server, what):
    """A thread that ends the server by and by."""
    process = server.process
    alive, stopped = bench.source.uniform(0.05, 0.6), bench.source.uniform(0.02, 0.3)

    def end():
        time.sleep(alive)
        if what != "kill" and what != "terminate":
            process.send_signal(signal.SIGSTOP)
            time.sleep(stopped)
            if what == "stop and continue":
                process.send_signal(signal.SIGCONT)
                time.sleep(alive)
        if what == "terminate":
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            status = process.wait(30)
            seconds = time.monotonic() - started
            if status != 0 or seconds > 2:
                bench.count(f"WRONG: exit status {status} after {seconds:.1f} s of SIGTERM")
        process.kill()
        process.wait()

    thread = threading.Thread(target=end)
    thread.start()
    return thread


def finish(bench, server, candidates, legal):
    """After all that: what was deleted has given its space back."""
    server.must_start()
    world = bench.verify(server, candidates, legal)
    admin = server.admin()
    for name in world.disks:
        admin.call("disk.delete", name=name, snapshots=True)
    end = time.monotonic() + 60
    while admin.call("pool.status")["reclaim_pending"] and time.monotonic() < end:
        time.sleep(0.02)
    used = admin.call("pool.status")["used"]
    if used:
        raise Wrong(f"everything is deleted, but {used} bytes are in use")
    if any(what.startswith("WRONG") for what in bench.counts):
        raise Wrong(bench.summary())
    status, _ = server.stop()
    if status != 0:
        raise Wrong(f"exit status {status} after SIGTERM")
    bench.verify_offline(server)
