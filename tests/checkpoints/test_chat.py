"""Chat templates: equal to transformers on sound ones, bounded on hostile ones."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.chat import render
from gossamer.checkpoints.gguf import GGUFFile
from gossamer.errors import CheckpointError, UsageError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is <b>&amp;</b>?\n"},
    {"role": "assistant", "content": "An ampersand: é, 漢, 🙂."},
    {"role": "user", "content": "Thanks"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]

# The constructs that the templates of published models are made of, one or two in each.
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{{ bos_token }}\n{%- for m in messages %}\n    {%- if loop.first and m.role == 'system' %}\n"
    "[{{ m.content | trim }}]\n    {%- elif loop.last %}\n{{ loop.index0 }}/{{ loop.length }}{{ m.content }}\n"
    "    {%- else %}\n{{ m['content'].strip() ~ eos_token }}\n    {%- endif %}\n{%- endfor %}\n",
    "namespace": "{% set ns = namespace(user=0, text='') %}{% for m in messages[::-1] %}"
    "{% set ns.user = ns.user + (1 if m.role == 'user' else 0) %}{% set ns.text = ns.text ~ m.role[0] %}"
    "{% set index = (messages|length - 1) - loop.index0 %}{{ index }}{% endfor %}{{ ns.user }}{{ ns.text }}",
    "tools": "{% if tools is not none and tools %}{% for tool in tools %}{{ tool | tojson }}\n"
    "{{ tool.function | tojson(indent=4) }}{% endfor %}{% endif %}{{ messages | tojson(ensure_ascii=True) }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user')"
    " | list | length }}{{ messages[0].content | upper | replace('BRIEF', 'short') }}{{ [3, 1, 2] | sort | last }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ 'x' | default('y') }}{{ nothing | default('y') }}{{ 3.7 | int }}"
    "{{ 'a\nb' | indent(2) }}{{ '%s=%d' | format('a', 3) }}{{ messages | first | string }}{{ [1, 2] | sum }}",
    "methods": "{{ messages[0].content.split(' ') | list }}{{ 'a-b'.replace('-', '+') }}{{ messages[0].get('x', 1) }}"
    "{{ '{} {n}'.format('q', n=2) }}{{ ', '.join(['a', 'b']) }}{{ messages[0].items() | list }}"
    "{{ 'ab'.startswith('a') }}{{ '%s-%s' % ('a', 1) }}{{ 2 ** 3 * 2 }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ dict(a=1) }}",
    "macros": "{% macro show(m, sep=': ') %}{{ m.role }}{{ sep }}{{ m.content }}{% endmacro %}"
    "{% for m in messages if m.role != 'system' %}{{ show(m) }}{{ show(m, sep='|') }}{% endfor %}"
    "{% set block %}in a {{ messages[0].role }} block{% endset %}{{ block }}",
    "controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}{% for i in range(3) %}{{ i }}{% else %}none{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "extra": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{{ none_such }}",
}


def oracle(template: str, **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(conversations=[CHAT], chat_template=template, **variables)
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_agrees_with_transformers(name: str, prompt: bool) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": TOOLS, "enable_thinking": False}
    expected = oracle(TEMPLATES[name], add_generation_prompt=prompt, **variables)
    assert render(TEMPLATES[name], CHAT, add_generation_prompt=prompt, **variables) == expected
    assert expected


def test_smollm2_agrees_with_transformers(smollm2_gguf: Path) -> None:
    from transformers import AutoTokenizer

    with GGUFFile(smollm2_gguf) as file:
        template = file.metadata["tokenizer.chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for messages in (CHAT, CHAT[1:], CHAT[1:2]):
        for prompt in (True, False):
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert render(template, messages, add_generation_prompt=prompt) == expected
    assert "You are a helpful AI assistant named SmolLM" in render(template, CHAT[1:])


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}", CHAT) in (str(y) for y in range(2024, 2200))


def test_long_conversation() -> None:
    chat = [{"role": "user", "content": "word " * 200}] * 2000
    assert len(render(TEMPLATES["namespace"], chat)) > 2000
    assert len(render(TEMPLATES["chatml"], chat)) > 2_000_000


# Errors.


def message_of(template: str, chat: list[dict[str, Any]] = CHAT) -> str:
    with pytest.raises(CheckpointError) as caught:
        render(template, chat)
    text = str(caught.value)
    assert text.startswith("the chat template ")
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_no_template() -> None:
    with pytest.raises(UsageError, match=r"no chat template.*--raw"):
        render(None, CHAT)


def test_template_refuses() -> None:
    text = message_of("{{ raise_exception('Roles must alternate\n user/assistant.') }}")
    assert "refuses this conversation: Roles must alternate user/assistant; change the messages" in text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if x %}", "line 1"),
        ("a\n{{ 1 + }}", "line 2"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ x | no_filter }}", "no_filter"),
        ("{% include 'other' %}", "loader"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion"),
        ("x" * (1 << 21), "longer than 1048576"),
    ],
)
def test_damaged_template(template: str, reason: str) -> None:
    assert reason in message_of(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(x=1) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ render.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__x=1) }}",
        "{{ ''.format.__self__.x }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ dict.__subclasses__() }}",
        "{{ strftime_now.__wrapped__ }}{{ strftime_now.__code__.co_code }}",
    ],
)
def test_sandbox(template: str) -> None:
    before = [dict(m) for m in CHAT]
    message_of(template)
    assert before == CHAT


GROW = "{% set ns = namespace(s=START) %}{% for i in range(80) %}{% set ns.s = NEXT %}{% endfor %}{{ ns.s FILTER }}"


def grow(start: str, following: str, filtered: str = "") -> str:
    return GROW.replace("START", start).replace("NEXT", following).replace("FILTER", filtered)


BIG = "('a' * 1000000)"
RUNAWAY = [
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% for i in range(10 ** 30) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    f"{{% for i in {BIG} %}}{{% for j in {BIG} %}}{{% endfor %}}{{% endfor %}}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(99999) %}" + "a" * 1000 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "a" * 1000 + "{% endfor %}{% endset %}{{ x | length }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ 10 ** 9999 }}",
    "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    grow("'aa'", "ns.s ~ ns.s"),
    grow("'aa'", "ns.s + ns.s"),
    grow("'aa'", "[ns.s, ns.s] | join"),
    grow("'aa'", "ns.s.replace('a', 'aa')"),
    grow("'aa'", "ns.s | replace('a', 'aa')"),
    grow("'aa'", "'%s%s' % (ns.s, ns.s)"),
    grow("'aa'", "'{0}{0}'.format(ns.s)"),
    grow("['a']", "[ns.s, ns.s]"),
    grow("['a']", "[ns.s, ns.s]", "| tojson"),
    grow("['a']", "[ns.s, ns.s]", "| string | length"),
    grow("{}", "{'a': ns.s, 'b': ns.s}", "~ 'x'"),
    grow("[]", "[[], ns.s, ns.s]"),
    "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a' | indent(10 ** 9) }}",
    "{{ ('\\n' * 1000000) | indent(99999) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "{{ '%1000000000d' | format(1) }}",
    f"{{{{ {BIG}.replace('', {BIG}) }}}}",
    f"{{{{ {BIG} | replace('', {BIG}) }}}}",
    f"{{{{ ([{BIG}] * 1000) | join }}}}",
    f"{{{{ {BIG}.join([{BIG}] * 2 + ['a'] * 1000) }}}}",
    f"{{{{ ('%(a)s' * 1000) % {{'a': {BIG}}} }}}}",
    f"{{{{ ('{{0}}' * 1000).format({BIG}) }}}}",
    "{{ messages | tojson(indent=10 ** 6) }}",
    "{{ lipsum(n=100000) }}",
    "{% for i in range(2) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ range(99999) | list | slice(10 ** 9) | list }}",
    "{{ [] | batch(10 ** 9, 'x') | list }}",
    "{{ strftime_now('%99999999d') }}",
]


@pytest.mark.parametrize("template", RUNAWAY)
def test_runaway(template: str) -> None:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message_of(template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB
    assert time.monotonic() - start < 20  # on a loaded machine; one or two otherwise


@pytest.mark.parametrize(
    "chat", [[{"role": "user", "content": object()}], [{"role": "user", "content": b"x"}], [{"content": {1, 2}}]]
)
def test_messages_are_plain_data(chat: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="'messages' holds a "):
        render(TEMPLATES["chatml"], chat)


FRAGMENTS = ["{{", "}}", "{%", "%}", "for m in messages", "endfor", "if", "endif", "m.content", "|", "'", "*", "~"]
FRAGMENTS += [" set x = ", "range(99)", "(", ")", "9", "**", "|join", "\n"]


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=12))
def test_any_template(parts: list[str]) -> None:
    message = ""
    try:
        render("".join(parts), CHAT)
    except CheckpointError as err:  # anything else that escapes fails the test
        message = str(err)
    assert "\n" not in message
