"""Explains the errors of an upload to the Hugging Face hub, each kind in one sentence with what mends it."""

from __future__ import annotations

from edadm_cli.artifacts.files import explain_os_error
from edadm_cli.errors import EdadmError, InputError
from edadm_cli.models.sources.from_folder import first_sentence

_LOGIN = "hf auth login"
_LATER = "the same command again, later"
_DRY_RUN = "edadm push --dry-run shows what would be sent"


def explain_hub_error(error: Exception, repository: str) -> EdadmError:
    """Returns the failure that a user reads for an error that huggingface_hub raised during an upload.

    Args:
        error: The error.
        repository: The repository of the upload, `owner/name`.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, EdadmError):
        return error
    if isinstance(error, LocalTokenNotFoundError):
        return InputError("An upload to the Hugging Face hub needs a login, and nobody is logged in here.", _LOGIN)
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(
            f"huggingface_hub is in offline mode here, so nothing was uploaded to '{repository}'.",
            hint="unset HF_HUB_OFFLINE",
        )
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, repository)
    if isinstance(error, HFValidationError):
        return InputError(f"The hub's client refuses a name of this upload: {first_sentence(error)}")
    if _is_of_the_network(error):
        return InputError(
            f"The Hugging Face hub cannot be reached from here, so nothing was uploaded to '{repository}'"
            f" ({type(error).__name__}).",
            _DRY_RUN,
        )
    of_machine = explain_os_error(error) if isinstance(error, OSError) else None
    return of_machine or InputError(
        f"The upload to '{repository}' failed: {type(error).__name__}: {first_sentence(error)}", _DRY_RUN
    )


def _explain_answer(error: Exception, repository: str) -> InputError:
    """Returns the failure for an answer of the hub with an error status."""
    from huggingface_hub.errors import DisabledRepoError, RepositoryNotFoundError

    owner = repository.partition("/")[0]
    status: int = getattr(getattr(error, "response", None), "status_code", 0)
    server: str | None = getattr(error, "server_message", None)
    reason = first_sentence(Exception(server)) if server else first_sentence(error)
    if isinstance(error, DisabledRepoError):
        return InputError(f"The hub has disabled the repository '{repository}'.", "another name")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return InputError(
            f"The hub has no repository '{repository}' that this login may see, and did not create it: {reason}",
            hint=f"{_LOGIN}, as somebody who may write to '{owner}'",
        )
    if status == 401:
        return InputError(f"The hub does not accept the login of this machine: {reason}", _LOGIN)
    if status == 403:
        return InputError(
            f"This login may not write to '{repository}': {reason}",
            hint=f"{_LOGIN}, with a token that may write to '{owner}'",
        )
    if status == 429:
        return InputError(f"The hub has received too many requests from this login: {reason}", _LATER)
    if status >= 500:
        return InputError(f"The hub itself fails with status {status}, so the upload is not complete.", _LATER)
    return InputError(f"The hub refuses the upload to '{repository}': {reason}", _DRY_RUN)


def _is_of_the_network(error: BaseException) -> bool:
    """Returns whether an error, or what caused it, is of a connection: the client's own errors, sockets and names."""
    import socket
    import ssl

    client = {"TransportError", "RequestException"}  # of httpx and of requests
    names = {cls.__name__ for cls in type(error).__mro__}
    kinds = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
    if isinstance(error, kinds) or names & client:
        return True
    return error.__cause__ is not None and _is_of_the_network(error.__cause__)
