"""Fetches models from the Hugging Face hub with its client, huggingface_hub, and its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edadm_cli.artifacts import explain_os_error
from edadm_cli.errors import InputError, MachineError
from edadm_cli.progress import long_step

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_TIMEOUT_S = 10.0
_VARIANTS = (None, "fp16", "bf16")
_LACKS_WEIGHTS = "necessary `safetensors` weights"  # in what diffusers says of a repository without such files


def looks_like_hub_id(text: str) -> bool:
    """Returns whether a text has the form `owner/name`."""
    return bool(_HUB_ID.fullmatch(text))


def download(repo_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Fetches a pipeline's folder, safetensors only, or finds it in the cache.

    Returns:
        The folder and its commit.

    Raises:
        InputError: The model is not in the cache and the hub cannot be reached, or the hub has no such model, refuses
            it, or has no safetensors weights of it.
        MachineError: The disk is full, or the cache may not be written.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    local_only = False
    try:
        HfApi().model_info(repo_id, revision=revision, timeout=_TIMEOUT_S)
    except GatedRepoError as error:
        raise InputError(
            f"The hub gives '{repo_id}' only to those who accepted its terms.", hint="hf auth login"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = "" if revision is None else f" at revision '{revision}'"
        raise InputError(f"The hub has no model '{repo_id}'{at}, or keeps it private.", "edadm models") from error
    except Exception:  # noqa: BLE001 - no network, a proxy, offline mode, an outage: the cache will do
        local_only = True
    try:
        with long_step(_progress_of(repo_id)):
            folder = _download_safetensors(repo_id, revision, local_only)
    except InputError:
        raise
    except Exception as error:
        reason_here = explain_os_error(error) if isinstance(error, OSError) else None
        if isinstance(reason_here, MachineError):  # a full disk, or a cache that may not be written
            raise reason_here from error
        if local_only:
            raise InputError(
                f"'{repo_id}' is not in the local cache, and the Hugging Face hub cannot be reached from here.",
                hint="give --model a diffusers folder, or a shipped model: digits-sd",
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"'{repo_id}' cannot be downloaded from the hub: {reason}") from error
    return folder, folder.name


def _progress_of(repo_id: str) -> Callable[[], str]:
    """Returns a function that says how much of a repository was written to the cache since this call."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs"

    def size() -> int:
        """Returns the bytes of all files of the repository, complete or not."""
        total = 0
        with suppress(OSError), os.scandir(blobs) as entries:  # a file may just have been renamed
            for entry in entries:
                total += entry.stat().st_size
        return total

    before = size()
    return lambda: f"downloading {repo_id} from the hub: {(size() - before) / 2**20:,.0f} MiB"


def _download_safetensors(repo_id: str, revision: str | None, local_only: bool) -> Path:
    """Fetches the weights without a variant, or else the first variant that the repository has."""
    from diffusers import DiffusionPipeline

    for variant in _VARIANTS:
        try:
            folder = DiffusionPipeline.download(
                repo_id,
                revision=revision,
                variant=variant,
                use_safetensors=True,
                local_files_only=local_only,
                trust_remote_code=False,
            )
            return Path(folder)
        except OSError as error:
            if _LACKS_WEIGHTS not in str(error):
                raise
    names = ", ".join(name for name in _VARIANTS if name is not None)
    raise InputError(f"'{repo_id}' has no safetensors weights on the hub, neither plain ones nor a variant of {names}.")
