"""The model hub: whether it can be asked, and what of it lies on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from halfstep.errors import InputError


@contextmanager
def quiet_hub() -> Iterator[None]:
    """diffusers passes the hub's library an option that it has dropped, which would then warn every user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument", category=UserWarning)
        yield


@contextmanager
def quiet_pipelines() -> Iterator[None]:
    """`quiet_hub`, and without the progress bars of those who load a pipeline, which are as they were afterwards."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [logging for logging in (of_diffusers, of_transformers) if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        with quiet_hub():
            yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()


def hub_answers(identifier: str, revision: str | None, alternatives: str) -> bool:
    """Ask once, because the download functions retry for most of a minute before they find that there is no network.

    Raises InputError when the hub says that it has no such model; `alternatives` ends that line.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        HfApi().model_info(identifier, revision=revision, timeout=10)
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(f"{identifier}: not a folder, and not on the hub ({reason}); {alternatives}") from error
    except (httpx2.TransportError, OfflineModeIsEnabled):
        return False
    return True


def cached_models() -> list[str]:
    """The models in the hub's cache on this machine."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except CacheNotFound:
        return []
