"""What a replica tells the controller of each request, so that it can decide which ones go on elsewhere."""

from loraserve.engines.description import RequestReport
from loraserve.request import GenerationRequest, num_prompt_tokens

MAX_ATTEMPTS = 8
"""A request that routers have sent so often stays where it is: they give up after a few more."""


def listed(request: GenerationRequest, remaining_tokens: int, order: tuple[int, int]) -> RequestReport:
    """The request as it stands: what it may still draw, and which attempt it is (`Turn.order`)."""
    drawn = max(len(request.resumed_token_ids), request.sampling.max_tokens - remaining_tokens)
    is_resumable = drawn == 0 or request.sampling.is_resumable
    return RequestReport(
        request_id=request.request_id,
        version_id=request.version_id,
        prompt_tokens=num_prompt_tokens(request.prompt),
        drawn_tokens=drawn,
        remaining_tokens=max(0, request.sampling.max_tokens - drawn),
        may_move=is_resumable and max(order) < MAX_ATTEMPTS,
    )
