"""How conversations are written for a decoder: its control tokens, its chat template, and the token that ends a turn.

Model and processor both ask here, so they agree. This file travels to the Hub with every checkpoint, so it imports only
transformers and its sibling.
"""

import os
import re

from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from .configuration_prefix_vlm import IMAGE_TOKEN, TURN_END_TOKEN, TURN_START_TOKEN

CHAT_TEMPLATES = ("chatml", "own")

# ChatML, with the image before the first turn as the paper's sequence has it: <im>*P INST1 ans1 INST2 ans2 (section III-D).
# Those that open the first user turn move to the front; all others stay in place.
# message['role'], not message.role: attribute access is slow in Jinja's sandbox.
CHATML = """\
{%- if bos_token and bos_token != 'TURN_START' %}{{ bos_token }}{% endif -%}
{%- set front = namespace(message=-1, images=0, is_over=false) -%}
{%- for message in messages -%}
  {%- if front.message < 0 and message['content'] is not string -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ('image', 'image_url') and message['role'] == 'user' and not front.is_over -%}
        {%- set front.images = front.images + 1 -%}
      {%- elif part['type'] in ('image', 'image_url') or message['role'] == 'user' -%}
        {%- set front.is_over = true -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if front.message < 0 and message['role'] == 'user' %}{% set front.message = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for _ in range(front.images) %}{{ 'IMAGE_TOKEN' }}{% endfor -%}
{%- for message in messages -%}
  {%- set skip = namespace(images=front.images if loop.index0 == front.message else 0) -%}
  {%- set body -%}
    {%- if message['content'] is string -%}
      {{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] in ('image', 'image_url') -%}
          {%- if skip.images %}{% set skip.images = skip.images - 1 %}{% else %}{{ 'IMAGE_TOKEN' }}{% endif -%}
        {%- elif part['type'] == 'text' -%}
          {{- part['text'] -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {{- 'TURN_START' + message['role'] + '\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- body + 'TURN_END' -}}{%- endgeneration -%}
  {%- else -%}
    {{- body + 'TURN_END' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'TURN_STARTassistant\\n' }}{% endif -%}
"""
# in front of a decoder's own template, which reads texts: each message's parts become one, image tokens where images stand
FLATTENING = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set flat.text = message['content'] -%}
  {%- else -%}
    {%- set flat.text = '' -%}
    {%- for part in message['content'] -%}
      {%- set flat.text = flat.text + ('IMAGE_TOKEN' if part['type'] in ('image', 'image_url') else part['text']) -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
# a conversation of which only the frame matters
PROBE = "\ufdd1answer\ufdd1"
QUESTION = {"role": "user", "content": "question"}


def chat_template_of(tokenizer, choice: str | None = None, image_token: str = IMAGE_TOKEN) -> str:
    """The Jinja chat template for a tokenizer that writes images as `image_token`.

    Args:
        choice: `chatml`; `own`, the tokenizer's; a template; or `None`: its own, unless it has none or frames turns by
            `<|im_start|>`, as Qwen's and SmolLM's do, which ChatML does as well, with the image in front.

    Raises:
        ValueError: for an unknown choice, or if the tokenizer has no template of its own.
    """
    if choice is not None and "{" in choice:
        return choice
    if choice not in (None, *CHAT_TEMPLATES):
        raise ValueError(f"chat_template is {choice!r}; choose chatml or own, or give a Jinja template.")
    own = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if choice == "own" and own is None:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template of its own; choose chatml.")
    flattening = _with_tokens(FLATTENING, image_token)
    if choice == "chatml" or own is None or (choice is None and TURN_START_TOKEN in own and flattening not in own):
        return _with_tokens(CHATML, image_token)
    return own if flattening in own else flattening + own


def _with_tokens(template: str, image_token: str) -> str:
    names = {"IMAGE_TOKEN": image_token, "TURN_START": TURN_START_TOKEN, "TURN_END": TURN_END_TOKEN}
    return re.sub("|".join(names), lambda name: names[name[0]], template)


def load_tokenizer(text: str, chat_template: str | None = None, **hub):
    """A decoder's tokenizer, prepared for conversations with images; `None` for a folder of weights alone.

    Args:
        text: Hub id or folder.
        chat_template: as in `prepare`.
        hub: arguments of transformers for the Hub.
    """
    if os.path.isdir(text) and not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in os.listdir(text)):
        return None
    return prepare(AutoTokenizer.from_pretrained(text, **hub), chat_template)


def prepare(tokenizer, chat_template: str | None = None):
    """Gives a tokenizer its chat template and the control tokens that this needs, and returns it.

    It pads on the left, as batched generation needs (training collators choose their own side).

    Args:
        chat_template: `chatml`, `own` or a template; see `chat_template_of`.
    """
    tokenizer.chat_template = chat_template_of(tokenizer, chat_template)
    turn_tokens = [token for token in (TURN_START_TOKEN, TURN_END_TOKEN) if token in tokenizer.chat_template]
    tokenizer.add_tokens([IMAGE_TOKEN, *turn_tokens], special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def turn_end_id(tokenizer) -> int | None:
    """The token that a tokenizer's chat template, by default ChatML, writes after an answer; `None` if that is text."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else _with_tokens(CHATML, IMAGE_TOKEN)
    text = _rendered(tokenizer, [QUESTION, {"role": "assistant", "content": PROBE}], template)
    rest = text.partition(PROBE)[2].lstrip()
    known = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return known.get(max((token for token in known if rest.startswith(token)), key=len, default=""))


def blanks_before_answers(tokenizer, chat_template: str) -> str:
    """What a model has to write before an answer, since the template writes it there, but not where it asks for one."""
    prompt = _rendered(tokenizer, [QUESTION], chat_template, add_generation_prompt=True)
    answered = _rendered(tokenizer, [QUESTION, {"role": "assistant", "content": PROBE}], chat_template)
    between = answered.partition(PROBE)[0].removeprefix(prompt)
    return between if not between.strip() else ""


def _rendered(tokenizer, messages: list[dict], chat_template: str, **kwargs) -> str:
    texts, _ = render_jinja_template([messages], chat_template=chat_template, **tokenizer.special_tokens_map, **kwargs)
    return texts[0]
