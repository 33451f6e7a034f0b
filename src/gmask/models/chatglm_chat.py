"""ChatGLM's published chat: the prompt of a conversation, ``chat`` and ``stream_chat``.

``chat`` and ``stream_chat`` have the published signatures and defaults. transformers' top-k of 50 is active in both, as
it was in the published code. Scores that are not finite raise an error; the published code chose token 5 instead.

Source: published modeling_chatglm.py, ``chat`` and ``process_response``.
"""

import queue
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from gmask.conversation import Conversation, History, Round, Rounds, read_conversation
from gmask.errors import GmaskError
from gmask.files import check_characters

TRAINING_TIME = "[[训练时间]]"
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
IDEOGRAPH = "[\u4e00-\u9fff]"


def build_prompt(query: str, history: Rounds = ()) -> str:
    """Returns the prompt: the query alone, or all rounds in order with the query behind them."""
    if not history:
        return query
    rounds = [f"[Round {index}]\n问：{asked}\n答：{answered}\n" for index, (asked, answered) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


def clean_reply(text: str) -> str:
    """Returns the reply without white space around it, and with full-width punctuation beside Chinese characters."""
    text = text.strip().replace(TRAINING_TIME, "2023年")
    for mark, wide in FULL_WIDTH.items():
        text = re.sub(f"(?<={IDEOGRAPH}){re.escape(mark)}", wide, text)
        text = re.sub(f"{re.escape(mark)}(?={IDEOGRAPH})", wide, text)
    return text


TOP_K = 50
MOST_TOKENS = 1 << 15
"""The limit of a conversation's tokens for models that were trained on fewer: 16 times what ChatGLM-6B was trained on.
Rotary positions have no end."""

MORE_THAN_A_REPLY = (
    "num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states", "n", "best_of",
)  # fmt: skip
"""Arguments, of ``generate`` or of other chats, for results that a chat does not return."""

UNFINISHED = "\ufffd"
"""The decoded text of a character whose bytes are not complete yet."""


def most_tokens(trained: int) -> int:
    """The limit of a conversation's tokens for a model that was trained on so many."""
    return max(trained, MOST_TOKENS)


class FiniteScores(LogitsProcessor):
    """Raises `FloatingPointError` for scores that are not finite; the published code chose token 5 instead."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise FloatingPointError(
                "the model gave scores that are not finite: its weights are damaged, or float16 overflows; try bfloat16"
            )
        return scores


class TokenQueue(BaseStreamer, StoppingCriteria):
    """A queue of tokens from the thread that generates them to the one that reads them, which may stop the former."""

    def __init__(self) -> None:
        self.tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.is_cancelled = False
        self.has_prompt = False  # transformers passes the prompt first

    def put(self, value: Tensor) -> None:
        if self.has_prompt:
            for token in value.flatten().tolist():
                self.tokens.put(token)
        self.has_prompt = True

    def end(self) -> None:
        """Does nothing: the thread itself puts the end of the queue, also after an error."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.is_cancelled, device=input_ids.device, dtype=torch.bool)


PROMPT_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "layout", "sequence_ids")


def _refuse_prompts(arguments: Mapping[str, Any]) -> None:
    """Raises `GmaskError` for arguments of ``generate`` that would be a prompt beside that of a chat."""
    for name in PROMPT_ARGUMENTS:
        if arguments.get(name) is not None:
            raise GmaskError(f"a chat makes the prompt of query and history: leave out {name}, or use generate")


class ChatMixin(GenerationMixin):
    """``chat``, ``stream_chat`` and ``stream_generate`` for models with the prompt format of ChatGLM-6B."""

    _warned_of_length = False

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[Round]]:
        """Returns the reply, and the history with it.

        Args:
            query: the question; special tokens in it are plain text.
            history: earlier rounds, (asked, answered), or messages; see `gmask.conversation.read_conversation`. The
                returned history has rounds.
            max_length: tokens of prompt and reply together.
            temperature: 0 takes the most probable token at every step.
            **kwargs: as for transformers' ``generate``, such as ``top_k``, ``repetition_penalty``, ``stop_strings``.

        Warns:
            UserWarning: once for a model, if prompt and reply may be longer than the model was trained on.

        Raises:
            GmaskError: the prompt leaves no room for a reply; not a valid history; an argument that asks for more than
                one reply.
            FloatingPointError: scores that are not finite.
        """
        _refuse_prompts(kwargs)
        settings = self._chat_settings(max_length, num_beams, do_sample, top_p, temperature, logits_processor, kwargs)
        conversation = read_conversation(history, query)
        inputs = self._chat_inputs(tokenizer, conversation, settings)
        output = self.generate(**inputs, **settings)
        reply = self._read_reply(tokenizer, output[0, inputs["input_ids"].shape[1] :].tolist())
        return reply, [*conversation.rounds, (conversation.require_query(), reply)]

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[Round]]]:
        """Yields the reply so far, and the history with it, after every token that completes a character.

        The last reply is that of `chat`. Arguments, warning and errors are those of `chat`, without beams. Closing the
        iterator stops the model.
        """
        _refuse_prompts(kwargs)
        settings = self._chat_settings(max_length, 1, do_sample, top_p, temperature, logits_processor, kwargs)
        conversation = read_conversation(history, query)
        rounds, asked = conversation.rounds, conversation.require_query()
        inputs = self._chat_inputs(tokenizer, conversation, settings)
        length, shown, reply = inputs["input_ids"].shape[1], None, ""
        for ids in self.stream_generate(**inputs, **settings):
            reply = self._read_reply(tokenizer, ids[0, length:].tolist())
            if reply != shown and not reply.endswith(UNFINISHED):
                shown = reply
                yield reply, [*rounds, (asked, reply)]
        if reply != shown:  # bytes that never became a character
            yield reply, [*rounds, (asked, reply)]

    def stream_generate(self, input_ids: Tensor, **kwargs: Any) -> Iterator[Tensor]:
        """Yields the ids ``[1, S + n]`` after each new token n; arguments as for ``generate``.

        The published method leaves out the last token.
        """
        if len(input_ids) != 1:
            raise ValueError(f"stream_generate answers one prompt, not {len(input_ids)}")
        self._refuse_more_than_a_reply(kwargs)
        if kwargs.pop("streamer", None) is not None:
            raise GmaskError("stream_chat and stream_generate are streams themselves: leave out streamer, or use chat")
        if kwargs.get("num_beams", 1) > 1:
            raise GmaskError("beams may change every token to the last one, so they cannot be streamed: use chat")
        tokens = TokenQueue()
        stopping = StoppingCriteriaList([*kwargs.pop("stopping_criteria", []), tokens])

        def run() -> None:
            try:
                with torch.inference_mode():
                    self.generate(input_ids=input_ids, streamer=tokens, stopping_criteria=stopping, **kwargs)
            except BaseException as error:  # raised by the reading thread
                tokens.tokens.put(error)
            tokens.tokens.put(None)

        worker = threading.Thread(target=run, name="stream_generate", daemon=True)
        worker.start()
        try:
            while (token := tokens.tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                input_ids = torch.cat((input_ids, input_ids.new_tensor([[token]])), dim=-1)
                yield input_ids
        finally:
            tokens.is_cancelled = True
            worker.join()

    def encode_chat(
        self, tokenizer: PreTrainedTokenizerBase, query: str, history: History, *, max_length: int | None
    ) -> dict[str, Tensor]:
        """Returns ``input_ids`` and ``attention_mask`` ``[1, S]`` of a conversation.

        Raises:
            GmaskError: it leaves no room within ``max_length``; the tokenizer is not that of the model.
        """
        return self._encode(tokenizer, read_conversation(history, query), max_length=max_length)

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, max_length: int | None
    ) -> dict[str, Tensor]:
        if tokenizer.bos_token_id != self.config.bos_token_id:
            raise GmaskError(
                f"<sop> is {tokenizer.bos_token_id} to the tokenizer, but {self.config.bos_token_id} to the model: "
                "they are of two revisions; take all files from one"
            )
        prompt = build_prompt(conversation.require_query(), conversation.rounds)
        most = most_tokens(self.config.max_position_embeddings)
        most = most if max_length is None else min(most, max_length)
        check_characters(prompt, most, tokenizer, name="the conversation")
        encoded = tokenizer(prompt, return_tensors="pt", split_special_tokens=True)
        length = encoded["input_ids"].shape[1]
        if max_length is not None and length >= max_length:
            raise GmaskError(
                f"the conversation has {length} tokens, max_length {max_length} leaves no room for a reply: "
                "shorten the history, or raise max_length"
            )
        return {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _chat_inputs(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the inputs of ``generate``; warns if prompt and reply may be longer than the model was trained on."""
        inputs: dict[str, Any] = self._encode(tokenizer, conversation, max_length=settings.get("max_length"))
        length, trained = inputs["input_ids"].shape[1], self.config.max_position_embeddings
        longest = settings.get("max_length") or length + settings.get("max_new_tokens", 0)
        if longest > trained and not self._warned_of_length:
            self._warned_of_length = True
            warnings.warn(
                f"the prompt has {length} tokens and may grow to {longest} with the reply, but the model was trained "
                f"on at most {trained}: replies get worse beyond them",
                stacklevel=3,
            )
        return inputs | ({"tokenizer": tokenizer} if "stop_strings" in settings else {})

    def _chat_settings(
        self,
        max_length: int,
        num_beams: int,
        do_sample: bool,
        top_p: float,
        temperature: float,
        logits_processor: LogitsProcessorList | None,
        others: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns the settings of ``generate``; those of sampling are left out if nothing is drawn."""
        self._refuse_more_than_a_reply(others)
        others = {name: value for name, value in others.items() if value is not None or name not in MORE_THAN_A_REPLY}
        do_sample = do_sample and temperature != 0
        settings = {"num_beams": num_beams, "do_sample": do_sample, **others}
        if "max_new_tokens" not in others:
            settings["max_length"] = max_length
        if do_sample:
            settings = {"top_k": TOP_K, **settings, "top_p": top_p, "temperature": temperature}
        settings["logits_processor"] = LogitsProcessorList(logits_processor or [])
        settings.setdefault("pad_token_id", self.config.pad_token_id)
        settings.setdefault("eos_token_id", self.config.eos_token_id)
        return settings

    def _refuse_more_than_a_reply(self, arguments: dict[str, Any]) -> None:
        """Raises `GmaskError` for arguments of ``generate`` whose results a chat would drop."""
        config = arguments.get("generation_config") or self.generation_config
        for name in MORE_THAN_A_REPLY:
            value = arguments.get(name, getattr(config, name, None))
            if value and not (name == "num_return_sequences" and value == 1):
                raise GmaskError(f"a chat returns one reply and no more: leave out {name}={value}, or use generate")

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Puts `FiniteScores` before the processors of transformers, some of which set scores to -inf.

        An assistant gets the processors of the model that it assists, with theirs among them.
        """
        others = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList([FiniteScores(), *(one for one in others if not isinstance(one, FiniteScores))])

    def _read_reply(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
        return clean_reply(str(tokenizer.decode(ids, skip_special_tokens=True)))
