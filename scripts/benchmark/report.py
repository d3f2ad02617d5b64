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


def special_markdown(special):
    lines = []
    for entry in special:
        lines += [f"## {entry['title']}", "", "| figure | value |", "|---|---:|"]
        for name, value in entry["figures"].items():
            if name in ("memory", "metadata"):
                name, value = f"{name}, MiB", f"{value / 2**20:.0f}"
            elif isinstance(value, float):
                value = f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"
            lines.append(f"| {name.replace('_', ' ')} | {value} |")
        lines.append("")
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


def targets(results):
    """What is to be reached: (what, measured or None, relation, bound)."""
    rows = []
    for kind in ("read-c1", "read-c4", "write-c1", "write-c4"):
        rows.append((f"tmpfs, {kind}: requests/s over nbdkit's",
                     _ratio(results, "tmpfs", kind, "varve", "requests_per_s"), ">=", 1.0))
        rows.append((f"tmpfs, {kind}: CPU per request over nbdkit's",
                     _ratio(results, "tmpfs", kind, "varve", "cpu_us"), "<=", 1.0))
    for kind in ("first-c1", "first-c4"):
        rows.append((f"tmpfs, {kind}: requests/s over qcow2's",
                     _ratio(results, "tmpfs", kind, "varve", "requests_per_s", "qcow2"), ">=", 5.0))
    rows.append(("snapshot under load, p99 of the command, ms",
                 _special(results, "snapshots", "command_p99_ms"), "<=", 20.0))
    rows.append(("restart after kill -9 with a million mapped blocks, s",
                 _special(results, "restart", "ready_s"), "<=", 1.0))
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


def markdown(results):
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
    lines += special_markdown(results["special"])
    return "\n".join(lines).rstrip() + "\n"
