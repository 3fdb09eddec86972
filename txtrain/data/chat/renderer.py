"""A program that renders untrusted Jinja chat templates, with limits on memory and time.

Each line of standard input is a request, each line of standard output its answer, both JSON:

    {"templates": {NAME: TEXT}, "tokens": {"eos_token": ...}}   -> {"ready": true}; first and once
    {"name": NAME, "messages": [...], "tools": ..., "wanted": [[n, prompt], ...]}
        -> {"rendered": [{"text": ..., "spans": [[begin, end], ...]} or {"error": ...}, ...]}

`wanted`: the first n messages, and whether the header of the next assistant turn follows (add_generation_prompt).
`spans`: the text within `{% generation %}`, in characters. The parent reports why the process ended (SIGPROF: out of
time). Templates find the same environment as in `transformers`.
"""

from __future__ import annotations

import codecs
import json
import random
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2.debug  # noqa: F401  (jinja2 imports it at the first error, when no file can be opened any more)
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of address space, Python's included
SECONDS = 5  # of processor time per conversation
LONGEST = 16 << 20  # characters of a text, beside 16 times its conversation's


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: records the span of the text within."""

    tags = {"generation"}

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.written: list[str] = []
        self.spans: list[tuple[int, int]] = []
        self.within: list[str] = []
        environment.extend(generation=self)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        inside = caller()
        begin = sum(map(len, self.written))
        self.spans.append((begin, begin + len(inside)))
        self.within.append(inside)
        return inside


def environment() -> Any:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return made


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class TooLong(Exception):
    """A template writes without end."""


def rendered(template: Any, marks: Generation, longest: int, given: dict[str, Any]) -> dict[str, Any]:
    marks.written, marks.spans, marks.within = [], [], []
    random.seed(0)  # of the filter `random`: a conversation becomes the same text each time
    size = 0
    try:
        for piece in template.generate(**given):
            marks.written.append(piece)
            if (size := size + len(piece)) > longest:
                raise TooLong(f"it writes more than {longest:,} characters for a conversation")
    except (MemoryError, TooLong):
        raise
    except Exception as e:  # a template may raise whatever its filters and methods raise
        return {"error": f"{type(e).__name__}: {e}"[:300]}
    text = "".join(marks.written)
    if any(text[b:e] != inside for (b, e), inside in zip(marks.spans, marks.within, strict=True)):
        return {"error": "{% generation %} must not be within another, a macro, a filter or a `set`, but is"}
    return {"text": text, "spans": marks.spans}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jinja = environment()
    # Should a template find a way out of the sandbox, there is no file, process or connection that it can open. What
    # Python would open later it opens now: the time zone's file, and the module by which jinja2 reads a text's escapes.
    datetime.now()
    codecs.lookup("unicode-escape")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    templates: dict[str, Any] = {}
    tokens: dict[str, str] = {}
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            asked = json.loads(line)
            if not templates:
                tokens = asked["tokens"]
                templates = {name: jinja.from_string(text) for name, text in asked["templates"].items()}
                answer: dict[str, Any] = {"ready": True}
            else:
                fixed = {"tools": asked["tools"], "documents": None, **tokens}
                answer = {
                    "rendered": [
                        rendered(
                            templates[asked["name"]],
                            jinja.generation,
                            LONGEST + 16 * len(line),
                            {"messages": asked["messages"][:n], "add_generation_prompt": prompt, **fixed},
                        )
                        for n, prompt in asked["wanted"]
                    ]
                }
            said = json.dumps(answer).encode() + b"\n"
        except MemoryError:
            said = fatal(f"it needs more than {MEMORY >> 20} MB of memory")
        except TooLong as e:
            said = fatal(str(e))
        except TemplateSyntaxError as e:
            said = fatal(f"it is no Jinja template: line {e.lineno}: {e}")
        except Exception as e:  # what Python says of the code that a template becomes
            said = fatal(f"it is no Jinja template: {e}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(said)
        sys.stdout.flush()


def fatal(why: str) -> bytes:
    return json.dumps({"fatal": why[:300]}).encode() + b"\n"


if __name__ == "__main__":
    main()
