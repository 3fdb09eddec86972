"""A model by its name on the hub."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.hf.hub import folder_of


@pytest.mark.parametrize("kind", [errors.LocalEntryNotFoundError, errors.HfHubHTTPError.__mro__[1]])
def test_a_hub_that_is_lost_during_a_download_is_told(kind, tmp_path, monkeypatch):
    """The client's errors of a connection are OSErrors in some of its versions."""

    def download(name, local_files_only=False, **how):
        raise errors.LocalEntryNotFoundError("absent") if local_files_only else kind("lost on the way")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("txtrain.data.sources.hub.why_unreachable", lambda: None)
    monkeypatch.setattr("txtrain.data.tokenizer.load.why_unreachable", lambda: None)
    with pytest.raises(ConfigError, match="'someone/large' does not exist, and its download fails: lost on the way"):
        folder_of("someone/large", "init_from")
    with pytest.raises(ConfigError, match=r"`data.tokenizer` must be .* but is someone/words instead: lost on the way"):
        load_tokenizer("someone/words")
