"""Measure models of the zoo, and write the tables and pictures of their cards, of README.md and of the guide.

    python -m eval.cards --data path/to/cifar10    # all of the zoo anew; those of the digits need no folder
    python -m eval.cards --only [cifar10-resnet56] --data path/to/cifar10 --beside 'runs/static-*'
    python -m eval.cards                           # tables and pictures again, from the files

What is measured goes to models/NAME/results.json, the picture beside it. What stands between the marks of a card is
written by this program; a test compares it with the files. The runs that `--beside` names are measured too, and timed
in turns with the model: each must have been trained on the same images.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from dynnet import list_models
from dynnet.errors import CheckpointError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.files.bundles import write_atomically
from dynnet.learning.recipes import read_recipe
from dynnet.zoo import folder
from eval import figures
from eval.programs import errors_told, write_json
from eval.runs import open_zoo
from eval.saved import checked, read_json
from eval.shelf import Other, Shown, shelved

BEGIN, END = "<!-- written by python -m eval.cards -->", "<!-- until here -->"
README = Path(__file__).parent.parent / "README.md"
GUIDE = README.parent / "docs" / "choosing.md"
DIGITS = "digits"  # what needs no folder
GOALS = {
    "budget": "a budget of {:g}% of the MACs",
    "latency": "{:g}% of the time",
    "accuracy_drop": "an accuracy drop of {:g} points",
    "risk": "a risk of {:g}%",
}


def main(
    only: list[str] | None = None,
    data: str | None = None,
    beside: str | None = None,
    engine: str = "onnxruntime",
    batch_size: int = 64,
) -> None:
    """Measure, and write cards.

    Args:
        only: names of the zoo; by default all.
        data: folder of the dataset that they were trained on; without it, nothing is measured.
        beside: pattern of folders of runs to be measured and timed beside, with * in the last part.
        engine: in which all are timed.
        batch_size: at which they are timed, besides one image at a time.
    """
    keep_freed_memory()
    with errors_told():
        for name in only or list_models():
            if data is not None:
                print(f"{name} ...", flush=True)
                write_json(_measure(name, data, beside, engine, batch_size), folder() / name / "results.json")
            shown = read_shown(folder() / name / "results.json")
            write_atomically(folder() / name / "accuracy.png", picture(name, shown))
            rewrite(folder() / name / "README.md", card(shown))
        found = {name: read_shown(folder() / name / "results.json") for name in list_models()}
        rewrite(README, shelf(found))
        rewrite(GUIDE, shelf(found, linked=False))


def _measure(name: str, data: str, beside: str | None, engine: str, batch_size: int) -> Shown:
    recipe = read_recipe(folder() / name / "recipe.yaml")
    model, loaded = open_zoo(name, None if recipe.data.name == DIGITS else data)
    others: list[Path] = []
    if beside is not None:
        pattern = Path(beside)
        others = sorted(path for path in pattern.parent.glob(pattern.name) if (path / "model.safetensors").is_file())
        if not others:
            raise CheckpointError(f"no folder of a finished run matches {beside!r}")
    return shelved(model, folder() / name / "model.safetensors", recipe, loaded, others, engine, batch_size)


def read_shown(path: Path) -> Shown:
    """What was measured of a model.

    Raises:
        CheckpointError: the file is missing, or says something else.
    """
    found = checked(Shown, read_json(path), path)
    sizes = {"1", str(found["batch_size"])}
    times = [found["ms"], found["dense_ms"], *(row["ms"] for row in found["beside"])]
    goal = found["calibration"]
    if any(one.keys() != sizes for one in times) or (goal is not None and goal["goal"] not in GOALS):
        raise CheckpointError(f"{str(path)!r} is damaged: it has other batch sizes, or another goal; write it anew")
    if min([found["dense_macs"], *(ms for one in times for ms in one.values())]) <= 0:
        raise CheckpointError(f"{str(path)!r} is damaged: something in it costs nothing; write it anew")
    return found


def rewrite(path: Path, text: str) -> None:
    """Put a text between the marks of a page.

    Raises:
        CheckpointError: the page has no such marks.
    """
    page = path.read_text()
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise CheckpointError(f"{path} has no lines {BEGIN!r} and {END!r}; put them where the tables shall stand")
    write_atomically(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())


def card(shown: Shown) -> str:
    """The tables of a model's card."""
    return "\n\n".join(
        filter(None, [_summary(shown), _of_exits(shown), _others(shown), _picture_line(shown), _how(shown)])
    )


def _summary(shown: Shown) -> str:
    batches = list(shown["ms"])
    whole = shown["never_exiting_macs"]
    bare = "the last member alone" if whole > shown["dense_macs"] else "bare backbone"
    none: dict[str, float] = {}
    rows = [(bare, shown["dense_accuracy"], shown["dense_macs"], shown["dense_ms"])]
    rows += [("never exiting", shown["never_exiting_accuracy"], whole, none)] * (whole != shown["dense_macs"])
    rows += [(_thresholds(shown), shown["accuracy"], shown["mean_macs"], shown["ms"])]
    if shown["frozen"] is not None:
        rows += [
            ("control: gates frozen at their mean decision", shown["frozen"]["accuracy"], shown["frozen"]["macs"], none)
        ]
    head = [f"{shown['dataset']}, {shown['test_images']:,} test images", "accuracy", "MACs an image", "FLOPs an image"]
    return table(
        [*head, *(f"ms an image, batch {size}" for size in batches)],
        [
            [
                what,
                f"{accuracy:.2%}",
                f"{macs / 1e6:.2f} M" + _share(macs / shown["dense_macs"]),
                f"{2 * macs / 1e6:.2f} M",
                *(f"{ms[size]:.3f}" + _faster(shown["dense_ms"][size] / ms[size]) if ms else "" for size in batches),
            ]
            for what, accuracy, macs, ms in rows
        ],
    )


def _share(share: float) -> str:
    return "" if share == 1 else f" ({share:.1%})"


def _faster(ratio: float) -> str:
    return "" if ratio == 1 else f" ({ratio:.2f}x)"


def _thresholds(shown: Shown) -> str:
    goal = shown["calibration"]
    if goal is None:
        return "thresholds set by hand"
    return f"thresholds for {GOALS[goal['goal']].format(100 * goal['value'])}"


def _of_exits(shown: Shown) -> str:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    return table(
        ["exit", "MACs up to it", "right, if all left here", "leave here", "of these right"],
        [
            [
                f"`{exit['name']}`" + " (off)" * (exit["threshold"] == "inf"),
                f"{exit['macs_share']:.1%}",
                f"{exit['accuracy_of_all']:.2%}",
                percent(exit["rate"]),
                percent(exit["accuracy"]),
            ]
            for exit in shown["exits"]
        ],
    )


def _others(shown: Shown) -> str:
    if not shown["beside"]:
        return ""
    batches = list(shown["ms"])
    rows = sorted(shown["beside"], key=lambda row: (row["dynamic"], -row["accuracy"]))
    return table(
        [
            "beside it",
            "epochs",
            "accuracy",
            "MACs an image",
            *(f"ms an image, batch {size}" for size in batches),
            "file",
        ],
        [
            [
                _named(row),
                *_columns(row),
                *(f"{row['ms'][size]:.3f}" for size in batches),
                f"{row['size_bytes'] / 1e6:.2f} MB",
            ]
            for row in rows
        ],
    )


def _named(row: Other) -> str:
    return f"{row['what']} (`{row['name']}`)"


def _columns(row: Other) -> list[str]:
    return ["" if row["epochs"] is None else str(row["epochs"]), f"{row['accuracy']:.2%}", f"{row['macs'] / 1e6:.2f} M"]


def _picture_line(shown: Shown) -> str:
    return f"![Accuracy against time in {shown['engine']}](accuracy.png)"


def _how(shown: Shown) -> str:
    threads = f"{shown['threads']} thread" + "s" * (shown["threads"] > 1)
    goal = shown["calibration"]
    fitted = "" if goal is None else f" Thresholds are fitted on {goal['samples']:,} held-out images."
    return (
        f"Times: {shown['engine']}, {threads}, {shown['processor']}; all exported alike, in turns on the same test "
        f"images; typical ones of single images, medians of batches. Look at ratios.{fitted} The file has "
        f"{shown['size_bytes'] / 1e6:.2f} MB."
    )


def shelf(models: Mapping[str, Shown], linked: bool = True) -> str:
    """The zoo's table, with links to the cards."""
    rows = []
    for name, shown in models.items():
        faster = [f"{shown['dense_ms'][size] / ms:.2f}x" for size, ms in shown["ms"].items()]
        rows.append(
            [
                f"[{name}](models/{name}/README.md)" if linked else f"`{name}`",
                shown["dataset"],
                f"{shown['accuracy']:.2%} ({shown['dense_accuracy']:.2%})",
                f"{shown['mean_macs'] / shown['dense_macs']:.0%} of {shown['dense_macs'] / 1e6:.1f} M",
                ", ".join(faster),
            ]
        )
    sizes = " and ".join(next(iter(models.values()))["ms"])
    return table(
        ["model", "data", "accuracy (bare backbone)", "mean MACs", f"as fast in the engine, batch {sizes}"], rows
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(name: str, shown: Shown) -> bytes:
    """Accuracy against time in the engine, one image at a time, as a PNG."""
    with plt.rc_context({**figures.STYLE, "savefig.dpi": 110}):
        figure = _drawn(name, shown)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(figure)
    return buffer.getvalue()


def _drawn(name: str, shown: Shown) -> Figure:
    figure, axes = plt.subplots(figsize=(8.4, 4.4))
    curve = sorted((point["ms"], 100 * point["accuracy"]) for point in shown["curve"])
    if len(curve) > 1:
        axes.plot(*zip(*curve, strict=True), "-", color=figures.DYNAMIC, lw=2, label="its thresholds, for many budgets")
    axes.plot(shown["ms"]["1"], 100 * shown["accuracy"], "o", color=figures.DYNAMIC, ms=10, label=name, zorder=4)
    dense = 100 * shown["dense_accuracy"]
    axes.plot(shown["dense_ms"]["1"], dense, "*", color=figures.DENSE, ms=15, label="bare backbone", zorder=4)
    others = [{**row, "method": row["what"], "ms": row["ms"]["1"]} for row in shown["beside"]]
    for rows, look in figures.joined(others, "ms"):
        axes.plot([row["ms"] for row in rows], [100 * row["accuracy"] for row in rows], **look)
    threads = f"{shown['threads']} thread{'s' * (shown['threads'] > 1)}"
    title = f"{shown['dataset']}: accuracy against time in {shown['engine']}, {threads}"
    axes.set(xlabel="milliseconds of one image", ylabel="accuracy (%)", title=title)
    axes.set_xlim(left=0)
    figure.legend(loc="outside right center", fontsize=9)
    return figure


if __name__ == "__main__":
    auto_cli(main)
