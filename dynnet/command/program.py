"""The command line of `dynnet`, also `python -m dynnet`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dynnet.command import verbs
from dynnet.deploy.engines import ENGINES
from dynnet.errors import DynnetError, did_you_mean
from dynnet.serving.arguments import count

EXAMPLES = """examples:
  dynnet list
  dynnet info cifar10-resnet56
  dynnet predict cifar10-resnet56 cat.png dog.png
  dynnet export cifar10-resnet56 stages && dynnet predict stages cat.png
  dynnet bench cifar10-resnet56 photos/*.png --engine onnxruntime
  dynnet report runs/cifar
"""
VERBS = ("list", "info", "predict", "report", "export", "bench")
_MODEL = "a model of the zoo, a file of dynnet.save, or a folder of dynnet.export"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status is 2 where something is wrong."""
    parser, words = _parser(), list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        parser.error(f"unknown verb {words[0]!r}{did_you_mean(words[0], VERBS)}; choose from {', '.join(VERBS)}")
    given = vars(parser.parse_args(words))
    run: Callable[..., None] = given.pop("run")
    try:
        run(**given)
    except DynnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dynnet",
        description="Image models that spend compute where the input needs it: look, ask, export, time.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb = parser.add_subparsers(title="verbs", required=True, metavar="VERB").add_parser
    for made in (_list(verb), _info(verb), _predict(verb), _report(verb)):
        made.add_argument("--json", action="store_true", help="for machines")
    _export(verb)
    _bench(verb)
    return parser


def _list(verb: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    made = verb("list", help="models of the zoo")
    made.add_argument("filter", nargs="?", default="*", help="with * for any letters")
    made.set_defaults(run=verbs.list_models)
    return made


def _info(verb: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    made = verb("info", help="what a model is: exits, prices, thresholds, and what was promised of them")
    made.add_argument("model", help=_MODEL + ", or timm's name of one: where exits may stand in it")
    made.set_defaults(run=verbs.info)
    return made


def _predict(verb: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    made = verb("predict", help="answer image files: class, confidence, the exit that was taken, and what it cost")
    made.add_argument("model", help=_MODEL)
    made.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, each answered alone")
    made.add_argument("--threads", type=count, help="of the engine, or of PyTorch; by default its own number")
    made.set_defaults(run=verbs.predict)
    return made


def _report(verb: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    made = verb(
        "report", help="sum up the per-input table of a report: who left where, how right they were, at what cost"
    )
    made.add_argument("table_or_run", type=Path, metavar="TABLE|RUN", help="a table.csv, or a run that has a report")
    made.set_defaults(run=verbs.report)
    return made


def _export(verb: Callable[..., argparse.ArgumentParser]) -> None:
    made = verb("export", help="write a model as stages that an engine runs")
    made.add_argument("model", help="a model of the zoo, a file, or timm's name of one, which gives one stage")
    made.add_argument("folder", type=Path, help="to be made")
    made.add_argument("--engine", choices=list(ENGINES), default="onnxruntime", help="default: %(default)s")
    made.add_argument("--pretrained", action="store_true", help="of a model of timm's, with its weights")
    made.set_defaults(run=verbs.export)


def _bench(verb: Callable[..., argparse.ArgumentParser]) -> None:
    made = verb(
        "bench",
        help="time a model against its bare backbone, in turns",
        description="Time a model against its bare backbone, in turns, on image files or on noise: there samples leave "
        "elsewhere than on images. `python -m eval.deploy` in a checkout times the test images of a run.",
    )
    made.add_argument("model", help="a model of the zoo, or a file")
    made.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="files, taken again and again")
    made.add_argument("--engine", choices=list(ENGINES), help="in which both run; by default PyTorch")
    made.add_argument("--batch", type=count, default=1, help="images of a call (default: %(default)s)")
    made.add_argument("--calls", type=count, default=200, help="timed calls (default: %(default)s)")
    made.add_argument("--threads", type=count, help="by default as many as the model's layers can feed")
    made.set_defaults(run=verbs.bench)


if __name__ == "__main__":
    sys.exit(main())
