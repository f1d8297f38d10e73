"""What the training programs have in common: their command line, and the backbone that they begin with."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dynnet.backbone.chain import Chain
from dynnet.deploy.folding import folded_norms
from dynnet.errors import CheckpointError, DynnetError, RecipeError
from dynnet.files.bundles import is_bundle
from dynnet.files.checkpoints import load
from dynnet.files.creation import not_architecture, unknown_to_timm
from dynnet.files.weights import load_weights_
from dynnet.learning.data import Data, load_data
from dynnet.learning.overrides import pairs
from dynnet.learning.plain_yaml import read_yaml
from dynnet.learning.processes import World, world
from dynnet.learning.recipes import BackboneConfig, Recipe, read_recipe, recipe_keys
from dynnet.model import DynamicModel
from dynnet.zoo import folder, list_models
from training.folder import hold
from training.state import State

Run = Callable[[Recipe, Path, bool, World], object]


def run_program(
    name: str, doc: str | None, run: Run, argv: Sequence[str] | None, short: Mapping[str, str] | None = None
) -> int:
    """Read the command line and the recipe, and run.

    Args:
        name: of the program.
        doc: what --help says.
        run: called with the recipe, the folder of the run, whether it is resumed, and the processes.
        argv: the command line; None for the real one.
        short: keys of a recipe that have an option of their own, by its name.

    Returns:
        The exit status.
    """
    options, overrides = _command_line(name, doc, argv, short or {})
    try:
        out = Path(options.out)
        saved = out / "recipe.yaml"
        if options.resume and not (out / "state.safetensors").is_file():
            raise CheckpointError(f"nothing to resume in {str(out)!r}: it holds no state.safetensors")
        if options.resume and (overrides or options.recipe):
            raise CheckpointError(
                f"--resume goes on with {str(saved)!r}; leave out --recipe and {overrides or 'overrides'}"
            )
        named = saved if options.resume else options.recipe
        recipe = read_recipe(_template(overrides) if named is None else named, overrides)
        if options.data is not None:
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=options.data))
        with world() as here, hold(out, here):
            if here.first and not options.resume and (out / "state.safetensors").exists():
                raise CheckpointError(f"{str(out)!r} holds a run already; go on with --resume, or choose another --out")
            run(recipe, out, options.resume, here)
    except DynnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved_some = (Path(options.out) / "state.safetensors").is_file()
        on = f"go on with: python -m {name} --out {options.out} --resume" if saved_some else "nothing was saved yet"
        print(f"\nstopped; {on}", file=sys.stderr)
        return 130  # as shells do
    return 0


def open_data(recipe: Recipe, here: World) -> tuple[Data, dict[str, Any]]:
    """The recipe's data, and what `timm.create_model` is called with for them."""
    prepared, kwargs = _pretrained_cfg(recipe.backbone.name), recipe.backbone.kwargs
    if told := not_architecture({"model_name": recipe.backbone.name, **kwargs}):
        raise RecipeError(f"backbone.kwargs: {told}; give what makes the architecture")
    with here.first_goes_first():  # it may have to download
        data = load_data(recipe.data, prepared)
    if here.first:
        print(f"images: {data.origin}", flush=True)
    create = {
        "model_name": recipe.backbone.name,
        "num_classes": len(data.classes),
        "in_chans": data.input_size[0],
        **kwargs,
    }
    return data, create


def folder_of(name: str) -> Path:
    """Of a trained model: one of the zoo, or a finished run.

    Raises:
        CheckpointError: there is none.
    """
    path = folder() / name if name in list_models() else Path(name)
    if not ((path / "recipe.yaml").is_file() and (path / "model.safetensors").is_file()):
        raise CheckpointError(
            f"{name!r} is neither a finished run nor a model of the zoo, which has {', '.join(list_models())}"
        )
    return path


def make_backbone(config: BackboneConfig, create: dict[str, Any], state: State | None = None) -> nn.Module:
    """The backbone, with the weights that its configuration names, in whose shape it is if it was pruned.

    Args:
        config: of the backbone.
        create: what `timm.create_model` is called with.
        state: of a run that goes on, whose numbers will be restored: none are read here.

    Raises:
        RecipeError: timm cannot create it.
        CheckpointError: the weights cannot be read, or are of another model.
    """
    fetched = config.pretrained and state is None and config.weights is None
    try:
        backbone = timm.create_model(pretrained=fetched, **create)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise RecipeError(f"timm cannot create {create} (pretrained={fetched}): {error}") from error
    if state is not None:
        state.shape_(backbone, create)
    elif config.weights and is_bundle(config.weights):
        backbone = load(config.weights, backbone)
        if isinstance(backbone, DynamicModel):
            if isinstance(backbone.backbone, Chain) or backbone.gates is not None:
                what = "gates" if backbone.gates is not None else "several backbones"
                raise CheckpointError(
                    f"{config.weights!r} holds a model with {what}; give one backbone, or one with exits"
                )
            backbone = backbone.unwrap()
        if folded_norms(backbone):
            raise CheckpointError(f"{config.weights!r} is folded, for inference; give what it was made from")
    elif config.weights:
        load_weights_(backbone, _for_classes(backbone, _read_weights(config.weights)), config.weights)
    return backbone


def _for_classes(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the backbone's own classifier, where theirs is for another number of classes, as timm does it."""
    own, found = backbone.state_dict(), dict(tensors)
    named = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    for name in (named,) if isinstance(named, str) else named:
        keys = [key for key in own if key.startswith(f"{name}.")]
        classes = [len(tensors[key]) for key in keys if key in tensors and len(tensors[key]) != len(own[key])]
        if classes:
            print(f"{name!r} begins anew: that of the file is for {classes[0]} classes, here are {len(own[keys[0]])}")
            found |= {key: own[key] for key in keys}
    return found


def _pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm knows of a model's images.

    Raises:
        RecipeError: timm has no model of that name.
    """
    if told := unknown_to_timm(name):
        raise RecipeError(told)
    config = timm.get_pretrained_cfg(name)
    return config.to_dict() if config is not None else {}


def _read_weights(path: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights {path!r}: {error}; give a safetensors file") from error


def _command_line(
    name: str, doc: str | None, argv: Sequence[str] | None, short: Mapping[str, str]
) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        f"python -m {name}", description=doc, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        help="YAML file; the zoo's are models/*/recipe.yaml. Without one that of finetune.yaml beside this program,\n"
        "where --backbone.pretrained or --backbone.weights is given, and else that of scratch.yaml",
    )
    parser.add_argument("--data", help="folder of the dataset, in place of the recipe's data.root")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    for option, key in short.items():
        parser.add_argument(f"--{option}", metavar="VALUE", help=f"{key} of the recipe")
    wanted = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(wanted):
        parser.epilog = "every key of a recipe, as --KEY VALUE, is an option as well:\n" + recipe_keys()
    options, overrides = parser.parse_known_args(argv)
    given = {key: getattr(options, option) for option, key in short.items()}
    overrides += [f"--{key}={value}" for key, value in given.items() if value is not None]
    data = options.data or any(key.startswith("--data.") for key in overrides)
    if not (options.recipe or options.resume or data):
        parser.error("give --recipe, --data with the folder of your images, or --resume with the --out of a run")
    return options, overrides


def _template(overrides: Sequence[str]) -> Path:
    """The recipe for images of one's own, where none is named."""
    given = dict(pairs(overrides))
    pretrained = read_yaml(given.get("backbone.pretrained", "false"), "--backbone.pretrained")
    fine = pretrained is True or bool(given.get("backbone.weights"))
    path = Path(__file__).parent / ("finetune.yaml" if fine else "scratch.yaml")
    new = "" if fine else "; from new weights, for neither --backbone.pretrained true nor --backbone.weights was given"
    print(f"no --recipe given: as training/{path.name} says{new}", flush=True)
    return path
