"""The figures of the report. All but the gallery are drawn from the per-input table alone.

N samples, E exits, P operating points
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from dynnet.evaluation.tables import Table, classifiers, operating_line, operating_points

INK, MUTED, GRID = "#1c2430", "#6b7684", "#e4e8ed"
DYNAMIC, DENSE, WRONG, ACCENT = "#0f7b8a", "#c2410c", "#d9a28c", "#7a5195"
PALETTE = ("#3b6fb6", "#8a5a2b", "#4d8b31", "#a23b72", "#6b7684", "#c79a1b")

STYLE = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


OPEN = "open:"  # begins the names of the columns that tell what a gated region leaves open


def exit_name(table: Table, exit: int) -> str:
    return "end" if exit == classifiers(table) - 1 else f"exit {exit}"


def trade_off(table: Table, controls: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Accuracy against mean MACs: exits for everybody, thresholds for many budgets, the bare backbone."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    last = classifiers(table) - 1
    anytime = [(table[f"macs_{e}"].mean() / 1e6, 100 * table[f"correct_{e}"].mean()) for e in range(last + 1)]
    if last:
        axes.plot(*zip(*anytime, strict=True), "o--", color=MUTED, ms=5, lw=1, label="everybody leaves at one exit")
        for e, (x, y) in enumerate(anytime):
            axes.annotate(exit_name(table, e), (x, y), (6, -12), textcoords="offset points", color=MUTED, fontsize=9)
    macs, accuracies = operating_line(table)
    if len(macs) > 1:
        axes.plot(macs / 1e6, 100 * accuracies, "-", color=DYNAMIC, lw=2, label="thresholds fitted on held-out images")
    axes.plot(
        table["macs"].mean() / 1e6,
        100 * table["correct"].mean(),
        "o",
        color=DYNAMIC,
        ms=10,
        label="this model",
        zorder=4,
    )
    if "frozen_macs" in table:
        frozen = table["frozen_macs"].mean() / 1e6, 100 * table["frozen_correct"].mean()
        axes.plot(*frozen, "D", color=ACCENT, ms=8, label="its gates frozen at their mean decision", zorder=4)
    dense_macs = table["dense_macs"].mean() / 1e6
    for control, mark in zip(controls, "x" + "v^<>sph8", strict=False):
        shown = control["macs_share"] * dense_macs, 100 * control["accuracy"]
        axes.plot(*shown, mark, color=ACCENT, ms=7, label=control["name"], zorder=4)
    dense = 100 * table["dense_correct"].mean()
    axes.plot(dense_macs, dense, "*", color=DENSE, ms=15, label="bare backbone", zorder=4)
    axes.axhline(dense, color=DENSE, lw=0.8, ls=":")
    axes.set(xlabel="mean MMAC per image (MFLOP = 2 x MMAC)", ylabel="accuracy (%)", title="Accuracy against compute")
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
    return figure


def beside_pruned(table: Table, results: Mapping[str, Any]) -> Figure:
    """Accuracy against mean MACs, and against the mean time of one image: this model, the bare and pruned backbones."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.2), sharey=True)
    static, dense = results["static"], 100 * results["dense_accuracy"]
    line = operating_line(table)
    panels[0].plot(100 * line[0] / results["dense_macs"], 100 * line[1], "-", color=DYNAMIC, lw=2)
    shares = 100 * results["macs_share"], 100 / results["static_timing"]["speedup"]
    for axes, share in zip(panels, shares, strict=True):
        axes.plot(100, dense, "*", color=DENSE, ms=15, label="bare backbone", zorder=4)
        axes.axhline(dense, color=DENSE, lw=0.8, ls=":")
        axes.plot(share, 100 * results["accuracy"], "o", color=DYNAMIC, ms=10, label="this model", zorder=4)
    for rows, look in joined(static, "macs_share"):
        panels[0].plot([100 * row["macs_share"] for row in rows], [100 * row["accuracy"] for row in rows], **look)
        timed = [row for row in rows if row["speedup"] is not None]
        panels[1].plot([100 / row["speedup"] for row in timed], [100 * row["accuracy"] for row in timed], **look)
    panels[0].set(xlabel="mean MACs (% of the bare backbone's)", ylabel="accuracy (%)", title="Accuracy and compute")
    panels[1].set(xlabel="mean time of one image (% of the bare backbone's)", title="Accuracy and measured time")
    for axes in panels:  # when all is drawn: it ends the search for limits
        axes.set_xlim(left=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return figure


def in_engine(table: Table, results: Mapping[str, Any]) -> Figure:
    """Accuracy against the mean time of one image in an engine: this model and its trade-off, the others beside it."""
    figure, axes = plt.subplots(figsize=(10, 4.6))
    engine, last = results["engine"], classifiers(table) - 1
    leaving = np.array(engine["leaving_ms"])
    if last:
        anytime = [100 * table[f"correct_{e}"].mean() for e in range(last + 1)]
        axes.plot(leaving, anytime, "o--", color=MUTED, ms=5, lw=1, label="everybody leaves at one exit")
        for e, y in enumerate(anytime):
            axes.annotate(
                exit_name(table, e), (leaving[e], y), (6, -12), textcoords="offset points", color=MUTED, fontsize=9
            )
    points = sorted(
        (float(leaving[table[f"point{k}_exit"]].mean()), 100 * float(table[f"point{k}_correct"].mean()))
        for k in operating_points(table)
        if f"point{k}_exit" in table  # not in tables of before
    )
    if len(points) > 1:
        axes.plot(*zip(*points, strict=True), "-", color=DYNAMIC, lw=2, label="thresholds fitted on held-out images")
    axes.plot(engine["ms"], 100 * results["accuracy"], "o", color=DYNAMIC, ms=10, label="this model", zorder=4)
    dense = 100 * results["dense_accuracy"]
    axes.plot(engine["dense_ms"], dense, "*", color=DENSE, ms=15, label="bare backbone", zorder=4)
    axes.axhline(dense, color=DENSE, lw=0.8, ls=":")
    for rows, look in joined(engine["static"], "ms"):
        axes.plot([row["ms"] for row in rows], [100 * row["accuracy"] for row in rows], **look)
    title = f"Accuracy against time in {engine['engine']}, {engine['threads']} thread{'s' * (engine['threads'] > 1)}"
    axes.set(xlabel="mean milliseconds of one image", ylabel="accuracy (%)", title=title)
    axes.set_xlim(left=0)
    figure.legend(loc="outside right center", fontsize=9)
    return figure


def joined(static: Sequence[Mapping[str, Any]], by: str) -> Iterator[tuple[list[Mapping[str, Any]], dict[str, Any]]]:
    """Of one method and as many epochs of training: budgets that can be joined by a line, and how that looks.

    Args:
        static: the other models.
        by: what they cost.
    """
    looks = itertools.product(("s", "^", "v", "D"), PALETTE)
    for method, epochs in dict.fromkeys((row["method"], row["epochs"]) for row in static):
        rows = [row for row in static if (row["method"], row["epochs"]) == (method, epochs)]
        marker, colour = ("P", DYNAMIC) if rows[0]["dynamic"] else next(looks)
        look = {"marker": marker, "ls": "-", "color": colour, "ms": 6, "lw": 0.7, "alpha": 0.9}
        yield sorted(rows, key=lambda row: row[by]), {**look, "label": f"{method}, {epochs} epochs"}


def exits_taken(table: Table) -> Figure:
    """How many samples left where, by right and wrong."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    total = len(table["exit"])
    for e in range(classifiers(table)):
        here = table["exit"] == e
        right = 100 * (here & (table["correct"] == 1)).sum() / total
        wrong = 100 * (here & (table["correct"] == 0)).sum() / total
        axes.bar(e, right, color=DYNAMIC, width=0.62, label="right" if e == 0 else None)
        axes.bar(e, wrong, bottom=right, color=WRONG, width=0.62, label="wrong" if e == 0 else None)
        if here.any():
            text = f"{right + wrong:.1f}%\n{100 * table['correct'][here].mean():.1f}% right"
            axes.text(e, right + wrong + 1, text, ha="center", va="bottom", fontsize=9, color=INK)
    axes.set_xticks(range(classifiers(table)), [exit_name(table, e) for e in range(classifiers(table))])
    axes.set_ylim(0, axes.get_ylim()[1] * 1.18)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.set(ylabel="images (%)", title="Where images leave")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def latency_by_exit(table: Table) -> Figure:
    """Time of the sampled images, one at a time, by the exit that they took."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    timed = ~np.isnan(table["latency_ms"].astype(float))
    groups = [("bare backbone", table["dense_latency_ms"][timed].astype(float), DENSE)]
    for e in range(classifiers(table)):
        here = timed & (table["exit"] == e)
        if here.any():
            groups.append((f"{exit_name(table, e)}\n({here.sum()})", table["latency_ms"][here].astype(float), DYNAMIC))
    groups.append(("all", table["latency_ms"][timed].astype(float), ACCENT))
    for i, (_, values, colour) in enumerate(groups):
        axes.boxplot(
            values,
            positions=[i],
            widths=0.5,
            whis=(1, 99),
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.35, "edgecolor": colour},
            medianprops={"color": colour, "lw": 2},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
        axes.text(i + 0.28, np.median(values), f"{np.median(values):.2f}", va="center", fontsize=9)
    axes.set_xticks(range(len(groups)), [name for name, _, _ in groups])
    axes.set_ylim(bottom=0)
    axes.set(ylabel="milliseconds", title="Latency, one image at a time (box: quartiles, whiskers: 1% to 99%)")
    axes.grid(axis="x", visible=False)
    return figure


def compute_by_class(table: Table) -> Figure:
    """Mean share of the MACs by true class, with the accuracy beside it."""
    names = np.unique(table["class"])
    share = {n: 100 * (table["macs"] / table["dense_macs"])[table["class"] == n].mean() for n in names}
    order = sorted(names, key=lambda n: share[n])
    if len(order) > 30:  # the extremes tell enough
        order = [*order[:15], *order[-15:]]
    figure, axes = plt.subplots(figsize=(7.2, 0.8 + 0.32 * len(order)))
    for i, name in enumerate(order):
        right = 100 * table["correct"][table["class"] == name].mean()
        axes.barh(i, share[name], color=DYNAMIC, height=0.66)
        axes.text(share[name] + 1, i, f"{share[name]:.0f}% of MACs, {right:.1f}% right", va="center", fontsize=9)
    axes.axvline(100, color=DENSE, lw=1, ls=":")
    axes.set_yticks(range(len(order)), [str(n) for n in order])
    axes.set_xlim(0, max(125, max(share.values()) * 1.3))
    axes.set(xlabel="mean MACs (% of the bare backbone)", title="Compute by class")
    axes.grid(axis="y", visible=False)
    return figure


def gate_map(table: Table) -> Figure:
    """Mean share of open units, by region and true class, of the images that got there: what a class switches off."""
    regions = _regions(table)
    names = np.unique(table["class"])
    if len(names) > 30:  # more than that cannot be read
        names = names[np.linspace(0, len(names) - 1, 30).round().astype(int)]
    opened = np.array([[_mean(100 * table[r][table["class"] == n]) for n in names] for r in regions])
    figure, axes = plt.subplots(figsize=(min(14.6, 3.4 + 0.62 * len(names)), 1.6 + 0.36 * len(regions)))
    image = axes.imshow(opened, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    if len(names) <= 12:
        for (i, j), value in np.ndenumerate(opened):
            text = "" if np.isnan(value) else f"{value:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if value > 60 else INK)
    axes.set_xticks(range(len(names)), [str(n) for n in names], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(regions)), [r.removeprefix(OPEN) for r in regions])
    axes.grid(visible=False)
    axes.set(title="Open gates by region and class (% of the units)")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _mean(values: np.ndarray) -> float:
    """Of those that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _regions(table: Table) -> list[str]:
    """Columns with the open share of each gated region."""
    return [name for name in table if name.startswith(OPEN)]


def drawable(table: Table, results: Mapping[str, Any]) -> dict[str, Callable[[], Figure]]:
    """Figures that need nothing but the table and the results, by file name."""
    figures: dict[str, Callable[[], Figure]] = {
        "trade_off": lambda: trade_off(table, (results.get("gates") or {}).get("controls", ())),
        "latency_by_exit": lambda: latency_by_exit(table),
        "compute_by_class": lambda: compute_by_class(table),
    }
    if classifiers(table) > 1:
        figures["exits_taken"] = lambda: exits_taken(table)
    if _regions(table):
        figures["gate_map"] = lambda: gate_map(table)
    if results.get("engine") is not None:
        figures["in_engine"] = lambda: in_engine(table, results)
    if "static_timing" in results:
        figures["beside_pruned"] = lambda: beside_pruned(table, results)
    return figures


def gallery(title: str, pictures: Sequence[tuple[np.ndarray, str]], columns: int = 10) -> Figure:
    """Images with a line of text below each.

    Args:
        title: of the whole.
        pictures: (H, W, C) uint8 images, and their texts.
        columns: pictures side by side.
    """
    rows = max(1, -(-len(pictures) // columns))
    figure, grid = plt.subplots(rows, columns, figsize=(1.15 * columns, 1.62 * rows + 0.4), squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    for axes in grid.flat:
        axes.axis("off")
    for axes, (image, text) in zip(grid.flat, pictures, strict=False):
        axes.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray_r", interpolation="nearest")
        axes.text(0.5, -0.06, text, fontsize=7.5, ha="center", va="top", transform=axes.transAxes)
    return figure
