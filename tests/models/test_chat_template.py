"""Chat templates: Hugging Face's dialect, and no way out of the sandbox or its budget."""

from __future__ import annotations

import json
import resource
import time
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import pytest

from models.chat_sandbox import ChatTemplateError
from models.chat_template import MAX_OUTPUT_CHARACTERS, MAX_SOURCE_CHARACTERS, ChatTemplate

GOLDENS = Path(__file__).parent.parent / "goldens" / "tokenizer"
NOW = datetime(2024, 7, 26, tzinfo=UTC)
MESSAGES = [{"role": "user", "content": "Hi"}]

DOUBLING = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}"

GADGETS = {
    "attribute chain from a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute chain by subscript": "{{ ''['__class__']['__mro__'] }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "map by attribute": "{{ messages|map(attribute='__class__')|map(attribute='__mro__')|list }}",
    "join by attribute": "{{ messages|join(attribute='__class__.__base__.__subclasses__') }}",
    "str.format attribute access": "{{ '{0.__class__.__base__}'.format(messages) }}",
    "str.format field width": "{{ '{:>1000000000}'.format(1) }}",
    "str.format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "format taken through a variable": "{% set f = '{:>999999999}'.format %}{{ f(1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "percent formatting": "{{ '%1000000000d' % 1 }}",
    "cycler global": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner global": "{{ joiner.__init__.__globals__ }}",
    "namespace global": "{{ namespace.__init__.__globals__ }}",
    "lipsum global": "{{ lipsum(n=100000000) }}",
    "range function's globals": "{{ range.__globals__ }}",
    "raise_exception's globals": "{{ raise_exception.__globals__ }}",
    "clock's inside": "{{ strftime_now._now.__class__ }}",
    "own template through self": "{{ self._TemplateReference__context.environment }}",
    "environment of a macro": "{% macro m() %}{% endmacro %}{{ m._environment.filters }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "huge range": "{% for i in range(100000000) %}{% endfor %}",
    "nested ranges": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "recursive loop": (
        "{% for x in [[1, 2]] recursive %}{{ loop([[1, 2]]) }}{{ loop([[1, 2]]) }}{% endfor %}"
    ),
    "string multiplication": "{{ 'x' * 1000000000 }}",
    "reversed multiplication": "{{ 1000000000 * 'x' }}",
    "list multiplication": "{{ ([1] * 1000000000)|length }}",
    "power tower": "{{ 9 ** 9 ** 9 }}",
    "squaring": (
        "{% set ns = namespace(s=9) %}{% for i in range(60) %}{% set ns.s = ns.s * ns.s %}"
        "{% endfor %}"
    ),
    "doubling by ~": DOUBLING + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by +": DOUBLING + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by join": DOUBLING + "{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
    "doubling by str.join": DOUBLING + "{% set ns.s = ns.s.join(['', '', '']) %}{% endfor %}",
    "growing by replace": DOUBLING + "{% set ns.s = ns.s|replace('x', 'xx') %}{% endfor %}",
    "growing by str.replace": DOUBLING + "{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
    "growing by count": DOUBLING + "{% set ns.s = ns.s.replace('x', 'xx', -1) %}{% endfor %}",
    "doubling by a block": DOUBLING + "{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = b %}{% endfor %}",
    "literal text in a block": "{% set b %}{% for i in range(9999) %}"
    + "y" * 10_000
    + "{% endfor %}{% endset %}",
    "nest of shared lists, printed": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}"
        "{% endfor %}{{ ns.s }}"
    ),
    "nest of shared lists, as JSON": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}"
        "{% endfor %}{{ ns.s|tojson }}"
    ),
    "hoarded slices": (
        "{% set big = 'x' * 4000000 %}{% set ns = namespace(s=[]) %}{% for i in range(9999) %}"
        "{% set ns.s = [ns.s, big[1:]] %}{% endfor %}"
    ),
    "hoarded copies": (
        "{% set big = 'x' * 4000000 %}{% set ns = namespace(s=[]) %}{% for i in range(9999) %}"
        "{% set ns.s = [ns.s, big|upper] %}{% endfor %}"
    ),
    "sum of lists": "{% set a = [1] * 1000000 %}{{ ([a] * 100000)|sum(start=[])|length }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "center filter": "{{ 'x'|center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ 'x\ny'|indent(1000000000) }}",
    "tojson indent": "{{ [1]|tojson(indent=1000000000) }}",
    "tojson separators": "{{ [1, 2]|tojson(separators=['x' * 1000000, ':']) }}",
    "macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching macro": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{{ m(100) }}"
    ),
    "writing into the messages": "{{ messages.append(1) }}",
    "writing into a message": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "strftime width": "{{ strftime_now('%999999999d') }}",
    "endless output": "{% for i in range(9999) %}{{ 'x' * 3000 }}{% endfor %}",
}


@pytest.mark.parametrize("source", GADGETS.values(), ids=GADGETS.keys())
def test_gadget_gives_a_clean_error(source: str) -> None:
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start_s = time.process_time()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(MESSAGES, now=NOW)
    assert time.process_time() - start_s < 5
    after_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert after_bytes - before_bytes < 200 << 20


def test_gadgets_work_without_the_sandbox() -> None:
    """The attack is real: an ordinary environment hands out Python's classes."""
    source = GADGETS["attribute chain from a string"]
    assert "<class" in jinja2.Environment().from_string(source).render()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content }}", "Hi"),
        ("{{ messages[0]['content'][1:] ~ 1 ~ none }}", "i1None"),
        ("{{ messages[::-1]|length }}", "1"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for m in messages %}{{ loop.last }}{{ loop.length }}{% endfor %}", "True1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for x in nothing %}{{ x }}{% else %}none{% endfor %}", "none"),
        (
            "{% for x in [[1], []] recursive %}<{{ loop(x) if x is iterable }}>{% endfor %}",
            "<<>><>",
        ),
        ("{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m('b') }}", "[b]"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 7 %}{{ ns.n * 6 % 5 + 2 ** 3 }}", "10"),
        ("{{ {'a<': 'é'}|tojson }}", '{"a<": "é"}'),
        ("{{ [1]|tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ ['a', 'b']|join(', ') }}{{ '-'.join(['c', 'd']) }}", "a, bc-d"),
        ("{{ ' a '|trim ~ 'b'.upper() ~ 'xay'|replace('a', '') }}", "aBxy"),
        ("{{ 'a\nb'|indent(2) }}", "a\n  b"),
        (
            "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}",
            "['Hi']",
        ),
        ("{{ [3, 1]|sort|first }}{{ 'x'|default('y') }}{{ nope|default('y') }}", "1xy"),
        ("{{ 'a<b'|safe }}{{ [1, 2]|string }}", "a<b[1, 2]"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ bos_token }}{{ eos_token }}{{ tools is none }}", "<s></s>True"),
        ("{{ 'a,b'.split(',')[1] }}{{ 'abc'.startswith('a') }}{{ 'a' in 'abc' }}", "bTrueTrue"),
        ("{{ ' x'.lstrip() + 'y'.rstrip('y') }}", "x"),
    ],
)
def test_dialect(source: str, expected: str) -> None:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.render(MESSAGES, now=NOW) == expected


def test_no_clock_unless_given() -> None:
    source = "{{ strftime_now is defined }}"
    assert ChatTemplate(source).render(MESSAGES) == "False"


def test_template_refuses_with_its_own_words() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(MESSAGES)


def test_messages_are_not_changed_and_budget_is_fresh_each_time() -> None:
    template = ChatTemplate("{% for i in range(9999) %}{{ 'x' * 100 }}{% endfor %}")
    for _ in range(15):  # each draws 3 million of the 33 million
        assert len(template.render(MESSAGES)) == 999_900
    assert MESSAGES == [{"role": "user", "content": "Hi"}]


def test_long_conversation_fits_the_budget() -> None:
    source = json.loads((GOLDENS / "smollm2_chat.json").read_text())["template"]
    messages = [{"role": "user", "content": "word " * 100}] * 2000
    assert len(ChatTemplate(source).render(messages)) > 1_000_000


def test_limits_on_size() -> None:
    with pytest.raises(ChatTemplateError, match="limit"):
        ChatTemplate("x" * (MAX_SOURCE_CHARACTERS + 1))
    content = [{"role": "user", "content": "x" * (MAX_OUTPUT_CHARACTERS + 1)}]
    with pytest.raises(ChatTemplateError, match="output passes"):
        ChatTemplate("{{ messages[0].content }}").render(content)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x|nofilter }}", "{% nonsense %}", "{{ 'a"])
def test_malformed_template(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTemplate(source)


def test_smollm2_template_renders_as_the_reference() -> None:
    golden = json.loads((GOLDENS / "smollm2_chat.json").read_text())
    template = ChatTemplate(golden["template"], bos_token="<|im_start|>", eos_token="<|im_end|>")
    assert len(golden["cases"]) >= 5
    for case in golden["cases"]:
        rendered = template.render(
            case["messages"], add_generation_prompt=case["add_generation_prompt"]
        )
        assert rendered == case["text"]
