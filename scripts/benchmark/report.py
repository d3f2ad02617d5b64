"""Puts the figures of a run together: medians, ratios, targets, and Markdown that shows them."""

import statistics

FIELDS = ("requests_per_s", "p50_us", "p99_us", "cpu_us", "memory")


def summarize(rounds, baseline):
    """Medians over rounds, and medians of each round's ratio to the baseline of the same round."""
    median = {field: statistics.median(one[field] for one in rounds) for field in FIELDS}
    ratio = {}
    for field in FIELDS:
        pairs = [(one[field], base[field]) for one, base in zip(rounds, baseline)]
        if pairs and all(base for _, base in pairs):
            ratio[field] = statistics.median(value / base for value, base in pairs)
    return {"median": median, "ratio": ratio, "rounds": rounds}


def _cell(text, ratio):
    return f"{text} ({ratio:.2f})" if ratio is not None else text


def _format(field, value):
    if field == "requests_per_s":
        return f"{value:,.0f}"
    if field == "memory":
        return f"{value / 2**20:.0f}" if value else "-"
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


TITLES = {
    "requests_per_s": "Requests per second",
    "p50_us": "Median latency, us",
    "p99_us": "p99 latency, us",
    "cpu_us": "Server CPU per request, us",
    "memory": "Server memory, resident MiB",
}


def group_markdown(group):
    """The tables of one group of servers; in brackets the ratio to its baseline."""
    names = [server["name"] for server in group["servers"]]
    lines = [f"## {group['title']}", ""]
    lines += [f"- `{server['name']}`: {server['about']}" for server in group["servers"]]
    lines += ["", f"In brackets: the ratio to `{group['baseline']}`, median of each round's.", ""]
    for field in FIELDS:
        lines += [f"**{TITLES[field]}**", ""]
        lines.append("| work | " + " | ".join(names) + " |")
        lines.append("|---|" + "---:|" * len(names))
        for kind in group["works"]:
            cells = []
            for name in names:
                figures = kind["servers"].get(name)
                if not figures or (field in ("cpu_us", "memory") and name == "raw-file"):
                    cells.append("-")
                    continue
                ratio = figures["ratio"].get(field) if name != group["baseline"] else None
                cells.append(_cell(_format(field, figures["median"][field]), ratio))
            lines.append(f"| {kind['about']} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


# Figures in bytes, and how they are shown.
MIB_FIGURES = ("memory", "metadata", "memory_over_map_cache", "changed", "server_without_disks")


def _figure(name, value):
    if name in MIB_FIGURES:
        return f"{name.replace('_', ' ')}, MiB", f"{value / 2**20:,.0f}"
    if name.startswith("bytes_per_"):
        return f"{name[6:].replace('_', ' ')}, KiB", f"{value / 2**10:,.1f}"
    if isinstance(value, float):
        value = f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return name.replace("_", " "), value


def table_markdown(table):
    lines = ["| " + " | ".join(table["columns"]) + " |", "|" + "---:|" * len(table["columns"])]
    return lines + ["| " + " | ".join(row) + " |" for row in table["rows"]] + [""]


def special_markdown(special, pictures):
    lines = []
    for entry in special:
        lines += [f"## {entry['title']}", ""]
        if entry["figures"]:
            lines += ["| figure | value |", "|---|---:|"]
            for name, value in entry["figures"].items():
                lines.append("| {} | {} |".format(*_figure(name, value)))
            lines.append("")
        for title, table in entry.get("tables", {}).items():
            lines += [f"**{title}**", "", *table_markdown(table)]
        for name in pictures:
            if name.startswith(entry["name"] + "."):
                lines += [f"![{entry['title']}]({name})", ""]
    return lines


def _ratio(results, group, kind, server, field, to=None):
    for candidate in results["groups"]:
        if candidate["name"] != group:
            continue
        for entry in candidate["works"]:
            figures = entry["servers"]
            if entry["name"] != kind or server not in figures:
                continue
            if to is None:
                return figures[server]["ratio"].get(field)
            if to in figures:
                return statistics.median(
                    one[field] / base[field]
                    for one, base in zip(figures[server]["rounds"], figures[to]["rounds"])
                )
    return None


def _special(results, name, field):
    for entry in results["special"]:
        if entry["name"] == name:
            return entry["figures"].get(field)
    return None


def _group_targets(results):
    rows = []

    def add(group, kind, field, relation, bound, to=None):
        against = to or {"tmpfs": "nbdkit", "direct": "qemu-nbd"}[group]
        server = "varve" if group == "tmpfs" else "varve-direct"
        what = {"requests_per_s": "requests/s", "cpu_us": "CPU per request", "p99_us": "p99"}[field]
        value = _ratio(results, group, kind, server, field, to)
        rows.append((f"{group}, {kind}: {what} over {against}'s", value, relation, bound))

    for kind, faster, cheaper in (("read-c1", 1.7, 0.5), ("read-c4", 3.5, 0.25)):
        add("tmpfs", kind, "requests_per_s", ">=", faster)
        add("tmpfs", kind, "cpu_us", "<=", cheaper)
    for kind, faster in (("write-c1", 1.5), ("write-c4", 3.0), ("read-qd1", 1.2),
                         ("write-qd1", 1.2), ("seqread", 1.3), ("seqwrite", 1.3),
                         ("flush1", 1.0), ("flush32", 1.0), ("first-flush1", 0.8),
                         ("first-flush32", 0.8)):
        add("tmpfs", kind, "requests_per_s", ">=", faster)
    for kind in ("read-qd1", "write-qd1"):
        add("tmpfs", kind, "p99_us", "<=", 1.0)
    for kind in ("first-c1", "first-c4"):
        add("tmpfs", kind, "requests_per_s", ">=", 10.0, "qcow2")
        rows.append((f"tmpfs, {kind}: requests/s over its own in place",
                     _own_steady_state(results, kind), ">=", 0.9))
    for kind in ("read-c1", "read-c4", "write-c1", "write-c4", "read-qd1", "write-qd1", "seqread",
                 "seqwrite"):
        add("direct", kind, "requests_per_s", ">=", 1.2)
        add("direct", kind, "requests_per_s", ">=", 0.85, "raw-file")
    return rows


def _own_steady_state(results, kind):
    """Varve's rate of first writes over that of the same writes in place, by medians."""
    rates = {}
    for group in results["groups"]:
        if group["name"] == "tmpfs":
            for entry in group["works"]:
                if "varve" in entry["servers"]:
                    rates[entry["name"]] = entry["servers"]["varve"]["median"]["requests_per_s"]
    in_place = rates.get(kind.replace("first", "write"))
    return rates[kind] / in_place if in_place and kind in rates else None


def targets(results):
    """What is to be reached: (what, measured or None, relation, bound)."""
    rows = _group_targets(results)
    usual = _special(results, "around", "p99_usual_ms")
    near = _special(results, "around", "p99_in_the_second_of_a_snapshot_ms")
    rows += [
        ("snapshot under load, p99 of the command, ms",
         _special(results, "snapshots", "command_p99_ms"), "<=", 10.0),
        ("snapshot under load, p99 of I/O in that second over the usual", near and near / usual,
         "<=", 2.0),
        ("restart after kill -9 with a million mapped blocks, s",
         _special(results, "restart", "ready_s"), "<=", 1.0),
    ]
    for kind in ("read", "write", "first"):
        rows.append((f"many snapshots, {kind}: requests/s over none's",
                     _special(results, "many", f"{kind}_ratio"), ">=", 0.95))
    for order in ("in-order", "at-random"):
        size = _special(results, f"large-{order}", "size_gib")
        rows.append((f"{size} GiB mapped {order}: restart after kill -9, longest, s",
                     _special(results, f"large-{order}", "ready_longest_s"), "<=", 1.0))
        over = _special(results, f"large-{order}", "memory_over_map_cache")
        rows.append((f"{size} GiB mapped {order}: memory over the map cache, MiB",
                     over and over / 2**20, "<=", 64.0))
    least = _special(results, "deletion", "seconds_per_gib_least")
    most = _special(results, "deletion", "seconds_per_gib_most")
    rows += [
        ("deleting a snapshot: requests/s beside it over those without",
         _special(results, "deletion", "beside_ratio"), ">=", 0.9),
        ("deleting a snapshot: bytes written of bytes given back",
         _special(results, "deletion", "written_of_freed"), "<=", 0.05),
        ("deleting a snapshot: time per GiB, most over least", most and most / least, "<=", 2.0),
    ]
    for name in ("disk_created", "disk_after_restart", "silent_connection"):
        size = _special(results, "idle", f"bytes_per_{name}")
        rows.append((f"idle, per {name.replace('_', ' ')}, KiB", size and size / 1024, "<=", 64.0))
    return rows


def targets_markdown(results):
    lines = ["## Targets", "", "| target | bound | measured | |", "|---|---:|---:|---|"]
    for what, value, relation, bound in targets(results):
        if value is None:
            continue
        reached = value >= bound if relation == ">=" else value <= bound
        lines.append(f"| {what} | {relation} {bound:g} | {value:.2f} | "
                     f"{'reached' if reached else '**missed**'} |")
    return lines + [""] if len(lines) > 4 else []


def markdown(results, pictures=()):
    machine, settings = results["machine"], results["settings"]
    lines = [
        "# Benchmark figures",
        "",
        f"{results['date']}, {machine['cpus']} x {machine['cpu']}, {machine['memory_gib']} GiB, "
        f"load average {machine['load_average']} before, Linux {machine['kernel']}, "
        f"{', '.join(results['versions'])}. Disk of "
        f"{settings['size_mib']} MiB, written once; medians of {settings['rounds']} interleaved "
        f"rounds of {settings['seconds']} s.",
        "",
    ]
    lines += targets_markdown(results)
    for group in results["groups"]:
        lines += group_markdown(group)
    lines += special_markdown(results["special"], pictures)
    return "\n".join(lines).rstrip() + "\n"
