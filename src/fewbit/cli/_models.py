"""Models that a command names, brought here before it begins."""

from __future__ import annotations

from fewbit.cli._terminal import progress


def fetch(*models: str) -> None:
    """What has to be fetched, with a bar; what is here already costs nothing."""
    from fewbit import store

    with progress() as report:
        for model in models:
            store.locate(model, report)
