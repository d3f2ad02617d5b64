#!/usr/bin/env python3
"""Draws the curves of a results.json with gnuplot: plots.py RESULTS.json DIRECTORY [svg|png].

scripts/bench calls this; it may be run alone to draw again.
"""

import json
import os
import shutil
import subprocess
import sys

COLOURS = {"varve": "#0060ad", "nbdkit": "#dd6a10", "qemu-raw": "#2e8b57"}
GREY = "#777777"


def _quote(text):
    return "'" + str(text).replace("'", "''") + "'"


class Plot:
    """One picture of several panels, side by side or one above the other."""

    def __init__(self, rows, columns, width, height):
        self._size, self._layout = (width, height), (rows, columns)
        self._lines, self._blocks = [], 0

    def panel(self, title, x, y, lines, *, log_x=False, log_y=False, marks=()):
        """`lines`: [(label, colour, style, [(x, y)])]. `marks`: vertical lines at these x."""
        add = self._lines.append
        add(f"set title {_quote(title)}\nset xlabel {_quote(x)}\nset ylabel {_quote(y)}")
        add("set logscale x 2" if log_x == 2 else "set logscale x 10" if log_x else
            "unset logscale x")
        add("set logscale y 10\nset autoscale y" if log_y else
            "unset logscale y\nset yrange [0:*]")
        add("set xrange [0:*]" if not log_x else "set autoscale x")
        add("unset arrow")
        for mark in marks:
            add(f"set arrow from first {mark}, graph 0 to first {mark}, graph 1 nohead "
                f"lc rgb '#bb0000' dt 3")
        parts = []
        for label, colour, style, points in lines:
            self._blocks += 1
            add(f"$d{self._blocks} << END")
            self._lines += [f"{px} {py}" for px, py in points]
            add("END")
            named = f"title {_quote(label)}" if label else "notitle"
            parts.append(f"$d{self._blocks} using 1:2 with {style} lc rgb '{colour}' {named}")
        add("plot " + ", ".join(parts))

    def write(self, path):
        kind = os.path.splitext(path)[1][1:]
        width, height = self._size
        terminal = (f"set terminal svg size {width},{height} font 'Arial,12' background '#ffffff'"
                    if kind == "svg" else
                    f"set terminal pngcairo size {width},{height} font 'DejaVu Sans,10'")
        rows, columns = self._layout
        script = "\n".join([
            terminal, f"set output {_quote(path)}", "set border 3", "set tics nomirror",
            "set grid lt 1 lc rgb '#dddddd'", "set key outside bottom center horizontal", "set format y '%.10g'",
            f"set multiplot layout {rows},{columns}", *self._lines, "unset multiplot", ""])
        subprocess.run(["gnuplot"], input=script, text=True, check=True)


def depths(found, path):
    plot = Plot(2, 2, 960, 760)
    for field, what, scale in (("requests_per_s", "1000 requests/s", 1000),
                               ("p99_us", "p99 latency, us", 1)):
        for pattern, title in (("randread", "4 KiB random read"),
                               ("randwrite", "4 KiB random write")):
            lines = []
            for name, colour in COLOURS.items():
                points = [(one["depth"], one[field] / scale) for one in found
                          if one["server"] == name and one["pattern"] == pattern]
                if points:
                    lines.append((name, colour, "linespoints pt 7 ps 0.6 lw 2", points))
            plot.panel(title, "queue depth", what, lines, log_x=2, log_y=scale == 1)
    plot.write(path)


def around(found, path):
    plot = Plot(2, 1, 960, 640)
    x = "seconds; dotted: snapshots"
    plot.panel("The longest latency in each 20 ms", x, "ms",
               [("", COLOURS["varve"], "impulses lw 1", found["longest_ms"])],
               marks=found["snapshots"])
    plot.panel("Rate in each 20 ms", x, "1000 requests/s",
               [("", COLOURS["varve"], "lines lw 1",
                 [(when, rate / 1000) for when, rate in found["rates"]])],
               marks=found["snapshots"])
    plot.write(path)


def many(series, path):
    plot = Plot(1, 2, 960, 380)
    # Zero has no place on a logarithmic axis; the panels say what it stands for.
    where = [max(one["snapshots"], 0.3) for one in series]
    styles = (("read", "random read", COLOURS["varve"]), ("write", "random write",
              COLOURS["nbdkit"]), ("first", "first writes", COLOURS["qemu-raw"]))
    lines = [(label, colour, "linespoints pt 7 ps 0.6 lw 2",
              [(x, one[name]["ratio"]) for x, one in zip(where, series)])
             for name, label, colour in styles]
    x = "snapshots of the disk; leftmost: none"
    plot.panel("Rate, of a disk without snapshots", x, "ratio", lines, log_x=10)
    took = [(one["snapshots"], one["snapshot_p50_ms"]) for one in series
            if "snapshot_p50_ms" in one]
    plot.panel("Taking one more", "snapshots of the disk", "median, ms",
               [("", COLOURS["varve"], "linespoints pt 7 ps 0.6 lw 2", took)], log_x=10)
    plot.write(path)


def deletion(found, path):
    plot = Plot(1, 2, 960, 380)
    gib = [one["changed"] / 2**30 for one in found]
    x, style = "changed since the snapshot, GiB", "linespoints pt 7 ps 0.6 lw 2"
    plot.panel("Time until all space is back", x, "seconds",
               [("alone", COLOURS["varve"], style,
                 [(at, one["alone"]["seconds"]) for at, one in zip(gib, found)]),
                ("beside a load", COLOURS["nbdkit"], style,
                 [(at, one["beside"]["seconds"]) for at, one in zip(gib, found)])])
    plot.panel("The load beside it", x, "1000 requests/s",
               [("without the deletion", GREY, style,
                 [(at, one["beside"]["without_per_s"] / 1000) for at, one in zip(gib, found)]),
                ("during it", COLOURS["varve"], style,
                 [(at, one["beside"]["during_per_s"] / 1000) for at, one in zip(gib, found)])])
    plot.write(path)


KINDS = {"depths": depths, "around": around, "many": many, "deletion": deletion}


def draw(results, directory, kind="svg"):
    """Draws what there are curves of; names of the files, or nothing without gnuplot."""
    if not shutil.which("gnuplot"):
        return []
    names = []
    for entry in results["special"]:
        if entry["name"] in KINDS:
            name = f"{entry['name']}.{kind}"
            KINDS[entry["name"]](entry["curves"], os.path.join(directory, name))
            names.append(name)
    return names


def main():
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    with open(sys.argv[1]) as file:
        results = json.load(file)
    draw(results, sys.argv[2], *sys.argv[3:])


if __name__ == "__main__":
    main()
