"""Trains a small byte-level Llama for about a minute, on text that every machine with Python has.

The text is the Python standard library's own sources. The result is an ordinary Hugging Face checkpoint: a target for
the other examples that needs no download.

    python examples/byte_llama.py --out .demo/target --seconds 60
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn import functional

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 259

ROW_LENGTH = 128
ROWS_PER_STEP = 8
MIN_STEPS = 150
HELD_OUT_SHARE = 0.05
# Other people's packages, tests that not every machine has, and tables and prose in Python's clothes.
NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Token ids of two disjoint sets of files, each one int64 vector of documents between BOS and EOS."""

    train: torch.Tensor
    held_out: torch.Tensor


def load_corpus() -> Corpus:
    """Read the standard library's .py files, in an order that is the same everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    library = [name for name in names if not NOT_LIBRARY_CODE.intersection(name.parts)]
    library.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    documents = [encode((root / name).read_bytes()) for name in library]
    held_out = max(1, int(len(documents) * HELD_OUT_SHARE))
    return Corpus(train=torch.cat(documents[held_out:]), held_out=torch.cat(documents[:held_out]))


def encode(text: bytes) -> torch.Tensor:
    """Ids of one document, int64, with tabs for its indentation: else half of the target's guesses are a space."""
    body = torch.frombuffer(bytearray(text.replace(b"    ", b"\t") or b"\n"), dtype=torch.uint8).to(torch.int64)
    return torch.cat([torch.tensor([BOS]), body, torch.tensor([EOS])])


def random_rows(tokens: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Cut `[rows, length]` out of a vector of tokens, each row anywhere."""
    starts = torch.randint(len(tokens) - length + 1, (rows, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def build_model() -> torch.nn.Module:
    """A Llama of 8 layers and 1.6 million parameters."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return model


def build_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest: twice as good after a minute as AdamW for all."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    if not hasattr(torch.optim, "Muon"):  # torch < 2.9
        return [torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    return [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def bits_per_byte(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over `[rows, length]`, in bits; differentiable."""
    logits = model(input_ids=rows[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten()) / math.log(2)


def train(corpus: Corpus, seconds: float, progress: Progress, seed: int = 0) -> torch.nn.Module:
    """Train for a time, with the learning rate on a cosine over it; longer where that is less than `MIN_STEPS`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_model()
    optimizers = build_optimizers(model)
    peaks = [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
    task = progress.add_task("target", total=1.0, status="")
    started = time.monotonic()
    step, shown, done = 0, 8.0, 0.0
    while done < 1.0:
        warmup = min(1.0, (step + 1) / 20)
        share = warmup * 0.5 * (1.0 + math.cos(math.pi * done))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.zero_grad()
        loss = bits_per_byte(model, random_rows(corpus.train, ROWS_PER_STEP, ROW_LENGTH, generator))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        shown += (loss.item() - shown) * max(0.03, 1 / step)
        done = min((time.monotonic() - started) / seconds, step / MIN_STEPS)
        progress.update(task, completed=done, status=f"step {step}  {shown:.2f} bits per byte")
    return model.eval()


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: torch.Tensor, rows: int = 64, length: int = 256) -> float:
    """Bits per byte over rows from everywhere in a vector of tokens."""
    generator = torch.Generator().manual_seed(1)
    batches = torch.split(random_rows(tokens, rows, length + 1, generator), 16)
    return sum(float(bits_per_byte(model, batch)) for batch in batches) / len(batches)


@torch.no_grad()
def complete(model: torch.nn.Module, prompt: str, tokens: int = 80, temperature: float = 0.6) -> str:
    """A continuation of a prompt, the same every time."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[BOS, *prompt.encode()]])
    for _ in range(tokens):
        probabilities = torch.softmax(model(input_ids=ids).logits[:, -1] / temperature, dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return bytes(token for token in ids[0, 1:].tolist() if token < BOS).decode(errors="replace")


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write a checkpoint that every engine with Llama can load."""
    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))  # type: ignore[operator]


def progress_bar(console: Console) -> Progress:
    """A bar with the time and a line of figures, for tasks with a `status` field."""
    return Progress(
        TextColumn("[bold]{task.description:>8}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("[cyan]{task.fields[status]}"),
        console=console,
    )


def main() -> None:
    """Train, report and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".demo/target"), help="folder of the checkpoint")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to train")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console()
    corpus = load_corpus()
    with progress_bar(console) as progress:
        model = train(corpus, arguments.seconds, progress, arguments.seed)
    save(model, arguments.out)
    console.print(f"held-out text: {evaluate(model, corpus.held_out):.2f} bits per byte (8 for a uniform guess)")
    console.print(f"a sample: {complete(model, 'def __init__(self')!r}", markup=False)
    console.print(f"saved to {arguments.out}", markup=False)


if __name__ == "__main__":
    main()
