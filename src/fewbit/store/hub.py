"""Models of the Hugging Face hub: found in its cache, or brought there.

The hub's own library asks, answers for tokens and addresses, and links files into its cache; only the bytes are
fetched here (`hub_fetch`), because the library can't go on with a file that an earlier process began. Nothing is
copied: what is fetched serves transformers and every other tool as well, and the other way round.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError
from fewbit.store import hub_cache, hub_errors, hub_fetch
from fewbit.store.hub_choice import Choice, RemoteFile, choose
from fewbit.store.hub_names import HubName
from fewbit.store.places import size_text

Progress = Callable[[int, int, str], None]
# seconds for an answer about a repository
PATIENCE = 20.0


@dataclass(frozen=True)
class Pulled:
    """A model that lies in the hub's cache. `fetched` of its `bytes` came now."""

    name: str
    path: Path
    commit: str
    bytes: int
    fetched: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "path": str(self.path),
            "commit": self.commit,
            "bytes": self.bytes,
            "fetched_bytes": self.fetched,
        }


def pull(wanted: HubName, progress: Progress) -> Pulled:
    """Bring a model here as the hub has it now; what lies here already is not fetched again.

    `progress` counts bytes. An error or Ctrl-C while files come carries a note of how much is kept. Raises
    FewbitError.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise hub_errors.offline(wanted)
    try:
        return _pull(wanted, progress)
    except Exception as error:
        explained = hub_errors.explain(error, wanted)
        if explained is None or explained is error:
            raise
        for note in getattr(error, "__notes__", ()):
            explained.add_note(note)
        raise explained from error


def _pull(wanted: HubName, progress: Progress) -> Pulled:
    commit, listed = _listing(wanted)
    repo = _Repository(wanted, commit, progress)
    choice = choose(wanted, listed, repo.content)
    lacking = [f for f in choice.files if not repo.has(f)]
    if lacking:
        repo.fetch(lacking, choice)
    repo.link(choice.files)
    path = repo.snapshot / choice.entry
    return Pulled(str(wanted), path, commit, choice.nbytes, sum(f.size for f in lacking))


def _listing(wanted: HubName) -> tuple[str, list[RemoteFile]]:
    """The commit of a revision and its files."""
    from huggingface_hub import HfApi

    found = HfApi(library_name="fewbit").model_info(
        wanted.repo, revision=wanted.revision, files_metadata=True, timeout=PATIENCE
    )
    if not isinstance(found.sha, str) or not hub_cache.COMMIT.fullmatch(found.sha):
        raise FewbitError(
            f"The hub's answer about {wanted.repo} can't be used.",
            f"It names the commit {str(found.sha)[:60]!r}.",
            "Check HF_ENDPOINT, or try again later.",
        )
    return found.sha, [_remote(s) for s in found.siblings or []]


def _remote(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    size = lfs.size if lfs else sibling.size
    digest = lfs.sha256 if lfs else sibling.blob_id
    return RemoteFile(str(sibling.rfilename), size if isinstance(size, int) else -1, str(digest or ""))


class _Repository:
    """One commit of a repository, in the cache as far as it has come."""

    def __init__(self, wanted: HubName, commit: str, progress: Progress) -> None:
        self.wanted, self.commit, self.progress = wanted, commit, progress
        self.folder = hub_cache.repo_dir(wanted.repo)
        self.blobs, self.snapshot = self.folder / "blobs", self.folder / "snapshots" / commit

    def has(self, file: RemoteFile) -> bool:
        """Whether a file lies here as a whole."""
        place = self.snapshot / file.name
        return place.exists() or (hub_fetch.fetchable(file) and (self.blobs / file.digest).exists())

    def content(self, file: RemoteFile) -> bytes:
        """A small file's content, fetched where it is not here."""
        if (self.snapshot / file.name).exists():
            return (self.snapshot / file.name).read_bytes()
        if not self.has(file) and hub_fetch.fetchable(file):
            self._bring([file], lambda *_: None)
        self._link_one(file)
        return (self.snapshot / file.name).read_bytes()

    def fetch(self, lacking: Sequence[RemoteFile], choice: Choice) -> None:
        """What is not here, after a look at the disk."""
        plain = [f for f in lacking if hub_fetch.fetchable(f)]
        kept = sum(hub_fetch.kept_bytes(self.blobs, f) for f in plain)
        total = sum(f.size for f in lacking)
        _check_room(self.wanted, total - kept)
        here = f", {size_text(kept)} of it here already" if kept else ""
        self.progress(
            0,
            total - kept,
            f"Fetching {self.wanted} (commit {self.commit[:8]}): {len(lacking)} of {len(choice.files)} files, "
            f"{size_text(total)}{here}",
        )
        try:
            self._bring(plain, self.progress)
        except BaseException as error:
            left = sum(f.size if self.has(f) else hub_fetch.kept_bytes(self.blobs, f) for f in lacking)
            if left:
                error.add_note(f"{size_text(left)} of {size_text(total)} are kept")
            raise

    def _bring(self, files: Sequence[RemoteFile], progress: Progress) -> None:
        if not files:
            return
        from huggingface_hub import constants, hf_hub_url

        url = partial(hf_hub_url, self.wanted.repo, revision=self.commit)
        fetcher = hub_fetch.Fetcher(self.blobs, url, hub_fetch.request_headers(), constants.HF_HUB_DOWNLOAD_TIMEOUT)
        fetcher.run(files, progress)

    def link(self, files: Sequence[RemoteFile]) -> None:
        """Give the files their names; the last of them, config.json, says that the rest is there."""
        lacking = [f for f in files if not (self.snapshot / f.name).exists()]
        if lacking:
            with ThreadPoolExecutor(hub_fetch.WORKERS) as pool:
                list(pool.map(self._link_one, lacking[:-1]))
            self._link_one(lacking[-1])
        hub_cache.remember_ref(self.wanted, self.commit)

    def _link_one(self, file: RemoteFile) -> None:
        """By the library, which knows what the system's links can do; it fetches what has no hash of the listing's."""
        from huggingface_hub import hf_hub_download

        hf_hub_download(self.wanted.repo, file.name, revision=self.commit, cache_dir=hub_cache.hub_dir())


def _check_room(wanted: HubName, needed: int) -> None:
    folder = hub_cache.hub_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FewbitError(
            f"There is no room for {wanted}.",
            f"{size_text(needed)} are to be fetched; {folder} has {size_text(free)} free.",
            "Free some space (fewbit ls, fewbit rm), or set HF_HOME to a folder on a larger disk.",
        )
