"""data=chat: which tokens are trained, by any template, against sentinel words and `transformers`."""

import datetime
import decimal
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.conftest import SHARED
from txtrain.config.schema import Train
from txtrain.data.chat.formats import conversations
from txtrain.data.chat.preferences import Columns, preferences
from txtrain.data.chat.template import Template
from txtrain.data.chat.turns import Conversation, Speaker
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import ChatTemplate, Tokenizer, byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.training.data_module import DataModule

SPECIALS = (
    "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> <|user|> <|assistant|> "
    "<|system|> <|end|> <User> <Assistant> <eos> [INST] [/INST] <|START|> <|END|>"
).split()
EACH = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}"
CHATML = (
    EACH
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASK
    + "<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content }}{{ eos_token }}{% else %}<<SYS>>{{ m.content }}<</SYS>>{% endif %}{% endfor %}"
)
LLAMA3 = (
    EACH
    + "{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    + ASK
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = EACH + "{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}" + ASK + "Assistant:{% endif %}"

# Of each template the token that ends a turn, or "" where it has none.
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml in one expression": (CHATML.replace("\n", "{{ '\\n' }}"), "<|im_end|>"),
    "chatml marked": (
        CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
        "<|im_end|>",
    ),
    "chatml marked with its end": (
        EACH
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "chatml with a default system turn": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML,
        "<|im_end|>",
    ),
    "llama 2": (INST, "</s>"),
    "mistral, spaces": (INST.replace(" {{ m.content }}{{ eos", "{{ m.content }} {{ eos"), "</s>"),
    "llama 3": (LLAMA3, "<|eot_id|>"),
    "llama 3 marked": (LLAMA3.replace("{{ c }}", "{% generation %}{{ c }}{% endgeneration %}"), "<|eot_id|>"),
    "llama 3 with the date": (
        LLAMA3.replace("{% set c = bos_token + c %}", "{% set c = bos_token + strftime_now('%d %b %Y') + c %}"),
        "<|eot_id|>",
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ (first if loop.first else '') + m.content | trim }}"
        "<end_of_turn>\n{% endfor %}" + ASK + "<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "deepseek r1": (
        "{{ bos_token }}"
        + EACH
        + "{% if m.role == 'assistant' %}<Assistant>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% elif m.role == 'user' %}<User>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        + ASK
        + "<Assistant><think>\n{% endif %}",
        "</s>",
    ),
    "qwen 3": (
        "{% set ns = namespace(last=0) %}"
        + EACH
        + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + EACH
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "olmo": (
        "{{ bos_token }}"
        + EACH
        + "<|{{ m.role }}|>\n{{ m.content }}{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}"
        "{% endfor %}" + ASK + "<|assistant|>\n{% endif %}",
        "</s>",
    ),
    "zephyr": (
        EACH + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}" + ASK + "<|assistant|>\n{% endif %}",
        "</s>",
    ),
    "zephyr without a header to ask with": (
        EACH + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}",
        "</s>",
    ),
    "vicuna": (
        EACH
        + "{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}" + ASK + "ASSISTANT:{% endif %}",
        "</s>",
    ),
    "asked with a space": (PLAIN.replace("Assistant:{% endif %}", "Assistant: {% endif %}"), ""),
    "alpaca": (
        EACH
        + "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n"
        "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}" + ASK + "### Response:\n{% endif %}",
        "",
    ),
    "phi 3": (
        EACH
        + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        + ASK
        + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "</s>",
    ),
    "cohere": (
        EACH
        + "<|START|>{{ m.role | upper }}:{{ m.content }}<|END|>{% endfor %}"
        + ASK
        + "<|START|>ASSISTANT:{% endif %}",
        "<|END|>",
    ),
    "trims": (CHATML.replace("m.content", "m.content | trim"), "<|im_end|>"),
    "upper case": (CHATML.replace("m.content", "m.content | upper"), "<|im_end|>"),
    "merges turns": (
        "{% set ns = namespace(role='') %}"
        + EACH
        + "{% if m.role != ns.role %}{% if ns.role %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
        "{% else %}{{ ' ' }}{% endif %}{{ m.content }}{% set ns.role = m.role %}{% endfor %}<|im_end|>\n"
        + ASK
        + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "drops the system turn": (CHATML.replace(EACH, EACH[:-3] + " if m.role != 'system' %}"), "<|im_end|>"),
    "numbers the turns": (
        EACH
        + "{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"
        + ASK
        + "{{ messages | length + 1 }}. assistant: {% endif %}",
        "",
    ),
    "says how many follow": ("{{ messages | length }} turns.\n" + CHATML, "<|im_end|>"),
    "knows the last turn": (
        EACH
        + "{{ 'LAST ' if loop.last }}<User>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
        + ASK
        + "<User>assistant: {% endif %}",
        "<eos>",
    ),
    "macro": (
        "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endmacro %}"
        + EACH
        + "{{ turn(m) }}{% endfor %}"
        + ASK
        + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "json": (EACH + "{{ m | tojson }}<|end|>{% endfor %}" + ASK + "{% endif %}", "<|end|>"),
    "loop controls": (
        CHATML.replace(EACH, EACH + "{% if m.role == 'nobody' %}{% continue %}{% endif %}"),
        "<|im_end|>",
    ),
    "plain": (PLAIN, ""),
}
SHAPES = {
    "one turn": ["user", "assistant"],
    "many turns": ["user", "assistant"] * 3,
    "system": ["system", "user", "assistant", "user", "assistant"],
    "ends with a question": ["user", "assistant", "user", "assistant", "user"],
}


def words(roles: list[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"The word is sentinel{chr(97 + k)}{role[0]}."} for k, role in enumerate(roles)]


def with_template(text: str, tokenizer: Tokenizer | None = None) -> Tokenizer:
    made = tokenizer or byte_tokenizer().with_specials(SPECIALS)
    return Tokenizer(
        made.backend, made.id_of("</s>"), made.id_of("<s>"), None, ChatTemplate({"default": text}, "stranger.jinja")
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of `transformers` with the same tokens."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    with_template("x").save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def runs_of(sample: Any) -> list[tuple[int, int]]:
    """Begin and end of each stretch of trained tokens."""
    edges = [
        i for i, (a, b) in enumerate(zip([False, *sample.trained], [*sample.trained, False], strict=True)) if a != b
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistant_alone_is_trained_and_its_prompt_is_the_one_of_inference(name: str, theirs: Any) -> None:
    text, ending = TEMPLATES[name]
    tokenizer = with_template(text)
    with Template(tokenizer) as template:
        for shape, roles in SHAPES.items():
            messages = words(roles)
            samples = Speaker(tokenizer, template, "assistant", 10_000).samples(Conversation(messages, 0, shape))
            places = [k for k, role in enumerate(roles) if role == "assistant"]
            prompts = [
                theirs.apply_chat_template(
                    messages[:k], chat_template=text, add_generation_prompt=True, return_dict=False
                )
                for k in places
            ]
            found = [(sample, run) for sample in samples for run in runs_of(sample)]
            assert len(found) == len(places), (shape, "a stretch for each turn")
            for (sample, (begin, end)), k, prompt in zip(found, places, prompts, strict=True):
                assert list(sample.ids[:begin])[: len(prompt)] == prompt, (shape, k)
                said = tokenizer.decode(sample.ids[begin:end], special=True).lower()
                assert messages[k]["content"].lower() in said, (shape, k, said)
                assert said.count("sentinel") == 1, (shape, k, said)
                assert said.endswith(ending.lower()), (shape, k, said)
                assert not ending or not said.endswith("\n")
            if len(samples) == 1:
                whole = theirs.apply_chat_template(messages[: places[-1] + 1], chat_template=text, return_dict=False)
                assert list(samples[0].ids) == whole or len(places) == 1, shape


def samples_of(
    text: str, messages: Any, train_on: Any = "assistant", seq_len: int = 10_000, tools: Any = None
) -> list[tuple[str, str]]:
    """Of each sample all, and what is trained."""
    tokenizer = with_template(text)
    with Template(tokenizer) as template:
        made = Speaker(tokenizer, template, train_on, seq_len).samples(Conversation(messages, 0, "here", tools))
    return [
        (
            tokenizer.decode(s.ids, special=True),
            tokenizer.decode([i for i, t in zip(s.ids, s.trained, strict=True) if t], special=True),
        )
        for s in made
    ]


def test_what_is_trained_on() -> None:
    messages = words(["system", "user", "assistant", "user", "assistant"])
    ((_, last),) = samples_of(CHATML, messages, "last_assistant")
    assert last == "The word is sentinelea.<|im_end|>"
    ((whole, everything),) = samples_of(CHATML, messages, "all")
    assert whole == everything


@pytest.mark.parametrize("name", ["chatml", "olmo"])
def test_turns_that_do_not_fit_are_left_out_as_a_whole(name: str) -> None:
    messages = words(["user", "assistant"] * 4)
    ends = [
        sum(len(trained) > 0 for _, trained in samples_of(TEMPLATES[name][0], messages, seq_len=n))
        for n in (10, 150, 10_000)
    ]
    assert ends[0] == 0
    for text, trained in samples_of(TEMPLATES[name][0], messages, seq_len=150):
        assert text.endswith(TEMPLATES[name][1]), text
        assert trained.count("sentinel") >= 1
    assert ends[1] >= 1


def test_what_was_thought_goes_on_from_a_prompt_that_opens_it() -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]
    ((whole, trained),) = samples_of(TEMPLATES["deepseek r1"][0], messages)
    assert whole == "<s><User>Q<Assistant><think>\nhm\n</think>\n\nA</s>"
    assert trained == "hm\n</think>\n\nA</s>"


def test_tools_and_calls_are_read_as_the_template_writes_them(theirs: Any) -> None:
    text = (
        "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
        + EACH
        + "<|{{ m.role }}|>{% if m.tool_calls is defined %}"
        "{{ m.tool_calls | tojson }}{% endif %}{{ m.content if m.content is defined }}<|end|>{% endfor %}"
        + ASK
        + "<|assistant|>{% endif %}"
    )
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [
        *words(["user"]),
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "3"},
        *words(["assistant"]),
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    ((whole, trained),) = samples_of(text, messages, tools=tools)
    assert whole == theirs.decode(
        theirs.apply_chat_template(messages, tools=tools, chat_template=text, return_dict=False)
    )
    assert trained == json.dumps(call) + "<|end|>The word is sentinelaa.<|end|>"


# ------------------------------------------------------------------------------------------------------------------- strangers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1 s"),
        ("{{ 'a' * 10**11 }}", "needs more than 1024 MB"),
        (
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "needs more than 1024 MB",
        ),
        ("{% if %}", "no Jinja template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].content.format.__globals__['x'] }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('only cats') }}", "only cats"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 20000000 }}", "writes more than 16,"),
        ("".join(f"{{% for a{i} in [1] %}}" for i in range(25)) + "{% endfor %}" * 25, "no Jinja template.*nested"),
        ("{{ 10**100000 }}", "no Jinja template"),
        ("{% macro m() %}ab{% generation %}x{% endgeneration %}{% endmacro %}{{ m() }}", "must not be within"),
    ],
)
def test_a_template_can_do_nothing_but_write(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from txtrain.data.chat import renderer

    # Which limit is met must not depend on how fast the machine fills a gigabyte.
    seconds = 1 if "takes more" in said else 600
    source = Path(renderer.__file__).read_text().replace(f"SECONDS = {renderer.SECONDS} ", f"SECONDS = {seconds} ")
    (tmp_path / "renderer.py").write_text(source)
    monkeypatch.setattr(renderer, "__file__", str(tmp_path / "renderer.py"))
    monkeypatch.setattr(renderer, "SECONDS", seconds)
    with pytest.raises(ConfigError, match=f"(?s)stranger.jinja.*({said})"):
        samples_of(text, words(["user", "assistant"]))


def test_a_template_that_left_the_sandbox_could_open_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from txtrain.data.chat import renderer

    source = Path(renderer.__file__).read_text()
    for left, way in [("open(form).read()", "/etc/passwd"), ("__import__('os').popen(form).read()", "id")]:
        (tmp_path / "renderer.py").write_text(source.replace("datetime.now().strftime(form)", left))
        monkeypatch.setattr(renderer, "__file__", str(tmp_path / "renderer.py"))
        with pytest.raises(ConfigError, match="Too many open files"):
            samples_of(f"{{{{ strftime_now('{way}') }}}}", words(["user", "assistant"]))


def test_chance_in_a_template_is_the_same_each_time() -> None:
    text = "{% for m in messages %}{{ range(100000)|random }}{{ m.content }}{% endfor %}"
    assert samples_of(text, words(["user", "assistant"])) == samples_of(text, words(["user", "assistant"]))


# --------------------------------------------------------------------------------------------------------------------- formats

ROWS = {
    "messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    "messages under another name": {
        "conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt_completion": {"prompt": "Q", "completion": "A"},
    "prompt_completion of messages": {
        "prompt": [{"role": "user", "content": "Q"}],
        "completion": [{"role": "assistant", "content": "A"}],
    },
    "self_instruct": {"instruction": "Q", "instances": [{"input": "", "output": "A"}]},
    "oasst": {
        "prompt": {"role": "prompter", "text": "Q", "replies": [{"role": "assistant", "text": "A", "replies": []}]}
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_gives_the_same_conversation(name: str) -> None:
    form = name.split()[0]
    for asked in ("auto", form):
        (talk,) = conversations(ROWS[name], asked, 7, "row 7")  # type: ignore[arg-type]
        assert [(turn["role"], turn["content"]) for turn in talk.messages] == [("user", "Q"), ("assistant", "A")]
        assert (talk.number, talk.assistant()) == (7, [1])


def test_what_formats_have_beside() -> None:
    (alpaca,) = conversations(
        {"instruction": "Q", "input": "x", "output": "A", "system": "S", "history": [["q", "a"]]}, "auto", 0, "row"
    )
    assert [turn["content"] for turn in alpaca.messages] == ["S", "q", "a", "Q\n\nx", "A"]
    (share,) = conversations(
        {"conversations": [{"from": "human", "value": "Q"}], "system": "S", "tools": '[{"name": "f"}]'},
        "auto",
        0,
        "row",
    )
    assert (share.messages[0]["role"], share.tools) == ("system", [{"name": "f"}])


@pytest.mark.parametrize("history", [[["only"]], ["qa"], [["q", "a", "b"]], [None]])
def test_a_history_that_is_no_pairs_is_refused_with_its_row(history: Any) -> None:
    with pytest.raises(ConfigError, match=r"row 3 must be of the format alpaca, but is not: .* instead of a question and its answer"):
        list(conversations({"instruction": "Q", "output": "A", "history": history}, "auto", 3, "row 3"))


@pytest.mark.parametrize("rank", [math.inf, "x", []])
def test_a_rank_that_is_no_number_is_refused_with_its_row(rank: Any) -> None:
    replies = [{"role": "assistant", "text": text, "rank": rank} for text in "ab"]
    tree = {"prompt": {"role": "prompter", "text": "Q", "replies": replies}}
    with pytest.raises(ConfigError, match="row 3 must be a tree of OASST, but is not"):
        list(preferences(tree, Columns("prompt", "chosen", "rejected"), "auto", 3, "row 3", False))


def test_each_turn_of_a_tree_is_trained_once() -> None:
    def node(role: str, text: str, *replies: Any) -> dict[str, Any]:
        return {"role": role, "text": text, "replies": list(replies)}

    tree = node(
        "prompter",
        "q",
        node("assistant", "a", node("prompter", "r", node("assistant", "b"), node("assistant", "c"))),
        node("assistant", "d"),
    )
    found = list(conversations({"prompt": tree}, "auto", 3, "tree"))
    assert [[turn["content"] for turn in talk.messages] for talk in found] == [
        ["q", "a", "r", "b"],
        ["q", "a", "r", "c"],
        ["q", "d"],
    ]
    assert [[talk.messages[k]["content"] for k in talk.assistant()] for talk in found] == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(
    ("row", "form", "said"),
    [
        ({"text": "x"}, "auto", "of none: it has the keys text"),
        ({"text": "x"}, "alpaca", "format alpaca, but is not: no 'instruction'"),
        ({"conversations": [{"from": "humane", "value": "x"}]}, "auto", "'humane' in row 3. Did you mean human"),
        ({"messages": [{"role": "user", "content": 3}]}, "auto", 'content of text, but is {"role": "user"'),
    ],
)
def test_a_row_of_no_format_is_shown(row: Any, form: Any, said: str) -> None:
    with pytest.raises(ConfigError, match="row 3") as e:
        list(conversations(row, form, 3, "row 3"))
    assert said in str(e.value)


# --------------------------------------------------------------------------------------------------------------------- a source


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    with_template(CHATML).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def chats(n: int) -> list[dict[str, Any]]:
    return [{"messages": words(["user", "assistant"] * (1 + k % 3))} for k in range(n)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_of_every_kind_give_the_same_samples(
    make_config: Callable[..., Train], tmp_path: Path, tokenizer_folder: Path, kind: str
) -> None:
    rows, file = chats(30), tmp_path / f"chats.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    data = DataModule(make_config("chat", {"path": str(file), "tokenizer": str(tokenizer_folder), "seq_len": 300}))
    data.prepare()
    made = [
        numbers for split in ("train", "validation") for _, sources in data.first(None, split) for numbers in sources
    ]
    assert sorted(n for numbers in made for n in numbers) == list(range(30))
    batch, _ = next(data.first(1))
    trained = [i for i in batch["labels"][0].tolist() if i != -100]
    assert data.tokenizer is not None
    assert (
        data.tokenizer.decode(trained, special=True)
        .replace("The word is sentinel", "")
        .replace("<|im_end|>", "")
        .strip(".abdf")
        == ""
    )


def test_values_that_json_lacks_reach_the_template_as_it_has_them(
    make_config: Callable[..., Train], tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    at = datetime.datetime(2023, 4, 9, 0, 2, 53, tzinfo=datetime.UTC)
    beside = {"timestamp": at, "price": decimal.Decimal("1.50"), "raw": b"\xff\0"}
    rows = [{"conversation": [{"role": role, "content": role, **beside} for role in ("user", "assistant")]}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    shows = EACH + "{{ m.content }} {{ m.timestamp }} {{ m.price }} {{ m.raw.bytes }}|{% endfor %}"
    with_template(shows).save(tmp_path / "tokenizer")
    keys = {"path": str(tmp_path / "a.parquet"), "tokenizer": str(tmp_path / "tokenizer"), "seq_len": 300, "train_on": "all"}
    data = DataModule(make_config("chat", keys))
    batch, _ = next(data.first(1))
    text = data.tokenizer.decode([i for i in batch["input_ids"][0].tolist() if i != data.tokenizer.padding_id])
    said = "2023-04-09 00:02:53+00:00 1.5 2|"
    assert text.startswith(f"user {said}assistant {said}")


def test_bytes_are_no_text(make_config: Callable[..., Train], tmp_path: Path, tokenizer_folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": b"Hi"}]}]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r'content of text, but is .*\{"bytes": 2\}'):
        DataModule(make_config("chat", {"path": str(tmp_path / "a.parquet"), "tokenizer": str(tokenizer_folder), "seq_len": 30})).prepare()


def test_a_template_from_a_file_goes_first_and_leaves_with_the_tokenizer(
    make_config: Callable[..., Train], tmp_path: Path, tokenizer_folder: Path
) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(30)))
    (tmp_path / "mine.jinja").write_text(TEMPLATES["zephyr"][0])
    keys = {"path": str(tmp_path / "chats.jsonl"), "tokenizer": str(tokenizer_folder), "seq_len": 300}
    fingerprints = set()
    for template in (None, str(tmp_path / "mine.jinja")):
        data = DataModule(make_config("chat", {**keys, "chat_template": template}))
        data.prepare()
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 2
    assert data.tokenizer is not None
    data.tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == ChatTemplate(
        {"default": TEMPLATES["zephyr"][0]}, str(tmp_path / "saved/chat_template.jinja")
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokenizer": "bytes"}, "`data.chat_template` must be a file, since data.tokenizer brings no chat template"),
        ({"path": None}, "`data.path` must be given: .json, .jsonl or .parquet files of conversations"),
        ({"seq_len": 20}, "`data` must have training texts with a token that is trained.* larger data.seq_len"),
        ({"path": "nothing/here"}, "nothing/here"),
    ],
)
def test_what_cannot_be_had_is_said(
    make_config: Callable[..., Train],
    tmp_path: Path,
    tokenizer_folder: Path,
    no_hub: None,
    keys: dict[str, Any],
    said: str,
) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(30)))
    with pytest.raises(ConfigError, match=said):
        DataModule(
            make_config(
                "chat",
                {"path": str(tmp_path / "chats.jsonl"), "tokenizer": str(tokenizer_folder), "seq_len": 300, **keys},
            )
        ).prepare()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize(
    "name", ["oasst_en_100_trees.jsonl", "self_instruct_seed_tasks.jsonl", "fastchat_dummy_conversation.json"]
)
def test_real_chats_are_read(make_config: Callable[..., Train], tokenizer_folder: Path, name: str) -> None:
    data = DataModule(
        make_config("chat", {"path": str(SHARED / "chat" / name), "tokenizer": str(tokenizer_folder), "seq_len": 2000})
    )
    data.prepare()
    assert data.n_train > 10
    assert data.n_val >= 1


@pytest.mark.parametrize(
    "said",
    [
        {"chat_template": "one"},
        {"chat_template": [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]},
        {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "unk_token": None, "pad_token": "<eos>", "chat_template": "one"},
        {"bos_token": None},
    ],
)
def test_templates_and_names_are_those_that_transformers_reads(tmp_path: Path, said: dict[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    with_template("x").save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | said))
    ours, theirs = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.names == theirs.special_tokens_map
    template = theirs.chat_template
    told = None if ours.chat_template is None else dict(ours.chat_template.texts)
    assert told == (template if template is None or isinstance(template, dict) else {"default": template})
    ours.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.fingerprint == ours.fingerprint
    assert told == (None if again.chat_template is None else dict(again.chat_template.texts))
    assert told is None or again.names == ours.names
