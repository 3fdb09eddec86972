"""A folder to a repository of the Hugging Face hub, through its own client. Imported where it is used."""

from __future__ import annotations

from pathlib import Path

from txtrain.data.sources.hub import client_errors, said_by
from txtrain.errors import ConfigError


def check(name: str) -> None:
    """Ask, before any work is done, whether the hub knows who we are.

    Raises:
        ConfigError: the client is not installed, nobody is logged in, or the hub cannot be reached.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import LocalTokenNotFoundError
    except ImportError as e:
        raise ConfigError("`push_to` needs huggingface_hub: pip install huggingface_hub.") from e
    errors: tuple[type[Exception], ...] = (RuntimeError, *client_errors())
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as e:
        raise ConfigError(f"`push_to={name}` needs a token: `hf auth login`, or HF_TOKEN.") from e
    except errors as e:
        raise ConfigError(f"`push_to={name}`: the hub does not answer for this token: {said_by(e)}") from e


def push(folder: Path, name: str) -> str:
    """Upload all files of the folder to the model repository, which is made, privately, if it is not there.

    Returns the address.

    Raises:
        ConfigError: the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by txtrain")
    except client_errors() as e:
        raise ConfigError(f"`push_to={name}`: the hub refuses: {said_by(e)} The export itself is in {folder}.") from e
    return str(url)
