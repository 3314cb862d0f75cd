"""Talk to the Hub: create or update one repository in one commit, and believe it only after looking again.

Large files go first (the Hub keeps those that arrived, so that a second run goes on where the first broke
off); the commit makes everything visible at once, or nothing. Afterwards the repository is listed and
compared with the plan: what is not there is reported, whatever the server answered.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from diverse_cfg.cards import CARD_FILE
from diverse_cfg.publishing.plan import PlannedFile, UploadPlan
from diverse_cfg.untrusted import TOKEN, plain

_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_CONFLICT = (409, 412)
_TIMEOUT_S = 120.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """Where a plan ended up."""

    url: str
    commit: str
    private: bool
    num_uploaded: int
    """Files of the commit; 0 when everything was there already."""


@dataclass(frozen=True)
class _Remote:
    commit: str
    private: bool
    files: dict[str, RepoSibling]

    def holds(self, file: PlannedFile) -> bool:
        """Whether a file is there with the planned content: sha256 of large ones, git's hash of small ones."""
        there = self.files.get(file.path_in_repo)
        if there is None or there.size != file.size:
            return False
        return there.lfs.sha256 == file.sha256 if there.lfs else there.blob_id == git_hash(file.content)


def upload(
    plan: UploadPlan,
    *,
    update: bool = False,
    card: Literal["refuse", "keep", "overwrite"] = "refuse",
    token: str | None = None,
    endpoint: str | None = None,
    attempts: int = 4,
    wait_s: float = 2.0,
) -> Published:
    """Carry out a plan; see `publish`.

    Args:
        plan: what to upload.
        update: allow a repository that has files already.
        card: what to do about another README.md in it.
        token: Hub token; by default the one that is logged in.
        endpoint: another Hub than the public one.
        attempts: how often it is tried, for failures that may pass.
        wait_s: pause before the second attempt; it doubles each time.

    Returns:
        The repository and its commit, after every file of the plan was found there.

    Raises:
        FileExistsError: the repository has files (`update=True` allows it), or another card.
        PermissionError: no token, or one that may not.
        ConnectionError: the Hub cannot be reached or keeps failing; nothing of the plan is visible.
        OSError: the repository is not what was planned: the message says in what.
    """
    token = token or get_token()
    if not token:
        raise PermissionError("no Hub token: run `hf auth login`, or set HF_TOKEN to one with write access")
    api = HfApi(endpoint=endpoint, token=token, library_name="diverse-cfg")
    num_uploaded = 0
    with _explained(plan, token):
        for attempt in range(attempts):
            # The Hub client waits for ever by default, and a server may accept and never answer.
            get_session().timeout = _TIMEOUT_S
            try:
                remote = _open_repository(api, plan)
                files = _files_to_send(plan, remote, update, card)
                num_uploaded = max(num_uploaded, len(files))
                remote = _commit(api, plan, files, remote) if files else remote
                break
            except Exception as error:
                if attempt == attempts - 1 or not _may_pass(error):
                    raise
                logger.warning("%s: attempt %d failed, trying again", plan.repo_id, attempt + 1)
                time.sleep(wait_s * 2**attempt)
    missing = [
        file.path_in_repo
        for file in plan.files
        if not remote.holds(file) and not (card == "keep" and file.path_in_repo == CARD_FILE)
    ]
    if missing:
        raise OSError(
            f"{plan.repo_id} was committed but lacks or differs in {', '.join(missing)}: it is incomplete. "
            "Run again with update=True (--update)"
        )
    url = f"{api.endpoint}/{'spaces/' if plan.repo_type == 'space' else ''}{plan.repo_id}"
    logger.info("published %s (%d files)", url, num_uploaded)
    return Published(url, remote.commit, remote.private, num_uploaded)


def _open_repository(api: HfApi, plan: UploadPlan) -> _Remote:
    """The repository's state, after creating it where it does not exist."""
    remote = _look(api, plan)
    if remote is None:
        # Somebody, or our own request whose answer was lost, may have created it meanwhile.
        kind = {"repo_type": "space", "space_sdk": "gradio"} if plan.repo_type == "space" else {}
        api.create_repo(plan.repo_id, private=plan.private, exist_ok=True, **kind)
        remote = _look(api, plan)
        if remote is None:
            raise ConnectionError(f"the Hub did not create {plan.repo_id}: run again")
    if remote.private != plan.private:
        is_, wanted = ("private", "public") if remote.private else ("public", "private")
        raise FileExistsError(
            f"{plan.repo_id} is {is_}, but it was to be {wanted}: nothing was uploaded. Change it on the "
            f"Hub, or pass private={remote.private} ({'leave out ' if remote.private else ''}--public)"
        )
    return remote


def _files_to_send(plan: UploadPlan, remote: _Remote, update: bool, card: str) -> list[PlannedFile]:
    kept = {CARD_FILE} & remote.files.keys() if card == "keep" else set()
    files = [file for file in plan.files if file.path_in_repo not in kept and not remote.holds(file)]
    if not files or not remote.files.keys() - {".gitattributes"}:
        return files
    if not update:
        raise FileExistsError(
            f"{plan.repo_id} has files already: pass update=True (--update) to change it, or take a new name"
        )
    ours = {file.path_in_repo for file in files}
    if card == "refuse" and CARD_FILE in ours & remote.files.keys():
        raise FileExistsError(
            f"{plan.repo_id} has another README.md: pass card='keep' or card='overwrite' (--card) to say "
            "what shall happen"
        )
    return files


def _commit(api: HfApi, plan: UploadPlan, files: list[PlannedFile], remote: _Remote) -> _Remote:
    """One commit on top of the state that was looked at, and the state after it."""
    refused = False
    try:
        api.create_commit(
            plan.repo_id,
            [CommitOperationAdd(file.path_in_repo, file.source) for file in files],
            commit_message=f"Upload {plan.folder.resolve().name} with diverse-cfg",
            parent_commit=remote.commit,
            repo_type=plan.repo_type,
        )
    except Exception as error:
        refused = _status(error) in _CONFLICT
        if not refused:
            raise
    now = _look(api, plan)
    if now is None:
        raise OSError(f"{plan.repo_id} cannot be found after the commit: look at it on the Hub")
    if refused and not all(now.holds(file) for file in files):
        raise FileExistsError(
            f"{plan.repo_id} was changed by somebody else during the upload, and nothing of ours is "
            "in it: look at it, and run again with update=True (--update)"
        )
    return now


def _look(api: HfApi, plan: UploadPlan) -> _Remote | None:
    """The repository as it is now; None if there is none."""
    repo_id = plan.repo_id
    try:
        info = api.repo_info(repo_id, repo_type=plan.repo_type, files_metadata=True, timeout=_TIMEOUT_S)
    except RepositoryNotFoundError:
        return None
    if info.sha is None or info.private is None:
        raise OSError(f"the Hub's description of {repo_id} lacks its commit or its visibility")
    return _Remote(info.sha, info.private, {file.rfilename: file for file in info.siblings or []})


def _status(error: BaseException | None) -> int | None:
    """HTTP status behind an error, also when it is wrapped (failed uploads of single files are)."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None


def _is_network(error: BaseException | None) -> bool:
    # The client library is httpx in huggingface_hub 1 and httpx2 in 2; both name their errors alike.
    while error is not None:
        if {kind.__name__ for kind in type(error).__mro__} & {"TransportError", "TimeoutError"}:
            return True
        error = error.__cause__
    return False


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    return status in _TRANSIENT if status is not None else _is_network(error)


@contextmanager
def _explained(plan: UploadPlan, token: str) -> Iterator[None]:
    """Turn the client's errors into ours: what happened, what to do, and never a token."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ConnectionError("the Hub is switched off by HF_HUB_OFFLINE: unset it to publish") from None
    except Exception as error:
        status = _status(error)
        if status is None and not _is_network(error):
            if token in str(error) or TOKEN.search(str(error)):
                raise OSError(plain(str(error).replace(token, "<token>"))) from None
            raise
        reason = plain(" ".join(str(error).split()).replace(token, "<token>"))
        raise _explanation(status, plan.repo_id, reason) from None


def _explanation(status: int | None, repo_id: str, reason: str) -> OSError:
    owner, may_not_write = repo_id.split("/")[0], f"the token may not write to {repo_id}"
    known = {
        401: (PermissionError, "the Hub does not accept the token: log in again with `hf auth login`"),
        402: (PermissionError, f"{may_not_write}: it needs write access for {owner}"),
        403: (PermissionError, f"{may_not_write}: it needs write access for {owner}"),
        404: (FileNotFoundError, f"{repo_id} or {owner} does not exist, or the token does not see it"),
        409: (FileExistsError, f"{repo_id} is being changed by somebody else: run again"),
        412: (FileExistsError, f"{repo_id} is being changed by somebody else: run again"),
        429: (ConnectionError, "the Hub asks for a pause (too many requests): run again later to go on"),
    }
    silent = (ConnectionError, "the Hub does not answer properly; run again to go on where it broke off")
    if status is not None and status not in known and status not in _TRANSIENT:
        return OSError(f"the Hub refused the upload to {repo_id}: {reason}")
    kind, what = known.get(status or 0, silent)
    return kind(f"{what} ({reason})")
