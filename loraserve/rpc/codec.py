"""Between protobuf messages and the values that the rest of the code works on.

Everything a client may not ask for is refused here, by field name, so that router, replica and
engines see valid requests only.
"""

from collections.abc import Iterable
from types import MappingProxyType

from google.protobuf.unknown_fields import UnknownFieldSet

from loraserve.errors import BadInputError
from loraserve.request import (
    TEXT_CHARACTERS_PER_TOKEN,
    ChatTurn,
    FinishReason,
    GenerationRequest,
    GenerationStep,
    Logprob,
    SamplingParams,
)
from loraserve.rpc.limits import MAX_ADAPTER_CHARS, MAX_REQUEST_ID_CHARS, SAMPLING_CHECKS
from loraserve.rpc.v1 import inference_pb2
from placement.types import VersionId

PROTOCOL_VERSION = 3
"""What this code speaks in `loraserve.internal.v1`; another number is refused by both ends."""

_DEFAULTS = SamplingParams()
_FINISH_CODES = MappingProxyType(
    {
        None: inference_pb2.FINISH_REASON_UNSPECIFIED,
        FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
        FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
        FinishReason.ABORTED: inference_pb2.FINISH_REASON_ABORTED,
    }
)
_FINISH_REASONS = MappingProxyType({code: reason for reason, code in _FINISH_CODES.items()})


def check_protocol(version: int, peer: str) -> None:
    """BadInputError when `peer` ("the router", "replica r0", ...) speaks another protocol version."""
    if version != PROTOCOL_VERSION:
        raise BadInputError(
            f"protocol_version: {peer} speaks version {version} and this side {PROTOCOL_VERSION};"
            " run the same LoRAServe release on both"
        )


def check_adapter_name(name: str) -> None:
    """BadInputError for a name that is longer than any adapter's."""
    if len(name) > MAX_ADAPTER_CHARS:
        raise BadInputError(f"adapter: {len(name)} characters; at most {MAX_ADAPTER_CHARS} are allowed")


def validate_generate(message: inference_pb2.GenerateRequest) -> None:
    """BadInputError, naming the field, for anything that cannot be honoured."""
    if len(message.request_id) > MAX_REQUEST_ID_CHARS:
        raise BadInputError(
            f"request_id: {len(message.request_id)} characters; at most {MAX_REQUEST_ID_CHARS} are allowed"
        )
    check_adapter_name(message.adapter)
    if len(message.idempotency_key) > MAX_REQUEST_ID_CHARS:
        raise BadInputError(
            f"idempotency_key: {len(message.idempotency_key)} characters;"
            f" at most {MAX_REQUEST_ID_CHARS} are allowed"
        )
    if message.images:
        raise BadInputError("images: text only; leave it out")
    _refuse_unknown(message, "")
    _validate_prompt(message)
    if message.HasField("sampling"):
        _validate_sampling(message.sampling)
    if message.HasField("resume"):
        _validate_resume(message)


def parse_generate(
    message: inference_pb2.GenerateRequest,
    *,
    request_id: str,
    version_id: VersionId | None,
    resumed_token_ids: tuple[int, ...] = (),
) -> GenerationRequest:
    """The request as a value, validated; BadInputError names the field that is wrong.

    `resumed_token_ids` follow those of the message's own `resume`.
    """
    validate_generate(message)
    prompt: str | tuple[int, ...] | tuple[ChatTurn, ...]
    match message.WhichOneof("prompt"):
        case "token_ids":
            prompt = tuple(message.token_ids.ids)
        case "chat":
            prompt = tuple(ChatTurn(role=turn.role, content=turn.content) for turn in message.chat.messages)
        case _:
            prompt = message.text
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        version_id=version_id,
        sampling=_parse_sampling(message.sampling),
        resumed_token_ids=tuple(message.resume.token_ids) + resumed_token_ids,
    )


def prompt_length(message: inference_pb2.GenerateRequest) -> int:
    """The tokens of the prompt, about, as `loraserve.request.num_prompt_tokens` has it."""
    match message.WhichOneof("prompt"):
        case "token_ids":
            return max(1, len(message.token_ids.ids))
        case "text":
            return max(1, len(message.text) // TEXT_CHARACTERS_PER_TOKEN)
        case _:
            num_characters = sum(len(one.content) for one in message.chat.messages)
            return max(1, num_characters // TEXT_CHARACTERS_PER_TOKEN)


def is_resumable(sampling: inference_pb2.SamplingParams) -> bool:
    """Whether a request that asks for this can go on exactly on another engine."""
    return _parse_sampling(sampling).is_resumable


def encode_generate(request: GenerationRequest, *, adapter: str) -> inference_pb2.GenerateRequest:
    """The message a client sends for this request; `adapter` '' names the base model."""
    message = inference_pb2.GenerateRequest(request_id=request.request_id, adapter=adapter)
    match request.prompt:
        case str(text):
            message.text = text
        case prompt:
            turns = [turn for turn in prompt if isinstance(turn, ChatTurn)]
            if turns:
                message.chat.messages.extend(
                    inference_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in turns
                )
            else:
                message.token_ids.ids.extend(token for token in prompt if isinstance(token, int))
    sampling = request.sampling
    message.sampling.CopyFrom(
        inference_pb2.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop=sampling.stop,
            stop_token_ids=sampling.stop_token_ids,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logprobs=sampling.logprobs,
            ignore_eos=sampling.ignore_eos,
        )
    )
    return message


def encode_step(
    step: GenerationStep, *, first: bool, request_id: str, version_id: VersionId | None
) -> inference_pb2.GenerateResponse:
    """One streamed message; the first of a request also names the request and the weights."""
    return inference_pb2.GenerateResponse(
        token_ids=step.token_ids,
        text=step.text,
        finish_reason=_FINISH_CODES[step.finish_reason],
        logprobs=[
            inference_pb2.TokenLogprobs(
                top=[
                    inference_pb2.Logprob(
                        token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, text=entry.text
                    )
                    for entry in position
                ]
            )
            for position in step.logprobs
        ],
        prompt_tokens=step.prompt_tokens,
        output_tokens=step.output_tokens,
        adapter_version=(version_id or "") if first else "",
        request_id=request_id if first else "",
        stop_reason=step.stop_reason or "",
    )


def decode_step(message: inference_pb2.GenerateResponse) -> GenerationStep:
    """The step in a message; BadInputError for a finish reason that this release does not know."""
    code = message.finish_reason
    if code not in _FINISH_REASONS:
        raise BadInputError(f"finish_reason: {code} is unknown to this release; update the client")
    return GenerationStep(
        token_ids=tuple(message.token_ids),
        text=message.text,
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
        finish_reason=_FINISH_REASONS[code],
        stop_reason=message.stop_reason or None,
        logprobs=tuple(
            tuple(
                Logprob(token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, text=entry.text)
                for entry in position.top
            )
            for position in message.logprobs
        ),
    )


def join_steps(steps: Iterable[GenerationStep]) -> GenerationStep:
    """All steps of one request as one, for a unary answer; ValueError when there is none."""
    parts = list(steps)
    if not parts:
        raise ValueError("a request without steps has no answer")
    last = parts[-1]
    return GenerationStep(
        token_ids=tuple(token for step in parts for token in step.token_ids),
        text="".join(step.text for step in parts),
        prompt_tokens=last.prompt_tokens,
        output_tokens=last.output_tokens,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=tuple(position for step in parts for position in step.logprobs),
    )


def _validate_resume(message: inference_pb2.GenerateRequest) -> None:
    sampling = _parse_sampling(message.sampling)
    if not sampling.is_resumable:
        raise BadInputError(
            "resume: a request with a seed, a presence or frequency penalty, or logprobs cannot be resumed"
            " exactly; send it again from its beginning"
        )
    given = len(message.resume.token_ids)
    if given >= sampling.max_tokens:
        raise BadInputError(
            f"resume.token_ids: {given} tokens, and sampling.max_tokens is {sampling.max_tokens};"
            " nothing is left to generate"
        )


def _validate_prompt(message: inference_pb2.GenerateRequest) -> None:
    match message.WhichOneof("prompt"):
        case None:
            raise BadInputError("prompt: missing; give text, token_ids or chat")
        case "text":
            if not message.text:
                raise BadInputError("text: empty; give at least one character")
        case "token_ids":
            if not message.token_ids.ids:
                raise BadInputError("token_ids.ids: empty; give at least one token id")
        case "chat":
            if not message.chat.messages:
                raise BadInputError("chat.messages: empty; give at least one message")
            for index, turn in enumerate(message.chat.messages):
                if not turn.role:
                    raise BadInputError(f"chat.messages[{index}].role: empty; give system, user or assistant")


def _validate_sampling(sampling: inference_pb2.SamplingParams) -> None:
    # Only the fields that are set are visited: a request sets few of them.
    for descriptor, value in sampling.ListFields():
        SAMPLING_CHECKS[descriptor.name](value)
    _refuse_unknown(sampling, "sampling.")
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else _DEFAULTS.max_tokens
    if sampling.min_tokens > max_tokens:
        raise BadInputError(
            f"sampling.min_tokens: {sampling.min_tokens} is more than max_tokens ({max_tokens}); lower it"
        )


def _refuse_unknown(
    message: inference_pb2.GenerateRequest | inference_pb2.SamplingParams, prefix: str
) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise BadInputError(
            f"{prefix}field {unknown[0].field_number}: unknown to this release;"
            " leave it out or update the server"
        )


def _parse_sampling(sampling: inference_pb2.SamplingParams) -> SamplingParams:
    has = sampling.HasField
    base = _DEFAULTS
    return SamplingParams(
        temperature=sampling.temperature if has("temperature") else base.temperature,
        top_p=sampling.top_p if has("top_p") else base.top_p,
        top_k=max(sampling.top_k, 0),
        min_p=sampling.min_p,
        seed=sampling.seed if has("seed") else None,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        max_tokens=sampling.max_tokens if has("max_tokens") else base.max_tokens,
        min_tokens=sampling.min_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty
        if has("repetition_penalty")
        else base.repetition_penalty,
        logprobs=sampling.logprobs if has("logprobs") else None,
        ignore_eos=sampling.ignore_eos,
    )
