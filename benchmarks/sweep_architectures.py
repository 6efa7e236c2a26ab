"""Every causal and image-text class of the installed transformers, tiny, through the hf adapter.

    python -m benchmarks.sweep_architectures [--only NAME ...] [--write]      # or: make sweep-architectures

Each class is built from its own config, saved, loaded by the adapter and run on ragged batches; layers, last hidden
states and logits are compared with the model's own forward, a sequence at a time. A class has a process of its own,
with a limit of time and memory. `equal`, `refused` by the adapter at load, `wrong`, and `not built` where transformers'
defaults do not make a small model. The status is 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import resource
import sys
import tempfile
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from eagle_target_hf import HFAdapter, HFOptions, HFTargetRunner
from transformers.models.auto import modeling_auto

from benchmarks.report import print_result, print_table
from benchmarks.tiny_architectures import VOCAB, tiny_config, tiny_model
from eagle_target.errors import EagleTargetError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SECONDS = 600.0
MEMORY_BYTES = 8 << 30
LENGTHS = (5, 11, 1, 11, 9, 3, 20)
TOLERANCE = 1e-3
# In what a class says that wants more than token ids; others have a config here that does not fit.
_FURTHER_INPUTS = re.compile(
    r"pixel_values|patches|positional argument|inputs_embeds|encoder_outputs|Bbox|image_embeds"
)
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "engines" / "hf.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
OUTCOMES = ("equal", "refused", "wrong", "not built")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out for one class; `note` is the reason, or the largest difference."""

    name: str
    kind: str
    outcome: str
    note: str


def architectures() -> dict[str, tuple[str, type[Any]]]:
    """Kind and config class of every model class, by name."""
    found: dict[str, tuple[str, type[Any]]] = {}
    for kind, mapping in (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        ("image-text", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        for config_class, model_class in mapping.items():
            classes = model_class if isinstance(model_class, tuple) else (model_class,)
            for each in classes:
                # The class's own config where it is registered with that of a larger model, too.
                own = each.config_class if isinstance(each.config_class, type) else config_class
                found.setdefault(each.__name__, (kind, own))
    return dict(sorted(found.items()))


def examine(name: str, config_class: type[Any]) -> tuple[str, str]:
    """Outcome and note for one class."""
    try:
        config = tiny_config(config_class)
        model = tiny_model(getattr(transformers, name), config)
    except Exception as error:  # noqa: BLE001 - whatever a default config leads to
        return "not built", describe(error)
    try:
        require_states(model)
    except Exception as error:  # noqa: BLE001 - it needs more than token ids
        return examine_without_own(model, describe(error))
    try:
        runner, note = load(model)
        runner.set_aux_layers(chosen_layers(runner))
    except EagleTargetError as error:
        return "refused", describe(error)
    return compare(runner, model, note)


def load(model: Any) -> tuple[HFTargetRunner, str]:
    """The model through a folder; as it is, with a note why, where transformers cannot load what it has saved.

    Raises:
        AdapterError: the adapter refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            saved = type(model).from_pretrained(folder)
        except Exception as error:  # noqa: BLE001 - then nobody can load it
            return HFTargetRunner(model), f" (handed over as a module: {describe(error)})"
        del saved
        return HFAdapter.load(folder, HFOptions(device="cpu", dtype="float32")), ""


def examine_without_own(model: Any, reason: str) -> tuple[str, str]:
    """What the adapter says of a model whose own forward does not run on token ids alone."""
    try:
        HFTargetRunner(model)
    except EagleTargetError as error:
        if reason.partition(": ")[2] not in str(error) or _FURTHER_INPUTS.search(reason):
            return "refused", describe(error)
    return "not built", f"its own forward: {reason}"


def chosen_layers(runner: HFTargetRunner) -> list[int]:
    """The first, the middle and the last but one."""
    depth = runner.info.num_layers
    return [0, depth // 2, depth - 2] if depth > 4 else [0, 1, 2]


def compare(runner: HFTargetRunner, model: Any, note: str) -> tuple[str, str]:
    """The adapter's ragged batch against the model's own forward."""
    layers = chosen_layers(runner)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB - 5, (sum(LENGTHS),), generator=generator)
    forward = runner.forward_eagle3(ids, LENGTHS)
    given_logits = forward.logits
    if given_logits is None:
        given_logits = runner.compute_logits(forward.last_hidden_states)
    hidden = runner.info.hidden_size
    states, logits = [], []
    for piece in torch.split(ids, list(LENGTHS)):
        output = run(model, piece)
        states.append([state.reshape(len(piece), -1) for state in output.hidden_states])
        logits.append(output.logits[0][:, : runner.info.vocab_size])
    off = {"logits": difference(given_logits, torch.cat(logits))}
    # The list begins with the embeddings, or with the first layer's output.
    off["layers"] = min(
        max(
            difference(
                forward.aux_hidden_states[:, hidden * i : hidden * (i + 1)],
                torch.cat([own[layer + shift] for own in states]),
            )
            for i, layer in enumerate(layers)
        )
        for shift in (1, 0)
    )
    last = difference(forward.last_hidden_states, torch.cat([own[-1] for own in states]))
    worst = max(off.values())
    text = ", ".join(f"{name} {value:.0e}" for name, value in off.items())
    if last > TOLERANCE:
        note += f" (hidden_states[-1] is another state: {last:.0e})"
    return ("equal" if worst <= TOLERANCE else "wrong"), text + note


def require_states(model: Any) -> None:
    """Run the model alone.

    Raises:
        ValueError: it gives no hidden states to compare with.
    """
    if not run(model, torch.arange(3, 11)).hidden_states:
        raise ValueError("its own forward gives no hidden states to compare with")


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> Any:
    """The model's own forward of `[tokens]` ids."""
    return model(input_ids=ids[None], use_cache=False, output_hidden_states=True, return_dict=True)


def difference(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected number; infinite where shapes differ or one is not finite."""
    if given.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, given.isfinite()):
        return float("inf")
    ours, theirs = (torch.where(finite, tensor.float(), 0.0) for tensor in (given, expected))
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))


def describe(error: BaseException) -> str:
    """Its kind, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def examine_in_child(name: str, config_class: type[Any], answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        answer.send(examine(name, config_class))
    except BaseException as error:  # noqa: BLE001 - the parent tells it
        answer.send(("wrong", describe(error)))


def examine_apart(name: str, kind: str, config_class: type[Any]) -> Outcome:
    """Examine a class in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=examine_in_child, args=(name, config_class, theirs), daemon=True)
    process.start()
    theirs.close()
    outcome, note = "not built", f"over {SECONDS:.0f} s"
    if ours.poll(SECONDS):
        try:
            outcome, note = ours.recv()
        except EOFError:
            note = "its process ended, out of memory most likely"
    process.kill()
    process.join()
    return Outcome(name, kind, outcome, note)


def write_page(outcomes: list[Outcome]) -> None:
    """Put what came out between the marks of the page."""
    lines = [f"transformers {transformers.__version__}, {len(outcomes)} classes.", ""]
    for outcome in OUTCOMES:
        found = [each for each in outcomes if each.outcome == outcome]
        lines += [f"### {outcome.capitalize()}: {len(found)}", ""]
        if outcome == "equal":
            names = [f"{each.name}{' (as a module)' if 'as a module' in each.note else ''}" for each in found]
            lines += [*textwrap.wrap(", ".join(names), 120), ""]
        elif found:
            lines += ["| class | |", "|---|---|", *(f"| {each.name} | {_cell(each.note)} |" for each in found), ""]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def _cell(note: str) -> str:
    # In backticks: what is in brackets is no link.
    return "`" + note.removeprefix("AdapterError: ").replace("`", "'").replace("|", "\\|")[:200] + "`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"put the outcomes into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    wanted = {name: entry for name, entry in architectures().items() if not options.only or name in options.only}
    with ThreadPoolExecutor(options.workers) as pool:
        outcomes = list(pool.map(lambda item: examine_apart(item[0], *item[1]), wanted.items()))
    outcomes.sort(key=lambda outcome: (-OUTCOMES.index(outcome.outcome), outcome.name))
    rows = [[each.name, each.kind, each.outcome, each.note] for each in outcomes]
    print_table(f"transformers {transformers.__version__}", ["class", "kind", "outcome", "note"], rows)
    if options.write:
        write_page(outcomes)
    counts = {name: sum(each.outcome == name for each in outcomes) for name in OUTCOMES}
    print_result({"transformers": transformers.__version__, "classes": len(outcomes), **counts})
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
