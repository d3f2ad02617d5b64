"""A client that behaves, beside those that do not: writes and reads back numbered blocks.

In a process of its own, so that nothing but the server can slow it down. Not a benchmark: its
latencies are for a report, its contents for a verdict.
"""

import multiprocessing
import random
import struct
import time

import nbd

BLOCK = 4096
BLOCKS = 512


def _content(number):
    return struct.pack("<Q", number) * (BLOCK // 8)


class Polite:
    """Runs from construction until finish()."""

    def __init__(self, address, export, seed):
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=self._run, args=(address, export, seed, theirs), daemon=True
        )
        self._process.start()
        if self._pipe.recv() != "attached":
            raise AssertionError("the polite client could not attach")

    @staticmethod
    def _run(address, export, seed, pipe):
        source = random.Random(seed)
        client = nbd.Client(address, export)
        pipe.send("attached")
        held, took, number = {}, [], seed << 32
        while not pipe.poll():
            block = source.randrange(BLOCKS)
            number += 1
            start = time.perf_counter()
            client.write(block * BLOCK, _content(number))
            took.append(time.perf_counter() - start)
            held[block] = number
            block = source.choice(list(held)) if len(took) % 8 == 0 else block
            start = time.perf_counter()
            data = client.read(block * BLOCK, BLOCK)
            took.append(time.perf_counter() - start)
            if data != _content(held[block]):
                found = struct.unpack_from("<Q", data)[0]
                pipe.send(f"block {block} holds {found:#x} instead of {held[block]:#x}")
                return
        client.flush()
        for block, expected in held.items():
            if client.read(block * BLOCK, BLOCK) != _content(expected):
                pipe.send(f"block {block} is wrong in the end")
                return
        client.close()
        took.sort()
        at = lambda part: took[int(part * (len(took) - 1))] * 1e3
        pipe.send((len(took), at(0.5), at(0.99), took[-1] * 1e3))

    def finish(self):
        """Its verdict: a line of figures. Raises if it was served wrong, or not at all."""
        self._pipe.send("stop")
        try:
            result = self._pipe.recv() if self._pipe.poll(60) else "it is not served any more"
        except EOFError:
            result = "it was cut off"
        self._process.join(1)
        if isinstance(result, str):
            raise AssertionError(f"the polite client: {result}")
        return "{} requests, p50 {:.2f} ms, p99 {:.2f} ms, most {:.1f} ms".format(*result)
