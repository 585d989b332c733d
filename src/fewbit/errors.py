"""The one error a user sees: what went wrong, the facts, what to do next."""

from __future__ import annotations


class FewbitError(Exception):
    """A mistake or a limit that the user can act on.

    `what` is one sentence, `facts` the measured details (sizes, names, offsets), `next_step` the way on.
    The same three parts are printed by the command line and returned over HTTP.
    """

    def __init__(self, what: str, facts: str, next_step: str) -> None:
        super().__init__(what, facts, next_step)
        self.what = what
        self.facts = facts
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.what}\n  {self.facts}\n  {self.next_step}"

    def to_dict(self) -> dict[str, str]:
        """The three parts under their names, for `--json` and HTTP."""
        return {"what": self.what, "facts": self.facts, "next_step": self.next_step}
