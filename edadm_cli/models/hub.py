"""Models from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

import re
from pathlib import Path

from edadm_cli.errors import InputError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_TIMEOUT_S = 10.0


def looks_like_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name`."""
    return bool(_HUB_ID.match(text))


def download(repo_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Fetch a pipeline's folder, safetensors only, or find it in the cache.

    Returns:
        The folder, and the commit it is of.

    Raises:
        InputError: The model is not in the cache and the hub cannot be reached, has no such model, or keeps
            it back.
    """
    from diffusers import DiffusionPipeline
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
        folder = DiffusionPipeline.download(
            repo_id,
            revision=revision,
            use_safetensors=True,
            local_files_only=local_only,
            trust_remote_code=False,
        )
    except Exception as error:
        if local_only:
            raise InputError(
                f"'{repo_id}' is not in the local cache, and the Hugging Face hub cannot be reached from here.",
                hint="give --model a diffusers folder, or a shipped model: digits-sd",
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"'{repo_id}' cannot be downloaded from the hub: {reason}") from error
    return Path(folder), Path(folder).name
