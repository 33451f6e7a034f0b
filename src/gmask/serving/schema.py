"""The bodies of requests.

OpenAI's parameters keep their names and defaults, unless a comment says otherwise. An unknown parameter is an error and
is not ignored, unless it asks for nothing: see `asks_for_nothing`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator, model_validator

from gmask.config import Range, hints_of
from gmask.files import check_text
from gmask.generation.embed import Pooling
from gmask.generation.settings import Sampling, ScoreNormalization


def in_range_of(setting: str, **limits: int) -> Any:
    """Returns the range of a field of `Sampling` for pydantic; ``limits`` are further ones of the API."""
    hint = hints_of(Sampling)[setting]
    (annotated,) = (one for one in (hint, *get_args(hint)) if get_origin(one) is Annotated)  # it may be None, too
    kind, *ranges = get_args(annotated)
    found: dict[str, Any] = {}
    for own in ranges:
        assert isinstance(own, Range)
        bounds = {"ge": own.least, "gt": own.above, "le": own.most, "lt": own.below}
        found |= {name: bound for name, bound in bounds.items() if bound is not None}
    if kind is int and "gt" in found:
        found["ge"] = found.pop("gt") + 1
    if limits.keys() & {"le", "lt"}:
        found = {name: bound for name, bound in found.items() if name not in ("le", "lt")}
    return Field(**found | limits)


INT32 = 2**31
Probability = Annotated[float, in_range_of("top_p")]
Temperature = Annotated[float, in_range_of("temperature", le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, in_range_of("seed", lt=2**63)]
MaxTokens = Annotated[int, in_range_of("max_tokens", lt=INT32)]
SampleCount = Annotated[int, in_range_of("n")]
TopLogprobCount = Annotated[int, in_range_of("top_logprobs")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=INT32)]], Field(min_length=1, fail_fast=True)]
"""Lists fail fast: a body may hold 200,000 wrong entries, and only the first error is reported."""

AnyText = Annotated[str, AfterValidator(check_text)]
Text = Annotated[str, Field(min_length=1), AfterValidator(check_text)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
RoundTexts = Annotated[list[AnyText], Field(min_length=2, max_length=2)]  # asked, answered
Unread = WrapValidator(lambda value, _: value)  # documented by its type, and read by gmask.conversation


def refuse_many(values: Any) -> Any:
    """Raises `ValueError` for a mapping of more than `MOST_ENTRIES`, before any of them is looked at."""
    if isinstance(values, dict) and len(values) > MOST_ENTRIES:
        raise ValueError(f"has {len(values)} entries, where {MOST_ENTRIES} are taken")
    return values


MOST_ENTRIES = 1024
Few = BeforeValidator(refuse_many)


def refuse_tools(tools: list[Any]) -> list[Any]:
    """Raises `ValueError` for a list of tools; some clients always send an empty one."""
    if tools:
        raise ValueError("these models call no tools: leave it out")
    return tools


Tools = Annotated[list[Any], AfterValidator(refuse_tools)]
StopText = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(check_text)]


EMPTY: Sequence[Any] = (None, "", "none", [], {})
OFTEN_EMPTY = frozenset(
    {"tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "response_format", "stream_options",
     "logit_bias", "metadata", "service_tier", "encoding_format", "tool_calls", "refusal", "annotations", "audio"}
)  # fmt: skip
"""OpenAI's parameters that clients send empty; of others, such as a stop text, an empty one is a mistake."""

UNSAID: dict[str, Sequence[Any]] = {
    "n": [1], "best_of": [1], "stream": [False], "echo": [False], "logprobs": [False],
    "response_format": [{"type": "text"}], "tool_choice": ["auto"], "function_call": ["auto"],
    "parallel_tool_calls": [True, False], "modalities": [["text"]],
}  # fmt: skip
"""What OpenAI's clients may send of parameters that an endpoint has not, for it is what happens without them."""


def asks_for_nothing(name: str, value: Any, *, is_known: bool) -> bool:
    """Whether a parameter may as well be left out."""
    if is_known:
        return value is None or (name in OFTEN_EMPTY and value in EMPTY)
    return value in EMPTY or value in UNSAID.get(name, ())


class Body(BaseModel):
    """The JSON object of a request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        needed = {name for name, field in fields.items() if field.is_required()}
        kept = {
            name: value
            for name, value in values.items()
            if name in needed or not asks_for_nothing(name, value, is_known=name in fields)
        }
        unknown = [name for name in kept if name not in fields]  # one of them is told, and there may be thousands
        return {name: value for name, value in kept.items() if name in fields or name == unknown[0]}


class Bookkeeping(Body):
    """What OpenAI's clients may send for OpenAI's own books; it changes no answer."""

    model: str | None = None  # must be the name of the served model where it is given
    user: str | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], Few] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class JsonSchema(Body):
    """The schema that an answer shall follow."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # always is


class ResponseFormat(Body):
    """The form that an answer shall have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of OpenAI's; there is none here


class Sampled(Bookkeeping):
    """How tokens are chosen."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, in_range_of("top_k", lt=INT32)] | None = None
    min_tokens: Annotated[int, in_range_of("min_tokens", lt=INT32)] | None = None
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    repetition_penalty: Annotated[float, in_range_of("repetition_penalty", le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Few] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None  # seconds; at most the server's own limit


class Constrained(Sampled):
    """What an answer may consist of; one of the three at most."""

    response_format: ResponseFormat | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: AnyText


class ChatMessage(Body):
    """One message of a conversation. These models know no system role: its text goes before the next question."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[AnyText | list[TextPart], Unread]
    name: str | None = None
    refusal: None = None  # sent back by clients with the assistant's messages, as are the next four
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Tools | None = None


ChatMessages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
FilledList: Any = Field(min_length=1, fail_fast=True)


class ChatRequest(Constrained):
    """``POST /v1/chat/completions``. Temperature, top_p and top_k default to ChatGLM's 0.95, 0.7 and 50."""

    messages: ChatMessages
    max_tokens: MaxTokens | None = None  # the rest of the context
    max_completion_tokens: MaxTokens | None = None
    n: SampleCount | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Tools | None = None  # these five are taken where they ask for nothing
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Tools | None = None
    function_call: Literal["none", "auto"] | None = None


class CompletionRequest(Constrained):
    """``POST /v1/completions``: what follows the prompt or, with a suffix, what stands between the two."""

    prompt: (
        AnyText
        | Annotated[list[AnyText], Field(fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    suffix: AnyText | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=INT32)] | None = None  # 16; with echo it may be 0
    n: SampleCount | None = None
    best_of: SampleCount | None = None
    logprobs: TopLogprobCount | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class EmbeddingRequest(Bookkeeping):
    """``POST /v1/embeddings``; ``pooling`` and ``layer`` as of `gmask.embed`."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Pooling = "mean"
    layer: int = -1


class InfillRequest(Sampled):
    """``POST /v1/infill``: a text with blanks, its parameters as of `gmask.infill`, greedy by default."""

    text: Text
    choices: Texts | Annotated[list[Texts], Field(fail_fast=True)] | Annotated[dict[int, Texts], Few] | None = None
    max_tokens: MaxTokens = Sampling().max_tokens
    n: SampleCount = Sampling().n
    num_beams: Annotated[int, in_range_of("num_beams", le=64)] = Sampling().num_beams
    logprobs: bool = False
    stream: bool = False


class ScoreRequest(Bookkeeping):
    """``POST /v1/score``: as of `gmask.score`."""

    text: Text | Annotated[list[Text], Field(min_length=1, max_length=256, fail_fast=True)]
    answers: (
        Annotated[Texts, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[Texts, Field(min_length=1, max_length=1024)]], Field(min_length=1, fail_fast=True)]
    )
    normalization: ScoreNormalization = "sum"


class RatedConversation(Body):
    """A conversation that ends with the answer that is rewarded."""

    messages: ChatMessages


class ClassifyRequest(Bookkeeping):
    """``POST /classify``: answers that a reward model rewards; one of ``input`` and ``messages``.

    A text or its ids are a prompt and its answer as the chat template writes them, control words included.
    """

    input: (
        Text
        | Annotated[list[Text], FilledList]
        | TokenIds
        | Annotated[list[TokenIds], FilledList]
        | Annotated[list[RatedConversation], FilledList]
        | None
    ) = None
    messages: ChatMessages | None = None
    use_activation: bool | None = None  # true: the sigmoid of each reward, which is vLLM's default; here it is false
    timeout: Annotated[float, Field(gt=0)] | None = None


class PublishedRequest(BaseModel):
    """``POST /``, the API that came with ChatGLM-6B. There, too, unknown parameters do nothing."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: AnyText
    history: Annotated[list[RoundTexts] | None, Unread] = None
    max_length: Annotated[int, Field(ge=1)] | None = None  # 2048: tokens of prompt and reply; at most the context
    top_p: Probability | None = None  # 0.7
    temperature: Temperature | None = None  # 0.95
