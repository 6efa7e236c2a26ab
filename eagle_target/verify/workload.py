"""The batches that everything is measured on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from eagle_target.contract.vocab_mapping import VocabMapping

DRAFT_VOCAB = 32_000
# Batches of one client differ, so that nothing is answered from what was computed before.
VARIANTS = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Batches of random tokens.

    batch, seq: rows, and tokens a row, pads included. draft_vocab: ids of the draft; None for 32 000, or every id of a
    smaller target. loss_ratio: share of the real tokens that bear loss, the last ones of each row, as an answer's do.
    pad_ratio: share of all tokens that are pads, on the right; rows differ in length.

    Raises:
        ConfigError: no tokens, or a share that is none.
    """

    batch: int = 8
    seq: int = 512
    draft_vocab: int | None = None
    loss_ratio: float = 0.5
    pad_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seq < 2:
            raise ConfigError(f"a batch needs a row of two tokens at least, got {self.batch} x {self.seq}")
        if not 0 < self.loss_ratio <= 1 or not 0 <= self.pad_ratio < 1:
            raise ConfigError(
                f"loss_ratio must be over 0 and at most 1, pad_ratio at least 0 and under 1, "
                f"got {self.loss_ratio} and {self.pad_ratio}"
            )

    @property
    def row_lengths(self) -> list[int]:
        """Real tokens of each row: around the mean, from short to long, the longest as long as the row where it can."""
        mean = self.seq * (1 - self.pad_ratio)
        reach = min(self.seq - mean, mean / 2)
        places = [0.0] if self.batch == 1 else [2 * row / (self.batch - 1) - 1 for row in range(self.batch)]
        return [max(2, min(self.seq, round(mean + reach * place))) for place in places]

    @property
    def real_tokens(self) -> int:
        """Tokens of a batch that are no pads."""
        return sum(self.row_lengths)

    @property
    def supervised_tokens(self) -> int:
        """Tokens of a batch that bear loss."""
        return sum(self.loss_tokens(length) for length in self.row_lengths)

    def loss_tokens(self, length: int) -> int:
        """Of a row's real tokens, how many bear loss; at least one, and never the first."""
        return max(1, min(length - 1, round(self.loss_ratio * length)))

    def to_json(self) -> dict[str, Any]:
        """As arguments of `Workload`."""
        return asdict(self)

    def make_inputs(self, vocab_size: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """A few batches: input_ids, attention_mask and loss_mask int64 `[batch, seq]` each."""
        import torch

        attention, loss = torch.zeros(2, self.batch, self.seq, dtype=torch.int64)
        for row, length in enumerate(self.row_lengths):
            attention[row, :length] = 1
            loss[row, length - self.loss_tokens(length) : length] = 1
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (VARIANTS, self.batch, self.seq), generator=draw)
        return [(batch * attention, attention, loss) for batch in ids]

    def make_mapping(self, vocab_size: int) -> VocabMapping:
        """Random ids in an order of their own, or every id where the draft has them all."""
        return random_mapping(vocab_size, self.draft_vocab)


def random_mapping(vocab_size: int, draft_vocab: int | None) -> VocabMapping:
    """Random ids in an order of their own, the same each time; every id where the draft has them all.

    Raises:
        ConfigError: more ids than the target has.
    """
    import torch

    from eagle_target.contract.vocab_mapping import VocabMapping

    size = min(DRAFT_VOCAB, vocab_size) if draft_vocab is None else draft_vocab
    if not 0 < size <= vocab_size:
        raise ConfigError(f"the draft vocabulary must have 1 to {vocab_size} ids, got {size}")
    if size == vocab_size:
        return VocabMapping.identity(vocab_size)
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))[:size]
    return VocabMapping.from_ids(ids.clone(), vocab_size)
