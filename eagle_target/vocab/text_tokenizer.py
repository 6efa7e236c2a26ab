"""Tokenizers for counting text: a model's folder through transformers, or a tokenizer.json alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

_ROLES = {"human": "user", "gpt": "assistant"}


class TextTokenizer(Protocol):
    """Text and chats to token ids.

    vocab_size: size of the target's vocabulary according to the config.json beside the tokenizer, None without one.
    special_ids: ids of the special tokens, ascending.
    """

    vocab_size: int | None
    special_ids: list[int]

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Ids]:
        """Ids of each text, int64 `[tokens]`."""

    def render(self, chat: Sequence[dict[str, Any]]) -> str:
        """A chat in the tokenizer's chat template. Raises ValueError where it cannot."""

    def supervised_chat_ids(self, chat: Sequence[dict[str, Any]]) -> Ids:
        """Ids of the assistant's tokens in a chat, int64 `[tokens]`. Raises ValueError where it cannot."""


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Load a folder or a name on the Hub with transformers, or a `.json` file with tokenizers.

    Raises:
        ConfigError: there is no such tokenizer, or the library for it is not installed.
    """
    return FileTokenizer(Path(path)) if str(path).endswith(".json") else FolderTokenizer(str(path))


class FileTokenizer:
    """A tokenizer.json; it has no chat template."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer  # optional
        except ImportError as error:
            raise _not_installed("tokenizers") from error
        if not path.is_file():
            raise ConfigError(f"tokenizer {path} does not exist")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigError(f"tokenizer {path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = sorted(i for i, token in added.items() if token.special)
        self.vocab_size = _config_vocab_size(path.with_name("config.json"))

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Ids]:
        """Ids of each text, int64 `[tokens]`."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    def render(self, chat: Sequence[dict[str, Any]]) -> str:  # noqa: ARG002
        """Refuse: a tokenizer.json has no chat template."""
        raise ValueError("a chat needs a chat template, which a tokenizer.json does not have: name its folder instead")

    def supervised_chat_ids(self, chat: Sequence[dict[str, Any]]) -> Ids:
        """Refuse: a tokenizer.json has no chat template."""
        raise ValueError(self.render(chat))


class FolderTokenizer:
    """A model's folder or name on the Hub, with its chat template."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer, PretrainedConfig  # optional
        except ImportError as error:
            raise _not_installed("transformers") from error
        self.name = name
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # a broken tokenizer fails in many ways
            raise ConfigError(f"tokenizer {name} cannot be loaded: {_first_line(error)}") from error
        self.special_ids = sorted(set(self._tokenizer.all_special_ids))
        try:
            config, _ = PretrainedConfig.get_config_dict(name)
        except OSError:
            config = {}
        self.vocab_size = _vocab_size_of(config)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Ids]:
        """Ids of each text, int64 `[tokens]`."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, np.int64) for ids in encoded["input_ids"]]

    def render(self, chat: Sequence[dict[str, Any]]) -> str:
        """A chat in the tokenizer's chat template. Raises ValueError where it cannot."""
        return str(self._apply(chat, tokenize=False))

    def supervised_chat_ids(self, chat: Sequence[dict[str, Any]]) -> Ids:
        """Ids of the assistant's tokens, which the template marks. Raises ValueError where it does not."""
        if not re.search(r"\{%-?\s*generation\b", self._tokenizer.get_chat_template()):
            raise ValueError(
                f"the chat template of {self.name} does not mark the assistant's tokens ({{% generation %}}), so they "
                "cannot be told apart: count every token, or give input_ids with loss_mask"
            )
        encoded = self._apply(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return np.asarray(encoded["input_ids"], np.int64)[np.asarray(encoded["assistant_masks"], np.bool_)]

    def _apply(self, chat: Sequence[dict[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError  # optional

        messages = [_message(message) for message in chat]
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template of {self.name} refuses it: {_first_line(error)}") from error


def _message(message: Any) -> dict[str, Any]:
    fields = message if isinstance(message, dict) else {}
    if "role" in fields:
        return {key: value for key, value in fields.items() if value is not None or key == "content"}
    if "from" in fields and "value" in fields:
        return {"role": _ROLES.get(fields["from"], fields["from"]), "content": fields["value"]}
    what = ", ".join(fields) or f"{message!r:.40}"
    raise ValueError(f"a message has {what}: it needs role and content, or from and value")


def _config_vocab_size(path: Path) -> int | None:
    try:
        return _vocab_size_of(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _vocab_size_of(config: dict[str, Any]) -> int | None:
    size = (config.get("text_config") or config).get("vocab_size", config.get("vocab_size"))
    return size if isinstance(size, int) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _not_installed(library: str) -> ConfigError:
    return ConfigError(f'counting text needs {library}, which is not installed: pip install "eagle-target[vocab]"')
