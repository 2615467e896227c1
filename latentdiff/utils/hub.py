"""To the Hub and from it: a folder pushed or pulled whole.

What fails says why in one line, and never with the token.
"""

import glob
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import ConfigError

_PULLED = ".cache/huggingface"  # what huggingface_hub keeps beside what it brought


class PushError(ConfigError):
    """A push that did not happen; the message is one line that says why and what to do."""


class PullError(ConfigError):
    """A model that did not come; the message is one line that says why and what to do."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with latentdiff",
    files: Sequence[str] | None = None,
) -> str:
    """Push `folder` to the model repository `repo_id`, created if need be, and return the commit's URL.

    Args:
        files: what is pushed of it, by paths in the folder; by default everything.
        token: with the right to write; by default HF_TOKEN or that of `hf auth login`.
        revision: the branch, created if need be; by default main.

    Raises:
        PushError: no folder, no token, a refused one, a bad name, or no way to the Hub.
    """
    if not Path(folder).is_dir():
        raise PushError(f"{folder} is not a folder: nothing to push")
    api, repo_id = open_repo(repo_id, private, token)
    try:
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=None if files is None else [glob.escape(name) for name in files],
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # `from None`: the chain would print the library's own message, which may quote the request's headers.
        raise PushError(_explain(error, repo_id, "not pushed to").replace(api.token, "<token>")) from None
    return commit.commit_url


def open_repo(repo_id: str, private: bool = False, token: str | None = None) -> tuple[HfApi, str]:
    """The model repository, created if need be, and its whole name: what has to work before a push can.

    Raises:
        PushError: as `push_folder`.
    """
    token = (token or get_token() or "").strip()
    if not token:
        raise PushError(f"no token to push to {repo_id} with: set HF_TOKEN, or run `hf auth login`")
    api = HfApi(token=token)
    try:
        return api, api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise PushError(_explain(error, repo_id, "not pushed to").replace(token, "<token>")) from None


def pull_folder(repo_id: str, folder: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Load a model repository into a folder, as it is on the Hub, and return the folder.

    A pull that was interrupted goes on where it stopped, and a later one brings what has changed since.

    Args:
        revision: branch, tag or commit; by default main.
        token: by default HF_TOKEN or that of `hf auth login`; public models need none.

    Raises:
        PullError: a folder that holds other things, a bad name, no such model or revision, or no way to the Hub.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / _PULLED).is_dir() and (not folder.is_dir() or any(folder.iterdir())):
        raise PullError(f"{folder} is there and holds other things: name an empty or a new folder with --output-dir")
    try:
        snapshot_download(repo_id, revision=revision, local_dir=folder, token=token)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        secret = (token or get_token() or "").strip()
        message = _explain_pull(error, repo_id, revision)
        raise PullError(message.replace(secret, "<token>") if secret else message) from None
    return folder


def _explain_pull(error: Exception, repo_id: str, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is for those alone who accepted its terms: {constants.ENDPOINT}/{repo_id}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id}: no such model on {constants.ENDPOINT}, or a private one that this token may not read"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__, repo_id, "not pulled from")
    return _explain(error, repo_id, "not pulled from")


def _explain(error: Exception, repo_id: str, failed: str) -> str:
    """One line on why what `failed` with `repo_id` did, such as "not pushed to"."""
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no repository name: write it as user/name, with letters, digits, '-', '_' and '.'"
    if isinstance(error, HfHubHTTPError):
        return f"{failed} {repo_id}: {_refusal(error)}"
    if isinstance(error, HTTPError | ConnectionError):
        return f"{failed} {repo_id}: {constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return f"{failed} {repo_id}: {type(error).__name__}: {' '.join(str(error).split())}"


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the Hub does not know this token (401); see {constants.ENDPOINT}/settings/tokens"
    if status == 403:
        return "this token may not write there (403); it needs the write permission"
    return f"the Hub answered {status}: {' '.join((error.server_message or '').split())}"
