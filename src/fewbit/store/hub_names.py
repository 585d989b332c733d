"""How a model of the Hugging Face hub is named: owner/name[@revision][:file or quant]."""

from __future__ import annotations

import re
from dataclasses import dataclass

# a leading hf:// says that no path is meant
PREFIX = "hf://"
_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"({_ID})(?:@([\w][\w./+-]{{0,199}}))?(?::([\w. ()\[\]/+=,-]{{1,300}}))?", re.ASCII)
# a hub id never ends like one of these; a path that was mistyped does
_ENDINGS = (".gguf", ".safetensors", ".json", ".bin", ".jinja", ".txt")
MAIN = "main"


@dataclass(frozen=True)
class HubName:
    """One model of the hub. `part` picks a file of a repository that holds several models."""

    repo: str
    revision: str = MAIN
    part: str | None = None
    # hf:// was written before it
    explicit: bool = False

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repo}{revision}{f':{self.part}' if self.part else ''}"

    @property
    def owner(self) -> str:
        """What stands before the slash."""
        return self.repo.partition("/")[0]


def parse(text: str) -> HubName | None:
    """The model a text names; None where it is no hub id, or looks like a file's path."""
    explicit = text.startswith(PREFIX)
    match = _NAME.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        return None
    repo, revision, part = match.groups()
    # the hub allows neither in names
    if "--" in repo or ".." in repo or ".." in (revision or ""):
        return None
    if repo.lower().endswith(_ENDINGS) or repo.partition("/")[0].lower().endswith(_ENDINGS):
        return None
    return HubName(repo, revision or MAIN, part, explicit)
