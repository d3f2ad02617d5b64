"""fio's logs by time: rates and latencies in short windows, on the clock of time.time()."""

import glob
import os
import signal
import subprocess

from benchmark.servers import Failed

HISTOGRAM_MS = 100


class LoggedLoad:
    """A fio job that runs in the background and logs. `window_ms`: of the log's entries."""

    def __init__(self, command, directory, window_ms):
        self._prefix = os.path.join(directory, "fio")
        self._window = window_ms
        for old in glob.glob(self._prefix + "_*.log"):
            os.unlink(old)
        self._process = subprocess.Popen(
            [*command, f"--write_iops_log={self._prefix}", f"--write_lat_log={self._prefix}",
             f"--log_avg_msec={window_ms}", "--log_max_value=1", "--log_unix_epoch=1",
             f"--write_hist_log={self._prefix}", f"--log_hist_msec={HISTOGRAM_MS}",
             "--per_job_logs=0"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def wait(self, codes=(0,)):
        _, errors = self._process.communicate()
        if self._process.returncode not in codes:
            raise Failed(f"fio: {errors.strip()[-500:]}")

    def end(self):
        """Asks it to end early; what was logged until then is there."""
        self._process.send_signal(signal.SIGINT)
        self.wait(codes=(0, 128))

    def stop(self):
        """For when something else failed."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def _entries(self, kind):
        with open(f"{self._prefix}_{kind}.log") as log:
            for line in log:
                fields = line.split(",")
                yield int(fields[0]), int(fields[1])

    def rates(self):
        """[(seconds, requests per second of all jobs, reads and writes)], whole windows."""
        sums = {}
        for when, rate in self._entries("iops"):
            window = when // self._window
            sums[window] = sums.get(window, 0) + rate
        return [(window * self._window / 1000, rate) for window, rate in sorted(sums.items())]

    def longest(self):
        """[(seconds, the longest latency of a request that ended in that window, ms)]."""
        most = {}
        for when, latency in self._entries("clat"):
            window = when // self._window
            most[window] = max(most.get(window, 0), latency)
        return [(window * self._window / 1000, ns / 1e6) for window, ns in sorted(most.items())]

    def percentile(self, fraction, *stretches):
        """Of the latencies of all requests that ended in one of the stretches (from, to), in ms.

        Of windows of 100 ms that end in one; an entry's time is its window's end.
        """
        sums = {}
        with open(f"{self._prefix}_clat_hist.log") as log:
            for line in log:
                fields = line.split(",")
                end = int(fields[0]) / 1000
                if any(first < end <= last for first, last in stretches):
                    for number, count in enumerate(fields[3:]):
                        if count != " 0":
                            sums[number] = sums.get(number, 0) + int(count)
        wanted = fraction * sum(sums.values())
        for number, count in sorted(sums.items()):
            wanted -= count
            if wanted <= 0:
                return middle_ns(number) / 1e6
        raise Failed("fio logged no latencies in that time")


def middle_ns(number):
    """Of bin `number` of a fio histogram: 64 bins for each power of two, those below 128 of 1 ns."""
    if number < 128:
        return number
    width = 1 << (number // 64 - 1)
    return (64 + number % 64 + 0.5) * width


def mean_rate(rates, *stretches):
    """The mean of all windows that lie in one of the stretches (from, to); None if none does."""
    inside = [rate for when, rate in rates
              if any(begin <= when < end for begin, end in stretches)]
    return sum(inside) / len(inside) if inside else None
