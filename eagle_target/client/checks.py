"""What a client holds a request to before it is sent, and an answer before its tensors are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.errors import ProtocolError, RequestTooLarge

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from eagle_target.protocol import Limits
    from eagle_target.supervision import SupervisionRequest


def check_answer(url: str, given: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare an answer's headers, or what came with its tensors, with what was asked for.

    Raises:
        ProtocolError: it is another request's, or of another target or mapping.
    """
    for name, value in expected.items():
        if given.get(name) != value:
            raise ProtocolError(
                f"{url} answered with {name} {given.get(name)!r}, expected {value!r}: "
                "it answered another request, or was restarted with another target"
            )


def check_weights(url: str, tensors: Mapping[str, torch.Tensor], rows: int, hidden_size: int) -> None:
    """Refuse rows of the embedding or the head that are not of this target's sizes: `weight`, and `bias` if any.

    Raises:
        ProtocolError: names the tensor.
    """
    for name, shape in (("weight", (rows, hidden_size)), ("bias", (rows,))):
        found = tensors.get(name)
        if found is None and name == "bias":
            continue
        if found is None or tuple(found.shape) != shape or not found.is_floating_point():
            got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ProtocolError(f"{url} answered with {name} {got}, expected floats {list(shape)}")


def check_limits(url: str, request: SupervisionRequest, limits: Limits) -> None:
    """Refuse a request that a server said it does not take.

    Raises:
        RequestTooLarge: too many tokens, or too large a body.
    """
    size = 9 * request.tokens + 8 * len(request.seq_lens) + 1024
    if request.tokens > limits.max_request_tokens or size > limits.max_body_bytes:
        raise RequestTooLarge(
            f"the batch has {request.tokens} tokens, {url} takes {limits.max_request_tokens} and bodies of "
            f"{limits.max_body_bytes} bytes: use a smaller batch, or raise its limits",
            status=413,
            problem="too-many-tokens",
        )
