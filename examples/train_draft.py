"""Trains an EAGLE-3 draft for a frozen target, and measures what it learned on held-out text.

The target answers over the wire, or runs in this process; nothing else changes:

    eagle-target serve --engine hf --model .demo/target --port 8001
    python examples/train_draft.py --url http://127.0.0.1:8001

    python examples/train_draft.py --colocated .demo/target
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from byte_llama import BOS, VOCAB_SIZE, Corpus, load_corpus, progress_bar, random_rows
from eagle3_draft import Cache, Draft, DraftConfig, Eagle3Draft, accept_length, unroll
from rich.console import Console
from rich.table import Table

from eagle_target import Eagle3TargetBackend, RemoteEagle3TargetModel, VocabMapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress

    from eagle_target import Eagle3TargetBatch
    from eagle_target.contract.model_info import ModelInfo, TrafficTotals

PREFETCH_DEPTH = 2
HELD_OUT_BATCHES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to train. `prompt_tokens` at the head of a row bear no loss, as a prompt in chat data bears none."""

    steps: int = 300
    batch_size: int = 8
    seq_len: int = 256
    ttt_steps: int = 4
    prompt_tokens: int = 16
    draft_vocab_size: int = 96
    learning_rate: float = 3e-3
    evaluate_every: int = 30
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A draft on held-out text. agreement: share of slots with the target's top token, at each depth."""

    step: int
    loss: float
    agreement: list[float]
    accept_length: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A finished run. `evaluations` starts with the untrained draft; rates are of the training alone.

    entropy: of the target's own predictions on the held-out text, which no draft's loss can go below.
    context_free: what a draft would reach that proposes the most likely token of all, every time.
    """

    losses: list[float]
    evaluations: list[Evaluation]
    entropy: float
    context_free: Evaluation
    coverage: float
    seconds: float
    tokens_per_second: float
    bytes_per_token: float | None
    target: ModelInfo

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")


def trainer_rows(
    tokens: torch.Tensor, settings: Settings, batches: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as a dataloader gives them: ids and two masks, int64 `[batch, seq]`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        ids = random_rows(tokens, settings.batch_size, settings.seq_len, generator)
        loss_mask = torch.ones_like(ids)
        loss_mask[:, : settings.prompt_tokens] = 0
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": loss_mask}


def train_draft(target: Eagle3TargetBackend, corpus: Corpus, settings: Settings, progress: Progress) -> Result:
    """Train a draft against any backend."""
    counts = torch.bincount(corpus.train, minlength=VOCAB_SIZE)
    mapping = VocabMapping.from_counts(counts, settings.draft_vocab_size, special_ids=[BOS])
    target.set_vocab_mapping(mapping)

    torch.manual_seed(settings.seed)
    embedding = target.get_input_embeddings().weight
    hidden = embedding.shape[1]
    config = DraftConfig(hidden_size=hidden, draft_vocab_size=mapping.draft_vocab_size, intermediate_size=2 * hidden)
    draft = Eagle3Draft(config, embedding.float())
    optimizer = torch.optim.AdamW(draft.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, settings.steps))

    # The target is frozen, so its supervision of the held-out text is asked for once.
    held_out = list(target.prefetch(trainer_rows(corpus.held_out, settings, HELD_OUT_BATCHES, settings.seed)))
    evaluations = [evaluate(draft, held_out, settings.ttt_steps, step=0)]
    losses: list[float] = []
    task = progress.add_task("draft", total=settings.steps, status="")
    traffic, seconds = _traffic(target), 0.0

    rows = trainer_rows(corpus.train, settings, settings.steps, settings.seed + 1)
    started = time.monotonic()
    for step, batch in enumerate(target.prefetch(rows, depth=PREFETCH_DEPTH), start=1):
        result = unroll(draft, batch, settings.ttt_steps)
        optimizer.zero_grad()
        result.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(result.loss.item())
        first_hits = float(result.hits[0] / result.supervised[0].clamp(min=1))
        progress.update(task, advance=1, status=f"loss {losses[-1]:.3f}  top-1 agreement {first_hits:.0%}")
        if step % settings.evaluate_every == 0 or step == settings.steps:
            seconds += time.monotonic() - started
            evaluations.append(evaluate(draft, held_out, settings.ttt_steps, step=step))
            started = time.monotonic()

    tokens = settings.steps * settings.batch_size * settings.seq_len
    probs = supervised_probs(held_out)
    return Result(
        losses=losses,
        evaluations=evaluations,
        entropy=float(torch.special.entr(probs).sum(dim=-1).mean()),
        context_free=evaluate(ContextFreeDraft(probs.mean(dim=0)), held_out, settings.ttt_steps, step=0),
        coverage=mapping.coverage(counts),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        bytes_per_token=_bytes_per_token(traffic, _traffic(target)),
        target=target.model_info(),
    )


class ContextFreeDraft:
    """Predicts the same distribution everywhere: a draft that reads nothing, to measure one against that does."""

    def __init__(self, probs: torch.Tensor) -> None:
        self.logits = probs.log().clamp(min=-50.0)

    def fuse(self, aux_hidden_states: torch.Tensor) -> torch.Tensor:
        """See `Draft`."""
        return aux_hidden_states

    def __call__(
        self, input_ids: torch.Tensor, hidden: torch.Tensor, attention_mask: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Draft`."""
        del attention_mask, cache
        return hidden, self.logits.expand(*input_ids.shape, -1)


@torch.no_grad()
def evaluate(draft: Draft, batches: list[Eagle3TargetBatch], depths: int, *, step: int) -> Evaluation:
    """Compare a draft with the target over batches that it was not trained on."""
    unrolled = [unroll(draft, batch, depths) for batch in batches]
    hits, supervised, alive, chains = (
        torch.stack([getattr(one, name) for one in unrolled]).sum(dim=0)
        for name in ("hits", "supervised", "alive", "chains")
    )
    return Evaluation(
        step=step,
        loss=sum(one.loss.item() for one in unrolled) / len(unrolled),
        agreement=(hits / supervised.clamp(min=1)).tolist(),
        accept_length=accept_length(alive, chains),
    )


def supervised_probs(batches: list[Eagle3TargetBatch]) -> torch.Tensor:
    """The target's distributions `[slots, V]` in all slots that bear loss."""
    pairs = [(batch.target_probs, batch.position_mask) for batch in batches]
    return torch.cat([probs[mask[..., 0]] for probs, mask in pairs if probs is not None and mask is not None])


def comparison_table(result: Result) -> Table:
    """The untrained draft, one that reads nothing, and the trained one, side by side."""
    columns = (result.evaluations[0], result.context_free, result.evaluations[-1])
    table = Table(title="The draft on held-out text")
    table.add_column("")
    for title, style in (("untrained", None), ("reads nothing", "dim"), ("trained", "bold")):
        table.add_column(title, justify="right", style=style)
    table.add_row("loss", *(f"{one.loss:.3f}" for one in columns))
    for depth in range(len(columns[0].agreement)):
        table.add_row(f"top-1 agreement, depth {depth + 1}", *(f"{one.agreement[depth]:.1%}" for one in columns))
    table.add_section()
    table.add_row("accept length, simulated", *(f"{one.accept_length:.2f}" for one in columns))
    return table


def open_target(arguments: argparse.Namespace) -> Eagle3TargetBackend:
    """The backend that the command line names."""
    if arguments.colocated is None:
        return RemoteEagle3TargetModel.from_urls([arguments.url], device="cpu", encoding="hidden")
    from eagle_target_hf import HFEagle3TargetModel

    return HFEagle3TargetModel.from_pretrained(arguments.colocated, device="cpu", encoding="hidden")


def main() -> None:
    """Train, print the comparison, save the figures."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a running server")
    where.add_argument("--colocated", metavar="PATH", help="a checkpoint to run in this process")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="rows")
    parser.add_argument("--seq-len", type=int, default=defaults.seq_len, help="tokens of a row")
    parser.add_argument("--ttt-steps", type=int, default=defaults.ttt_steps, help="depths of training-time test")
    parser.add_argument("--draft-vocab-size", type=int, default=defaults.draft_vocab_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--out", type=Path, default=Path("draft-result.json"), help="where the figures go")
    arguments = parser.parse_args()
    settings = Settings(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        ttt_steps=arguments.ttt_steps,
        draft_vocab_size=arguments.draft_vocab_size,
        learning_rate=arguments.learning_rate,
    )
    console = Console()
    with open_target(arguments) as target, progress_bar(console) as progress:
        result = train_draft(target, load_corpus(), settings, progress)
    result.write(arguments.out)
    console.print(comparison_table(result))
    console.print(f"{result.tokens_per_second:,.0f} tokens/s; figures in {arguments.out}", highlight=False)


def _warmup_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 20) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _traffic(target: Eagle3TargetBackend) -> TrafficTotals | None:
    """What a remote target counted so far; a co-located one moves no bytes."""
    return target.model_info().get("traffic")


def _bytes_per_token(before: TrafficTotals | None, after: TrafficTotals | None) -> float | None:
    if before is None or after is None or after["tokens"] == before["tokens"]:
        return None
    return (after["bytes_received"] - before["bytes_received"]) / (after["tokens"] - before["tokens"])


if __name__ == "__main__":
    main()
