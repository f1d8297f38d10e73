"""The demo app: drop an image, and watch at which exit it leaves, how sure the model was, and what that cost.

    python -m eval.app                                        # the digits
    python -m eval.app --model cifar10-resnet56 --images path/to/pictures

Times are taken beside the bare backbone in the same engine, in turns. `pip install -e ".[app]"` brings what is needed,
and then no network is.
"""

from __future__ import annotations

import html
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio
from jsonargparse import auto_cli
from PIL import Image

from dynnet import DynamicModel
from dynnet.command.subjects import find
from dynnet.errors import DynnetError, InputError
from dynnet.evaluation.threads import fit_threads
from dynnet.learning.sources import digits
from dynnet.serving.door import check_free
from dynnet.serving.images import pictures_in
from eval.one_image import Observer, Seen
from eval.programs import errors_told

_SHEET = 12  # images to pick from
STYLE = (Path(__file__).parent / "page" / "app.css").read_text()


def main(
    model: str = "digits",
    images: Path | None = None,
    engine: str | None = "onnxruntime",
    port: int = 7860,
    host: str = "127.0.0.1",
) -> None:
    """Serve the app until it is interrupted.

    Args:
        model: of the zoo, or a file of `dynnet.save`.
        images: folder of the sheet to pick from; that of the digits has its own.
        engine: in which the model and its bare backbone are timed; null for PyTorch.
        port: of this machine.
        host: address to listen on; 0.0.0.0 lets others in.
    """
    with errors_told():
        check_free(host, port)
        subject = find(model)
        if not isinstance(subject.model, DynamicModel):
            raise InputError(f"{model!r} decides nothing by the input; name a model of the zoo, or a file of one")
        fit_threads(subject.model, subject.model.input_size, 1)
        print(f"making {model} ready ...", flush=True)
        observer = Observer(subject.model, engine)
        with tempfile.TemporaryDirectory() as folder:
            shown = page(model, observer, sheet(model, images, Path(folder)))
            print(f"http://{host}:{port} shows it; Ctrl-C ends it", flush=True)
            shown.launch(server_name=host, server_port=port, css=STYLE, theme=_theme(), footer_links=[], quiet=True)


def sheet(model: str, images: Path | None, folder: Path) -> list[Path]:
    """Images to pick from.

    Args:
        model: the name of it.
        images: where they lie; None for those that are at hand.
        folder: to which those are written.

    Raises:
        DataError: there are none.
    """
    if images is None:
        if model != "digits":
            return []
        source, _ = digits()
        for row in range(0, _SHEET * 37, 37):
            Image.fromarray(source.pixels(row)[:, :, 0]).save(folder / f"{row:04}.png")
        images = folder
    found = pictures_in(images)
    return found[:: max(1, len(found) // _SHEET)][:_SHEET]


def page(name: str, observer: Observer, pictures: Sequence[Path]) -> gradio.Blocks:
    """The page: an image and a slider to the left, what became of it to the right."""
    fitted = list(observer.model.thresholds)
    highest = max(1.0, *(threshold for threshold in fitted if math.isfinite(threshold)), 0.0)

    def look(path: str | None, own: bool, threshold: float) -> tuple[str, dict[str, float] | None]:
        if path is None:
            return "<p class='lead'>Drop an image, or pick one.</p>", None
        try:
            seen = observer.look(Path(path), [threshold] * len(fitted) if own else fitted)
        except DynnetError as error:
            raise gradio.Error(str(error)) from None
        return told(seen, observer.told), seen.shares

    with gradio.Blocks(title=f"{name} · dynnet", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {name}\nAn image leaves at the first exit that is sure enough.")
        with gradio.Row():
            with gradio.Column(scale=1):
                image = gradio.Image(type="filepath", label="Image", sources=["upload"], height=260, elem_id="given")
                own = gradio.Checkbox(label="one threshold for all exits, in place of those that were fitted")
                threshold = gradio.Slider(0.0, highest, 0.9, step=0.01, label="Leave where the confidence reaches")
                if pictures:
                    gradio.Examples(
                        [[str(path)] for path in pictures], [image], label="Pick one", examples_per_page=_SHEET
                    )
            with gradio.Column(scale=2):
                answer = gradio.HTML(look(None, False, 0.9)[0])
                shares = gradio.Label(label="Classes, by the exit that was taken", num_top_classes=3)
        asked, outputs = [image, own, threshold], [answer, shares]
        image.change(look, asked, outputs)
        own.change(look, asked, outputs)
        threshold.change(look, asked, outputs)
        threshold.input(lambda: True, None, own)  # who moves it means it
    return blocks


def told(seen: Seen, engine: str) -> str:
    """What became of an image, in HTML."""
    at = seen.exits[seen.taken]
    share, where = at.macs / seen.dense_macs, "goes to the end" if at.threshold is None else f"leaves at {at.name}"
    lines = [
        f"<p class='lead'><b>{html.escape(at.says)}</b>: {html.escape(where)}, with confidence {at.confidence:.3f}</p>",
        f"<p>{at.macs / 1e6:.2f} of the bare backbone's {seen.dense_macs / 1e6:.2f} MMAC ({share:.0%}); "
        f"{seen.ms:.2f} ms beside {seen.dense_ms:.2f} in {html.escape(engine)}, one image at a time</p>",
        "<table><thead><tr><th>exit</th><th>says</th><th>confidence</th><th>threshold</th><th>MMAC</th></tr></thead>",
    ]
    for number, each in enumerate(seen.exits):
        ran = "taken" if number == seen.taken else "passed" if number < seen.taken else "spared"
        wanted = "" if each.threshold is None else "off" if each.threshold == math.inf else f"{each.threshold:.3f}"
        lines.append(
            f"<tr class='{ran}'><th>{html.escape(each.name)}</th><td>{html.escape(each.says)}</td>"
            f"<td>{_meter(each.confidence)} {each.confidence:.3f}</td>"
            f"<td>{wanted}</td><td>{each.macs / 1e6:.2f}</td></tr>"
        )
    lines.append("</table><p class='note'>Grey rows did not run; they tell what would have been said.</p>")
    if seen.open:
        lines.append("<table><thead><tr><th>gates at</th><th>channels that ran</th></tr></thead>")
        lines += [
            f"<tr><th>{html.escape(layer)}</th><td>{_meter(part)} {part:.0%}</td></tr>"
            for layer, part in seen.open.items()
        ]
        lines.append("</table>")
    return "<div class='dynnet'>" + "\n".join(lines) + "</div>"


def _meter(share: float) -> str:
    shown = 0.0 if math.isnan(share) else min(max(share, 0.0), 1.0)
    return f"<meter min='0' max='1' value='{shown:.4f}'></meter>"


def _theme() -> gradio.themes.Base:
    """Fonts of this machine: others would be fetched."""
    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
