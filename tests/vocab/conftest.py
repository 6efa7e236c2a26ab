"""A small real tokenizer with a chat template, and writers of data files."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

SENTENCES = [
    "The draft proposes tokens and the target checks them.",
    "Speculative decoding makes a large model two times faster.",
    "A vocabulary mapping keeps the most frequent tokens.",
    "Count the tokens, choose the best, and train the draft.",
]
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 320  # more than the tokenizer has, as in padded models
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
    "{% elif m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder: tokenizer, chat template and config.json."""
    return save_folder(bpe, tmp_path_factory.mktemp("folder"), TEMPLATE)


def save_folder(bpe: Tokenizer, folder: Path, template: str | None) -> Path:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=template,
    )
    wrapped.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE}))
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`write_jsonl(records, name="data.jsonl")`, gzipped when the name says so."""

    def write(records: Iterable[Any], name: str = "data.jsonl") -> Path:
        text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.fixture
def folder_with_template(bpe: Tokenizer, tmp_path: Path) -> Callable[[str | None], Path]:
    """`folder_with_template(template)`: a tokenizer folder with another chat template, or with none."""

    def make(template: str | None) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        return save_folder(bpe, folder, template)

    return make
