"""YAML as far as recipes need it: mappings, lists, texts, numbers, truth values. No aliases, no tags, nothing twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.events import NodeEvent

from dynnet.errors import RecipeError

LONGEST = 100_000  # bytes of a file: a hundred times what recipes have
DEEPEST = 20  # mappings and lists inside each other
_WIDEST = 63  # bits of a whole number


def read_yaml_file(path: Path) -> Any:
    """What a YAML file holds; None where it is empty.

    Raises:
        RecipeError: as `read_yaml`; or the file cannot be read, or is larger than any recipe.
    """
    try:
        if not path.is_file():
            raise RecipeError(f"{str(path)!r} is no file")
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {str(path)!r}: {error}") from error
    if len(content) > LONGEST:
        raise RecipeError(f"{str(path)!r} has more than {LONGEST} bytes; is it a recipe?")
    return read_yaml(text, str(path))


def read_yaml(text: str, source: str) -> Any:
    """What a text in YAML says.

    Args:
        text: one document.
        source: where it is from, for messages.

    Raises:
        RecipeError: it is no YAML, or no plain values: an alias, an anchor, a tag, a key that is given twice, too much
            within each other. Names the source and the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise RecipeError(f"cannot read {where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: numbers and characters that there are not
        raise RecipeError(f"cannot read {source}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses what makes YAML more than it looks like."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, NodeEvent):
            if event.anchor is not None:  # an alias has its anchor's name
                _refuse("anchors and aliases are not read: write the values out", event.start_mark)
            if (tag := getattr(event, "tag", None)) is not None:
                _refuse(f"tags such as {tag} are not read: leave it out", event.start_mark)
        if self.depth > DEEPEST:
            _refuse(f"more than {DEEPEST} mappings and lists within each other", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """With keys that are texts, each once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key is a mapping or a list; keys are texts", key.start_mark)
            if key.value in seen:
                _refuse(f"the key {key.value!r} is there twice: keep one", key.start_mark)
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = int(super().construct_yaml_int(node))
        if number.bit_length() > _WIDEST:
            _refuse(f"a whole number of more than {_WIDEST} bits", node.start_mark)
        return number


def _refuse(problem: str, mark: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# Dates are texts, and 5e-2 is a number: YAML 1.1 would have it the other way round.
_KINDS = {first: [(t, r) for t, r in kinds if not t.endswith(":timestamp")] for first, kinds in
          yaml.SafeLoader.yaml_implicit_resolvers.items()}  # fmt: skip
_Loader.yaml_implicit_resolvers = _KINDS
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
