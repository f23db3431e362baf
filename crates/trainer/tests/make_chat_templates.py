#!/usr/bin/env python3
"""Makes chat_templates.json: what Transformers makes of conversations.

    python crates/trainer/tests/make_chat_templates.py

For each template and conversation: the text of apply_chat_template, with and without the prompt for
an answer, and the assistant's tokens. Transformers tells these only where the template has
{% generation %}; the same template without these tags must lead to the same tokens here. The
templates are in the style of well-known ones, written for this test; SmolLM2's own comes from
gguf_tokenizer.json. Made for transformers 5.23.0.
"""

import json
import pathlib

import transformers
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
TEXT_FIXTURE = HERE / "../../../tests/fixtures/tiny_text"

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    # White space is trimmed, the text begins with BOS, the end of a turn is no line.
    "llama3": """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- if system or tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system }}
    {%- if tools is not none %}
        {{- 'Tools:\\n\\n' }}
        {%- for t in tools %}
            {{- t | tojson(indent=4) }}
            {{- '\\n\\n' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    # No generation prompt, the system message within the first question, roles that alternate.
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {%- generation %}
        {{- " " + message["content"] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
""",
    # The assistant has another name, and there is no system.
    "gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' }}
{%- if role == 'model' %}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
""",
    # The last answer shows that nothing was thought, earlier ones do not; tools as lines of JSON.
    "qwen3": """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {%- if loop.index0 > ns.last_query %}
            {{- '<think>\\n\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
}

QUESTION = {"role": "user", "content": "What is a tree?"}
ANSWER = {"role": "assistant", "content": "A tall plant."}
SYSTEM = {"role": "system", "content": "You know trees."}
TOOL = {"type": "function", "function": {
    "name": "height", "description": "How tall a <tree> is, in metres; naïve.",
    "parameters": {"type": "object", "properties": {"tree": {"type": "string"}},
                   "required": ["tree"]}}}
CONVERSATIONS = {
    "one turn": ([QUESTION, ANSWER], []),
    "system": ([SYSTEM, QUESTION, ANSWER], []),
    "two turns": ([QUESTION, ANSWER, {"role": "user", "content": "And a leaf?"},
                   {"role": "assistant", "content": "It hangs on the tree.\nMostly."}], []),
    "white space": ([{"role": "user", "content": " Hi \n"},
                     {"role": "assistant", "content": "  Yes? \n"}], []),
    "the same words": ([{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"},
                        {"role": "user", "content": "yes"},
                        {"role": "assistant", "content": "yes"}], []),
    "question last": ([QUESTION, ANSWER, QUESTION], []),
    "tools": ([QUESTION, ANSWER], [TOOL]),
}


def apply(tokenizer, template, messages, tools, **options):
    return tokenizer.apply_chat_template(
        messages, tools=tools or None, chat_template=template, **options)


def case(tokenizer, name, template, conversation):
    messages, tools = CONVERSATIONS[conversation]
    found = dict(template=name, conversation=conversation, messages=messages, tools=tools)
    try:
        found["text"] = apply(tokenizer, template, messages, tools, tokenize=False)
        found["before_answer"] = apply(
            tokenizer, template, messages, tools, tokenize=False, add_generation_prompt=True)
    except TemplateError as refused:
        return dict(found, refused=str(refused))
    marked = "endgeneration" in template
    tokens = apply(tokenizer, template, messages, tools, tokenize=True, return_dict=True,
                   return_assistant_tokens_mask=marked)
    found["ids"] = tokens["input_ids"]
    if "assistant_masks" in tokens:
        found["from_assistant"] = tokens["assistant_masks"]
    return found


def main():
    tokenizer = AutoTokenizer.from_pretrained(TEXT_FIXTURE)
    templates = dict(TEMPLATES)
    templates["smollm2"] = json.loads(
        (HERE / "gguf_tokenizer.json").read_text(encoding="utf-8"))["chat_template"]
    cases = [case(tokenizer, name, template, conversation)
             for name, template in templates.items() for conversation in CONVERSATIONS]
    out = dict(transformers=transformers.__version__, bos_token=tokenizer.bos_token,
               eos_token=tokenizer.eos_token, templates=templates, cases=cases)
    text = json.dumps(out, indent=1, ensure_ascii=False)
    (HERE / "chat_templates.json").write_text(text + "\n", encoding="utf-8")
    print(len(cases), "cases,", sum("refused" in c for c in cases), "refused")


if __name__ == "__main__":
    main()
