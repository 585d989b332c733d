"""What the hub's library raises, in three parts that say what to do."""

from __future__ import annotations

import difflib
import errno
import shutil
from contextlib import suppress
from typing import Any

from fewbit.errors import FewbitError
from fewbit.store.hub_cache import hub_dir, repo_dir, unfinished
from fewbit.store.hub_fetch import request_headers, transport_errors
from fewbit.store.hub_names import HubName
from fewbit.store.places import size_text

# seconds that suggestions may take
PATIENCE = 5.0


def explain(error: Exception, wanted: HubName) -> FewbitError | None:
    """The three parts of an error of the hub's library; None where it is not one of those a user can act on."""
    from huggingface_hub import errors

    if isinstance(error, FewbitError):
        return error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline(wanted)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__, wanted) or _unreachable(wanted, error.__cause__)
    # each gated repository is also one that was not found
    if isinstance(error, errors.GatedRepoError):
        return _gated(wanted, error)
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(wanted)
    if isinstance(error, errors.RevisionNotFoundError):
        return _no_revision(wanted)
    if isinstance(error, errors.HFValidationError):
        return FewbitError(f"{wanted} can't be a model of the hub.", f"{error}", "Check the name: owner/name.")
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(wanted, error)
    if isinstance(error, (*transport_errors(), errors.FileMetadataError)):
        return _unreachable(wanted, error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(hub_dir()).free
        return FewbitError(
            "The disk is full.",
            f"{size_text(free)} are free at {hub_dir()}, where {wanted} is to lie.",
            "Free some space (fewbit ls, fewbit rm), or set HF_HOME to a folder on a larger disk.",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FewbitError(
            f"{wanted} can't be stored.",
            f"{error.filename or hub_dir()}: {error.strerror}.",
            "Make the folder writable, or set HF_HOME to another one.",
        )
    return None


def offline(wanted: HubName) -> FewbitError:
    """Nothing may be fetched, and it is not here."""
    folder = repo_dir(wanted.repo)
    here = "not all of it lies" if folder.is_dir() or unfinished(folder) else "it does not lie"
    return FewbitError(
        f"{wanted} can't be fetched offline.",
        f"HF_HUB_OFFLINE is set, and {here} in {hub_dir()}.",
        f"Unset HF_HUB_OFFLINE and run fewbit pull {wanted}, or take a model that is here (fewbit ls).",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _page(wanted: HubName) -> str:
    return f"{_endpoint()}/{wanted.repo}"


def _gated(wanted: HubName, error: Any) -> FewbitError:
    from huggingface_hub import get_token

    said = " ".join((error.server_message or "The hub gives it to those alone who asked for access").split())
    if get_token():
        facts = f"{said.rstrip('.')}; a token is given, and its account has no access."
        step = (
            f"Visit {_page(wanted)} with that account, accept the conditions, wait until it is granted, and try again."
        )
    else:
        facts = f"{said.rstrip('.')}; no token is given."
        step = (
            f"Visit {_page(wanted)}, accept the conditions, then run hf auth login (or set HF_TOKEN) with a token of "
            "that account."
        )
    return FewbitError(f"Access to {wanted.repo} is restricted.", facts, step)


def _not_found(wanted: HubName) -> FewbitError:
    from huggingface_hub import get_token

    private = "or it is private and the token's account may not see it"
    if not get_token():
        private = "or it is private, and no token is given (hf auth login, or HF_TOKEN)"
    names = _near(wanted)
    step = f"Did you mean {' or '.join(names)}?" if names else f"Look for it at {_endpoint()}/models."
    return FewbitError(
        f"There is no model {wanted.repo} on the hub.", f"{_endpoint()} knows none, {private}.", f"{step}"
    )


def _near(wanted: HubName) -> list[str]:
    """Names the hub finds for what was asked, the nearest first; nothing where it can't search."""
    from huggingface_hub import get_session

    found: dict[str, None] = {}
    asked: tuple[dict[str, str], ...] = ({"search": wanted.repo.partition("/")[2]}, {"author": wanted.owner})
    for query in asked:
        with suppress(Exception):
            query = query | {"limit": "100", "sort": "downloads"}
            answer = get_session().get(
                f"{_endpoint()}/api/models", params=query, headers=request_headers(), timeout=PATIENCE
            )
            found |= {str(m["id"])[:200]: None for m in answer.json() if "/" in m["id"]}
    return difflib.get_close_matches(wanted.repo, list(found), 3, 0.5) or list(found)[:3]


def _no_revision(wanted: HubName) -> FewbitError:
    from huggingface_hub import HfApi

    names: list[str] = []
    with suppress(Exception):
        refs = HfApi().list_repo_refs(wanted.repo)
        names = [r.name for r in (*refs.branches, *refs.tags)]
    known = f"It has {', '.join(names[:20])}." if names else "The hub knows no branch, tag or commit of that name."
    return FewbitError(
        f"{wanted.repo} has no revision {wanted.revision!r}.", known, f"Leave it out for the newest: {wanted.repo}."
    )


def _answered(wanted: HubName, error: Any) -> FewbitError:
    """The hub said no, in a way that has no class of its own."""
    status = error.response.status_code
    said = " ".join((error.server_message or str(error)).split())[:300]
    facts = f"{_endpoint()} answers {status}: {said}"
    if status in (401, 403):
        step = "Check the token (hf auth whoami; HF_TOKEN wins over it), or log in anew: hf auth login."
    elif status == 429:
        step = "Wait some minutes; with a token (hf auth login) more requests are allowed."
    else:
        step = "Try again later; what was fetched is kept."
    return FewbitError(f"{wanted} could not be fetched.", facts, step)


def _unreachable(wanted: HubName, error: Exception) -> FewbitError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return FewbitError(
        f"The hub can't be reached for {wanted}.",
        f"{_endpoint()}: {said}.",
        "Check the network, the proxy and HF_ENDPOINT; models that are here run without it (fewbit ls).",
    )
