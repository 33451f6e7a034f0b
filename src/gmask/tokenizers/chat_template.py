"""Chat templates: the prompts of `gmask chat` as transformers' Jinja templates, for TRL and other trainers.

A template gives the ids of `gmask.generation.encoding`. It folds messages as `gmask.conversation` does, asks the last
question before ``[gMASK] <sop>``, and puts the last reply behind them. Control words in a message would become control
tokens, so that a template refuses them; gmask's own readers encode them as text.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from gmask.conversation import SPEAKERS
from gmask.tokenizers.chatglm import ChatGLMTokenizer
from gmask.tokenizers.glm_build_inputs import BlankFilling

FOLD = """\
{%- set speakers = @SPEAKERS@ -%}
{%- set control_words = @CONTROL_WORDS@ -%}
{%- if tools -%}{{ raise_exception("this model was not trained to call tools") }}{%- endif -%}
{%- set said = namespace(turns=[], system=[], text="") -%}
{%- for message in messages -%}
  {%- set role = speakers[message["role"]] -%}
  {%- if not role -%}
    {{- raise_exception("the role " ~ message["role"] ~ " is none of @ROLES@") -}}
  {%- endif -%}
  {%- set said.text = "" -%}
  {%- if message["content"] is string -%}
    {%- set said.text = message["content"] -%}
  {%- elif message["content"] is none or message["content"] is mapping or message["content"] is not iterable -%}
    {{- raise_exception("the content of a message is no text") -}}
  {%- else -%}
    {%- for part in message["content"] -%}
      {%- if part["type"] != "text" -%}{{ raise_exception("these models read text alone") }}{%- endif -%}
      {%- set said.text = said.text ~ part["text"] -%}
    {%- endfor -%}
  {%- endif -%}
  {%- for word in control_words -%}
    {%- if word in said.text -%}
      {{- raise_exception("a message holds the control word " ~ word ~ ", which a template would turn into a token") -}}
    {%- endif -%}
  {%- endfor -%}
  {%- set follows_user = said.turns and said.turns[-1][0] == "user" -%}
  {%- if role == "system" and not follows_user -%}
    {%- set said.system = said.system + [said.text] -%}
  {%- else -%}
    {%- if role == "system" -%}
      {%- set role = "user" -%}
    {%- elif role == "user" and said.system -%}
      {%- set said.text = (said.system + [said.text]) | join("\\n") -%}
      {%- set said.system = [] -%}
    {%- endif -%}
    {%- if said.turns and said.turns[-1][0] == role -%}
      {%- set said.turns = said.turns[:-1] + [[role, said.turns[-1][1] ~ "\\n" ~ said.text]] -%}
    {%- else -%}
      {%- set said.turns = said.turns + [[role, said.text]] -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if said.system -%}{{ raise_exception("the system speaks, and no message of the user follows it") }}{%- endif -%}
{%- if not said.turns -%}{{ raise_exception("the conversation is empty") }}{%- endif -%}
{%- if said.turns[0][0] == "assistant" -%}{%- set said.turns = [["user", ""]] + said.turns -%}{%- endif -%}
{%- set replied = said.turns[-1][0] == "assistant" -%}
{%- set questions = said.turns[::2] -%}
{%- set answers = said.turns[1::2] -%}
{%- set last = questions | length - 1 -%}
"""

GLM_PROMPT = """\
{{- @CLS@ -}}
{%- for index in range(last) -%}
  {{- "问：" ~ questions[index][1] ~ "答：" ~ answers[index][1] -}}
{%- endfor -%}
{{- "问：" ~ questions[last][1] ~ "答：" -}}
"""

CHATGLM_PROMPT = """\
{%- if last == 0 -%}
  {{- questions[0][1] -}}
{%- else -%}
  {%- for index in range(last) -%}
    {{- "[Round " ~ index ~ "]\\n问：" ~ questions[index][1] ~ "\\n答：" ~ answers[index][1] ~ "\\n" -}}
  {%- endfor -%}
  {{- "[Round " ~ last ~ "]\\n问：" ~ questions[last][1] ~ "\\n答：" -}}
{%- endif -%}
"""

ANSWER = """\
{%- if replied -%}
  {{- @BLANK@ ~ @SOP@ ~ (said.turns[-1][1] | trim) ~ @EOP@ -}}
{%- elif add_generation_prompt -%}
  {{- @BLANK@ ~ @SOP@ -}}
{%- endif -%}
"""


def attach_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer of ours the template of its model, unless it has one; ``save_pretrained`` writes it.

    ``[gMASK]`` in a text is plain text to a ChatGLM's published tokenizer. It becomes a special token, with the same
    id, so that the blank of a template is one.
    """
    if (template := chat_template_of(tokenizer)) is None:
        return
    if isinstance(tokenizer, ChatGLMTokenizer):
        tokenizer.register_prompt_tokens()  # a template that the folder holds needs them, too
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the template of a tokenizer's model; None for one that is not of a GLM."""
    if isinstance(tokenizer, ChatGLMTokenizer):
        words = {"BLANK": tokenizer.gmask_token, "SOP": str(tokenizer.bos_token), "EOP": "<eop>"}
        return _fill(FOLD + CHATGLM_PROMPT + ANSWER, tokenizer, words)
    found = _spellings(tokenizer) if isinstance(tokenizer, BlankFilling) else None
    return None if found is None else _fill(FOLD + GLM_PROMPT + ANSWER, tokenizer, found)


def _spellings(tokenizer: Any) -> dict[str, str] | None:
    """The tokens of a GLM's prompt; None if its vocabulary lacks one."""
    roles = {"CLS": "cls_token", "BLANK": "gmask_token", "SOP": "sop_token", "EOP": "eop_token"}
    found = {name: _find_token(tokenizer, role) for name, role in roles.items()}
    found["BLANK"] = found["BLANK"] or _find_token(tokenizer, "mask_token")  # as in training without --task-mask
    spelt = {name: token for name, token in found.items() if token is not None}
    return spelt if len(spelt) == len(roles) else None


def _find_token(tokenizer: Any, role: str) -> str | None:
    try:
        token: str | None = getattr(tokenizer, role, None)
    except NotImplementedError:  # what the published classes raise
        return None
    return token if token in tokenizer.get_added_vocab() else None


def _fill(template: str, tokenizer: PreTrainedTokenizerBase, words: dict[str, str]) -> str:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = sorted({*special, *map(str, tokenizer.all_special_tokens), *words.values()})
    values = {name: json.dumps(word, ensure_ascii=False) for name, word in words.items()}
    values |= {"SPEAKERS": json.dumps(SPEAKERS), "CONTROL_WORDS": json.dumps(control, ensure_ascii=False)}
    for name, value in {**values, "ROLES": ", ".join(SPEAKERS)}.items():
        template = template.replace(f"@{name}@", value)
    return template
