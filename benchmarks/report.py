"""Tables and plots from results of `benchmarks.encoder` and `benchmarks.real_text`.

python -m benchmarks.report .bench/results/*.json                               # Markdown tables
python -m benchmarks.report .bench/results/*.json --plots docs/benchmarks       # and PNG plots
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.table import PEERS

Report = dict[str, Any]
Row = dict[str, Any]

_OURS, _FLOOR = "tilewright ", "floor "


def markdown(reports: Sequence[Report]) -> str:
    """All tables: times and ratios, what was not run, versions, shares of kernels, and questions per second."""
    lines: list[str] = []
    for report in reports:
        lines += [f"- {key}: {value}" for key, value in report["machine"].items()]
        settings = report["settings"].items()
        lines += [f"- {key}: {_setting(value)}" for key, value in settings]
        lines += [f"- {engine}: {_setting(versions)}" for engine, versions in report["versions"].items()]
        lines += ["", *(_latency(report) if "rows" in report else _throughput(report))]
        if report["not_run"]:
            entries = (f"- {_case(entry['case'])}: {entry['what']}: {entry['reason']}" for entry in report["not_run"])
            lines += ["Not run:", "", *entries, ""]
    return "\n".join(lines)


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_setting(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _case(case: Row) -> str:
    threads = case["threads"]
    return f"{case['model']}, {case['sparsity']:.0%} zero, {threads} thread{'s' * (threads > 1)}"


def _latency(report: Report) -> list[str]:
    lines = []
    for case, rows in _groups(report["rows"], _case).items():
        shapes = _unique(row["shape"] for row in rows)
        lines += [f"### {case}", ""]
        lines += ["Median milliseconds (median of the ratios to ONNX Runtime fp32 in the same turns; lower is faster)", ""]
        found = {(row["engine"], row["shape"]): row for row in rows}
        table = [["engine", *shapes, "cosine"]]
        for engine in _ordered(row["engine"] for row in rows):
            cells = [_cell(found.get((engine, shape))) for shape in shapes]
            cosines = [row["cosine"] for row in rows if row["engine"] == engine and row.get("cosine") is not None]
            table.append([engine, *cells, f"{min(cosines):.3f}" if cosines else ""])
        lines += [*_table(table), ""]
    for case, profiles in _groups(report["profiles"], _case).items():
        kernels = _unique(name for entry in profiles for name in entry["microseconds"])
        table = [[f"{case}: share of", "shape", *kernels]]
        for entry in profiles:
            total = sum(entry["microseconds"].values())
            shares = (entry["microseconds"].get(name, 0.0) / total for name in kernels)
            table.append([entry["engine"], entry["shape"], *(f"{share:.1%}" for share in shares)])
        lines += [*_table(table), ""]
    return lines


def _throughput(report: Report) -> list[str]:
    rows = report["throughput"]
    batches = _unique(row["batch"] for row in rows)
    found = {(row["engine"], row["batch"]): row for row in rows}
    table = [["questions per second", *(f"batch {batch}" for batch in batches)]]
    for engine in _unique(row["engine"] for row in rows):
        cells = [found.get((engine, batch)) for batch in batches]
        table.append([engine, *(f"{cell['per_second']:.1f}" if cell else "" for cell in cells)])
    return [*_table(table), ""]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    digits = 2 if row["ms"] < 100 else 1
    return f"{row['ms']:.{digits}f}" + (f" ({row['ratio']:.3f})" if row["ratio"] is not None else "")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the first the header, as Markdown; all but the first column to the right."""
    rule = "|---|" + "--:|" * (len(rows[0]) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], rule, *lines[1:]]


def _ordered(names: Iterable[str]) -> list[str]:
    """Peers in the order of their table, then ours, then the floors."""
    order = [peer.name for peer in PEERS]
    return sorted(
        _unique(names), key=lambda name: (name.startswith(_FLOOR), name not in order, order.index(name) if name in order else 0)
    )


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def _groups(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def plot(reports: Sequence[Report], directory: Path) -> list[Path]:
    """Draw what the reports hold enough points for; paths of the PNG files, which replace older ones."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [row for report in reports for row in report.get("rows", [])]
    profiles = [entry for report in reports for entry in report.get("profiles", [])]
    made = []
    first = [row for row in rows if (row["model"], row["threads"]) == ("distilbert", 1)]
    if lengths := [row for row in first if row["sparsity"] == 0.8 and row["shape"].startswith("1x")]:
        made.append(_by_length(lengths, directory / "time_by_length.png"))
    main = ("distilbert", 0.8, 1)
    if kernels := [entry for entry in profiles if (entry["model"], entry["sparsity"], entry["threads"]) == main]:
        made.append(_by_kernel(kernels, directory / "time_by_kernel.png"))
    if first:
        made.append(_efficiency(first, directory / "efficiency.png"))
    return made


def _by_length(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = new_figure("DistilBERT, 80 % zero, batch 1, 1 thread")
    engines = _ordered(row["engine"] for row in rows)
    for index, engine in enumerate(engines):
        points = sorted((int(row["shape"][2:]), row["ms"]) for row in rows if row["engine"] == engine)
        look = {"color": line_color(index, len(engines)), "marker": "osv^D"[index % 5]}
        look |= {"linestyle": ":"} if engine.startswith(_FLOOR) else {"linewidth": 2.5} if engine.startswith(_OURS) else {}
        axes.plot(*zip(*points, strict=True), label=engine, **look)
    ticks = sorted({int(row["shape"][2:]) for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    return save_figure(figure, axes, path)


def _by_kernel(profiles: Sequence[Row], path: Path) -> Path:
    figure, axes = new_figure("Where our time goes: DistilBERT, 80 % zero, 1 thread")
    profiles = sorted(profiles, key=lambda entry: (entry["engine"], _size(entry["shape"])))
    names = [f"{entry['engine'].removeprefix(_OURS)}, {entry['shape']}" for entry in profiles]
    kernels = _unique(name for entry in profiles for name in entry["microseconds"])
    left = [0.0] * len(profiles)
    for index, kernel in enumerate(kernels):
        shares = [100 * entry["microseconds"].get(kernel, 0.0) / sum(entry["microseconds"].values()) for entry in profiles]
        axes.barh(names, shares, left=left, label=kernel, color=line_color(index, len(kernels)))
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="% of a call's time")
    return save_figure(figure, axes, path)


def _efficiency(rows: Sequence[Row], path: Path) -> Path:
    """The floor's time over ours, by shape, one line for each level and sparsity."""
    figure, axes = new_figure("Share of the core's peak: DistilBERT, 1 thread")
    times = {(row["engine"], row["sparsity"], row["shape"]): row["ms"] for row in rows}
    shapes = sorted({row["shape"] for row in rows}, key=_size)
    axes.xaxis.update_units(shapes)  # no line has all of them: the axis would take them in the order of their appearance
    lines = sorted({key[:2] for key in times if key[0].startswith(_OURS)})
    for index, (engine, sparsity) in enumerate(lines):
        level = engine.removeprefix(_OURS)
        points = [
            (shape, 100 * times[_FLOOR + level, sparsity, shape] / times[engine, sparsity, shape])
            for shape in shapes
            if (engine, sparsity, shape) in times and (_FLOOR + level, sparsity, shape) in times
        ]
        if points:
            label = f"{level}, {1 - sparsity:.0%} non-zero"
            axes.plot(*zip(*points, strict=True), marker="osv^D"[index % 5], color=line_color(index, len(lines)), label=label)
    axes.set(xlabel="batch x length", ylabel="% of peak, on non-zero weights", ylim=(0, 100))
    return save_figure(figure, axes, path)


def _size(shape: str) -> list[int]:
    """Batch and length of a shape such as 1x128."""
    return [int(part) for part in shape.split("x")]


def new_figure(title: str) -> tuple[Any, Any]:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def line_color(index: int, count: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["turbo"](0.05 + 0.9 * index / max(1, count - 1))


def save_figure(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="where to write PNG plots")
    options = parser.parse_args()
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    print(markdown(reports))
    if options.plots:
        for path in plot(reports, options.plots):
            print(f"![{path.stem.replace('_', ' ')}]({path})")


if __name__ == "__main__":
    main()
