"""Addresses of models on the Hugging Face Hub, and their files.

    hf-hub:OWNER/NAME            as it is now
    hf-hub:OWNER/NAME@REVISION   of a branch, a tag or a commit

What is fetched is checked like any file: it is data, and nothing else in the repository is looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from dynnet.errors import CheckpointError

PREFIX = "hf-hub:"
FILE = "model.safetensors"
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
T = TypeVar("T")


class Address(NamedTuple):
    """A repository, and which of its revisions."""

    repo: str
    revision: str | None

    @classmethod
    def of(cls, text: str) -> Address:
        """Of "hf-hub:OWNER/NAME@REVISION".

        Raises:
            CheckpointError: it is none.
        """
        found = _ADDRESS.fullmatch(text.removeprefix(PREFIX))
        if found is None:
            raise CheckpointError(f"{text!r} names no model of the hub; write {PREFIX}OWNER/NAME or ...@REVISION")
        return cls(found["repo"], found["revision"])

    def __str__(self) -> str:
        return PREFIX + self.repo + (f"@{self.revision}" if self.revision else "")


def fetched(text: str) -> Path:
    """The file of an address, in the hub's cache on this machine; asked for if it is not there, or was changed.

    Raises:
        CheckpointError: no such repository, revision or file, or no network.
    """
    from huggingface_hub import hf_hub_download

    address = Address.of(text)
    found = asking(
        address,
        lambda: hf_hub_download(address.repo, FILE, revision=address.revision, endpoint=endpoint()),
    )
    return Path(found)


def endpoint() -> str | None:
    """Of the hub, where it is another one than usual; read anew, for huggingface_hub reads it once."""
    return os.environ.get("HF_ENDPOINT")


def asking(address: Address, ask: Callable[[], T]) -> T:
    """What the hub answers, or words.

    Raises:
        CheckpointError: it does not.
    """
    from huggingface_hub import errors

    try:
        return ask()
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{address.repo!r} has no revision {address.revision!r}; leave it out, or name one"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no {address.repo!r}, or does not show it to you; check the name, or run `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{address} is not on this machine, and the hub cannot be reached; connect to it once, or take a file"
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{address} holds no {FILE}, which dynnet writes; nothing else is read") from error
    except Exception as error:  # whatever the client and its transport raise, which differs from version to version
        raise CheckpointError(f"the hub does not serve {address}: {error}") from error
