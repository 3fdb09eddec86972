"""`txtrain generate` on a real checkpoint: what is typed arrives, what is asked for happens."""

import io
import re
import shutil

import pytest
import torch

import txtrain
from tests.training import tiny
from txtrain.checkpoint.load import load
from txtrain.cli import generate
from txtrain.cli.main import main
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError

PROMPTS = [
    "a, b,c",
    "it's \"quoted\" 'twice'",
    "x=1",
    "k=v, k2=[1,2]",
    "a trailing space ",
    "  two before",
    "123",
    "007",
    "1e3",
    "null",
    "true",
    "${seed}",
    "{a: b}",
    "\\n and \\",
    "Привет, 世界! ½",
    "--help",
    "",
    "two\nlines",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on bytes, whose model has learned nothing in particular."""
    folder = tmp_path_factory.mktemp("runs")
    return txtrain.train(tiny(folder, "trainer.max_steps=4", "trainer.limit_val_batches=0", f"run_dir={folder / 'run'}")).run_dir.resolve()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *args: object) -> str:
    assert main(["generate", *map(str, args)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_as_it_was_typed(prompt, run, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "generate", lambda model, ids, **how: seen.extend(ids[0].tolist()))
    assert said(capsys, f"checkpoint={run}", f"prompt={prompt}") == prompt + "\n"
    assert load_tokenizer("bytes").decode(seen[1:]) == prompt


def test_standard_input_is_one_prompt_with_its_line_ends(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one, two\nthree\n"))
    assert said(capsys, f"checkpoint={run}", "prompt=-", "max_new_tokens=1").startswith("one, two\nthree\n")


def test_a_file_holds_a_prompt_a_line_and_rows_do_not_disturb_each_other(run, capsys, folder):
    prompts = [f"{i} is " + "long, " * (i % 5) + "x= " for i in range(19)]  # more than one batch, of many lengths
    (folder / "prompts.txt").write_text("\n\n".join(prompts))
    greedy = [f"checkpoint={run}", "max_new_tokens=6", "temperature=0"]
    together = said(capsys, *greedy, "prompt_file=prompts.txt")
    assert together == "".join(said(capsys, *greedy, f"prompt={prompt}") for prompt in prompts)


@pytest.mark.parametrize("how", [["temperature=0"], ["temperature=1.5", "seed=3"], ["top_k=5"], ["top_p=0.5"]])
def test_streaming_prints_what_is_printed_at_once(how, run, capsys):
    line = [f"checkpoint={run}", "prompt=The 1", "max_new_tokens=24", *how]
    assert said(capsys, *line, "stream=true") == said(capsys, *line, "stream=false")


def test_the_seed_decides(run, capsys):
    line = [f"checkpoint={run}", "prompt=The", "max_new_tokens=24", "temperature=1.5"]
    assert said(capsys, *line, "seed=1") == said(capsys, *line, "seed=1") != said(capsys, *line, "seed=2")


def test_every_key_reaches_the_generation(run, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(generate, "generate", lambda model, ids, **how: calls.append(how))
    wanted = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "seed": 9}
    said(capsys, f"checkpoint={run}", "prompt=x", *(f"{k}={v}" for k, v in wanted.items()))
    del calls[0]["on_token"]
    assert calls == [{**wanted, "eos_token_id": load_tokenizer("bytes").eos_id}]


def test_a_character_of_several_tokens_waits_until_it_is_whole(capsys):
    tokenizer = load_tokenizer("bytes")
    show = generate._Printer(tokenizer)
    shown = []
    for token in [*tokenizer.encode("a½世"), tokenizer.eos_id]:
        show(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "½", "", "", "世", ""]


def test_a_run_one_of_its_checkpoints_and_python_give_one_model(run):
    newest = sorted((run / "checkpoints").iterdir())[-1]
    a, b = load(run).model, load(newest).model
    ids = torch.arange(8)[None]
    assert torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)
    assert not a.training


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["checkpoint=nope", "prompt=x"], "`checkpoint` must be"),
        (["checkpoint=.", "prompt=x"], "`checkpoint` must be"),
        (["checkpoint={run}", "prompt_file=nope.txt"], "'nope.txt' cannot be read: No such file"),
        (["checkpoint={run}", "prompt_file=blank.txt"], "'blank.txt' holds none"),
        (["checkpoint={run}", "prompt_file=latin.txt"], "it is not UTF-8 text"),
        (["checkpoint={run}", "prompt=x", "prompt_file=blank.txt"], "and not both"),
        (["checkpoint={run}", "prompt=x", "accelerator=gpu"], "torch sees no CUDA device"),
        (["checkpoint={run}", "prompt=x", "top_p=2"], "`top_p` must be above 0 and at most 1"),
        (["checkpoint={run}", "prompt=x", "temperature=-1"], "`temperature` must be at least 0"),
        (["checkpoint={run}", "prompt=x", "max_new_tokens=0"], "`max_new_tokens` must be at least 1"),
    ],
)
def test_a_mistake_is_told_in_one_line(args, says, run, folder, capsys):
    (folder / "blank.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes(b"\xfc")
    if torch.cuda.is_available() and "accelerator=gpu" in args:
        pytest.skip("there is a GPU")
    assert main(["generate", *(arg.format(run=run) for arg in args)]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert not out


def test_learned_positions_end_and_the_message_says_how_many_are_left(tmp_path, capsys):
    config = tiny(tmp_path, "model=gpt2", "trainer.max_steps=1", "trainer.limit_val_batches=0")
    run = txtrain.train(config).run_dir
    assert main(["generate", f"checkpoint={run}", "prompt=12345", "max_new_tokens=27"]) == 2
    room = int(re.search(r"must be at most (\d+) after a prompt of 6 tokens", capsys.readouterr().err)[1])
    assert said(capsys, f"checkpoint={run}", "prompt=12345", f"max_new_tokens={room}").startswith("12345")


# ------------------------------------------------------------------------------------------------------ an encoder, a decoder, both


@pytest.fixture(scope="module")
def two_stacks(tmp_path_factory):
    """The folder of a run of an encoder and a decoder that fill gaps."""
    folder = tmp_path_factory.mktemp("t5")
    config = tiny(folder, "model=t5", "model.vocab_size=400", "trainer.max_steps=2", "trainer.limit_val_batches=0", f"run_dir={folder / 'run'}")
    return txtrain.train(config).run_dir.resolve()


def test_an_encoder_reads_a_prompt_as_a_source_of_training_ends_with_its_sentinels(two_stacks, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "generate", lambda model, ids, **how: seen.extend(ids[0].tolist()))
    prompt = "a <extra_id_0> b<extra_id_1><extra_id_999>"
    assert said(capsys, f"checkpoint={two_stacks}", f"prompt={prompt}") == f"{prompt}|\n"
    tokenizer = load(two_stacks).tokenizer
    first, second = (tokenizer.id_of(f"<extra_id_{k}>") for k in (0, 1))
    text = [*tokenizer.encode("a "), first, *tokenizer.encode(" b"), second, *tokenizer.encode("<extra_id_999>")]  # the last is no token of it
    assert seen == [*text, tokenizer.eos_id]


def test_an_answer_is_printed_behind_its_prompt_whole_with_its_sentinels(two_stacks, capsys, monkeypatch, folder):
    tokenizer = load(two_stacks).tokenizer
    answer = [tokenizer.id_of("<extra_id_0>"), *tokenizer.encode(" gap"), tokenizer.id_of("<extra_id_1>"), tokenizer.eos_id]

    def answering(model, ids, mask=None, on_token=None, **how):
        for token in answer if on_token else ():
            on_token(torch.tensor([token]))
        return torch.tensor([[tokenizer.eos_id, *answer]] * len(ids))

    monkeypatch.setattr(generate, "generate", answering)
    prompts = ["short", "a prompt that is longer than its answer"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    assert said(capsys, f"checkpoint={two_stacks}", "prompt_file=prompts.txt") == "".join(f"{p}|<extra_id_0> gap<extra_id_1>\n" for p in prompts)
    assert said(capsys, f"checkpoint={two_stacks}", "prompt=short") == "short|<extra_id_0> gap<extra_id_1>\n"


def test_rows_of_answers_do_not_disturb_each_other(two_stacks, capsys, folder):
    prompts = ["a <extra_id_0>", "a longer one with <extra_id_0> in it"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    greedy = [f"checkpoint={two_stacks}", "max_new_tokens=6", "temperature=0"]
    assert said(capsys, *greedy, "prompt_file=prompts.txt") == "".join(said(capsys, *greedy, f"prompt={prompt}") for prompt in prompts)


def test_the_answers_positions_are_not_the_prompts(tmp_path, capsys):
    config = tiny(tmp_path, "model=t5", "model/position=learned", "model.vocab_size=400", "trainer.max_steps=1", "trainer.limit_val_batches=0")
    run, limit = txtrain.train(config).run_dir, config.model.max_seq_len
    at_most = ["generate", f"checkpoint={run}", f"prompt={'x' * (limit - 1)}"]
    assert main([*at_most, f"max_new_tokens={limit - 1}"]) == 0
    capsys.readouterr()
    assert main([*at_most, f"max_new_tokens={limit}"]) == 2
    assert f"must be at most {limit - 1} after a prompt of 1 tokens" in capsys.readouterr().err
    assert main(["generate", f"checkpoint={run}", f"prompt={'x' * limit}", "max_new_tokens=1"]) == 2
    assert f"`prompt` must have at most {limit} tokens, its end among them, but has {limit + 1}" in capsys.readouterr().err


def test_an_encoder_alone_continues_nothing_and_says_so(tmp_path, capsys):
    overrides = ("model=bert", "model.head.next_sentence=false", "model.vocab_size=400", "trainer.max_steps=1", "trainer.limit_val_batches=0")
    run = txtrain.train(tiny(tmp_path, *overrides)).run_dir
    capsys.readouterr()
    assert main(["generate", f"checkpoint={run}", "prompt=x"]) == 2
    out, err = capsys.readouterr()
    assert "is an encoder (bert), which reads a whole text and continues none." in err
    assert (err.count("\n"), out) == (1, "")


def test_a_damaged_checkpoint_is_refused(run, folder, capsys):
    copy = shutil.copytree(run, folder / "copy")
    (shard,) = copy.glob("checkpoints/*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="checkpoint"):
        load(copy)
