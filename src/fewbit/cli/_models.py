"""Models that a command names, brought here before it begins."""

from __future__ import annotations

from fewbit.cli._terminal import progress


def fetch(*models: str) -> None:
    """What has to come from the hub, with a bar; what is here already, and any other name, costs nothing."""
    from fewbit import store

    with progress() as report:
        for model in models:
            if store.hub_name(model) is not None:
                store.locate(model, report)
