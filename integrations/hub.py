"""push_to_hub: a sparse model, its adapter and its card on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import http_backoff
from peft import PeftModel
from transformers import PreTrainedModel

from peft_pst.opening import open_model
from peft_pst.sparse.checkpoint import save_pretrained
from peft_pst.sparse.storage import Values

from .cards import model_card, pst_config

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
"""The folder of an adapter beside a model: at the root, transformers would open the base model and the adapter."""

REPLACED = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
"""What a push deletes where the new version has it no longer; everything else in the repo stays."""

PAUSES = (2, 8, 30)
"""Seconds before each further attempt."""

# hf_xet raises the built-in errors, and the client wraps what stops an upload in a RuntimeError
BROKEN = (
    *inspect.signature(http_backoff).parameters["retry_on_exceptions"].default,
    ConnectionError,
    TimeoutError,
    RuntimeError,
)


def push_to_hub(
    model: PreTrainedModel | PeftModel | str | os.PathLike,
    repo_id: str,
    *,
    adapter: PeftModel | str | os.PathLike | None = None,
    base_model: str | None = None,
    results: Sequence[EvalResult] = (),
    tokenizer: Any = None,
    values: Values = "exact",
    private: bool = True,
    token: str | None = None,
    commit_message: str = "Upload a sparse model",
) -> CommitInfo:
    """Put a model or an adapter on the Hub, with a card, in one commit: the repo has the old version or the new one.

    Weights of an older version that the new one has no longer are deleted in the same commit; files of other names
    stay. When the connection breaks it tries again, after 2, 8 and 30 seconds. What the Hub already has is not sent
    again, neither then nor when the push is run again.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `os.PathLike`):
            A merged model, which is stored as `peft_pst.save_pretrained` does; or a model with a PST adapter, of which
            the adapter alone is stored; or the folder of either, all of whose files but hidden ones are stored. A
            README.md in such a folder is the card, unless it is the one that PEFT writes unasked.
        repo_id (`str`):
            Where to, as `owner/name`. The repo is made if there is none.
        adapter (`PeftModel`, `str` or `os.PathLike`, *optional*):
            An adapter, or its folder, to put beside a merged model, in the folder `adapter` of the repo.
        base_model (`str`, *optional*):
            The Hub's name of the model that was trained. By default what the adapter or the model says.
        results (`Sequence[EvalResult]`):
            What was measured, for the card.
        tokenizer (*optional*):
            A tokenizer or processor to store beside the model.
        values (`str`):
            How `peft_pst.save_pretrained` stores the values of a merged model.
        private (`bool`):
            Whether a new repo is private. One that exists stays as it is.
        token (`str`, *optional*):
            An access token, by default that of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`):
            The title of the commit.

    Returns:
        The commit; it is a string, its URL.

    Raises:
        ConnectionError: if the connection broke in every attempt. The repo is unchanged.
        HfHubHTTPError: if the Hub refuses, such as without permission to write.
        TypeError: if it is no model of transformers.
        ValueError: if an adapter is not PST's, is not merged, or its base model is not known; if a folder holds
            neither model nor adapter, or an adapter without a card.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} has no owner: expected 'owner/name'.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = _saved(model, Path(scratch, "model"), base_model, values)
        files = _files(folder)
        if adapter is not None:
            if "adapter_config.json" in files:
                raise ValueError(
                    "model is an adapter already, and adapter another one: give the merged model, which "
                    "merge_and_unload() returns, or leave adapter out."
                )
            adapter = _saved(adapter, Path(scratch, ADAPTER), base_model, values)
            files |= {f"{ADAPTER}/{name}": file for name, file in _files(adapter).items()}
        if tokenizer is not None:
            tokenizer.save_pretrained(Path(scratch, "tokenizer"))
            files |= _files(Path(scratch, "tokenizer"))
        if "README.md" not in files or _is_unwritten(files["README.md"]):
            opened = _opened(folder) if isinstance(model, (str, os.PathLike)) else model
            card = model_card(opened, folder, repo_id, adapter=adapter, base_model=base_model, results=results)
            files["README.md"] = str(card).encode()
        api = HfApi(token=token)
        return _persistently(lambda: _commit(api, repo_id, files, private, commit_message), repo_id)


def _saved(
    model: PreTrainedModel | PeftModel | str | os.PathLike, folder: Path, base_model: str | None, values: Values
) -> Path:
    """The folder of a model or adapter: its own, or `folder`, into which it is saved."""
    if isinstance(model, (str, os.PathLike)):
        if not any(Path(model, name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ValueError(
                f"{os.fspath(model)!r} holds neither config.json nor adapter_config.json: expected a model, or the "
                "folder of a saved model or adapter."
            )
        return Path(model)
    if not isinstance(model, PeftModel):
        save_pretrained(model, folder, values=values)
        return folder
    name = model.active_adapter
    model.save_pretrained(folder, selected_adapters=[name])
    (folder / "README.md").unlink()
    folder = folder if name == "default" else folder / name
    config = pst_config(folder)
    if base_model is not None:
        config.base_model_name_or_path = base_model
        config.save_pretrained(folder)
    return folder


def _files(folder: Path) -> dict[str, Path | bytes]:
    """The files of a folder and its folders but hidden ones, by their path in it."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        path.as_posix(): file for path, file in paths.items() if not any(part.startswith(".") for part in path.parts)
    }


def _is_unwritten(card: Path) -> bool:
    """Whether a card is the empty form that PEFT saves beside each adapter."""
    return "# Model Card for Model ID" in card.read_text(encoding="utf-8")


def _opened(folder: Path) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"The adapter in {folder} has no card, and without its base model none can be made: give the PeftModel "
            f"instead of the folder, or make the card before, with peft-pst card {folder} OWNER/NAME."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it would be slow to use
        return open_model(folder)


def _commit(
    api: HfApi, repo_id: str, files: dict[str, Path | bytes], private: bool, commit_message: str
) -> CommitInfo:
    api.create_repo(repo_id, private=private, exist_ok=True)
    before = api.model_info(repo_id)
    present = {file.rfilename for file in before.siblings}
    stale = [path for path in sorted(present - files.keys()) if _is_replaced(path)]
    # new ones in each attempt: an operation remembers what the repo held when it was first tried
    operations = [
        *(CommitOperationAdd(path, file) for path, file in files.items()),
        *(CommitOperationDelete(path) for path in stale),
    ]
    return api.create_commit(repo_id, operations, commit_message=commit_message, parent_commit=before.sha)


def _is_replaced(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return folder in ("", ADAPTER) and any(fnmatch(name, pattern) for pattern in REPLACED)


def _persistently(push: Callable[[], CommitInfo], repo_id: str) -> CommitInfo:
    pauses = iter(PAUSES)
    while True:
        try:
            return push()
        except (*BROKEN, HfHubHTTPError) as error:
            if not _may_pass(error):
                raise
            pause = next(pauses, None)
            if pause is None:
                raise ConnectionError(
                    f"The push to {repo_id} broke off in each of {len(PAUSES) + 1} attempts. The repo is unchanged, "
                    "or has the whole new version if only the last answer was lost. Run the same push again: it "
                    f"sends only what the Hub does not have yet. The last error was: {error}"
                ) from error
            logger.warning("The push to %s broke off, and is tried again in %d s: %s", repo_id, pause, error)
            time.sleep(pause)


def _may_pass(error: Exception) -> bool:
    """Whether an error may be gone in the next attempt; 412 says that somebody else's commit came between."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 412, 429) or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled)
