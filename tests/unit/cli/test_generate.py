"""`txtrain generate` on a real checkpoint: what is typed arrives, what is asked for happens."""

import io
import re
import shutil
import subprocess
import sys

import pytest
import torch

import txtrain
from tests.training import tiny
from txtrain.checkpoint.load import load
from txtrain.cli import writer
from txtrain.cli.main import main
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.model.config import Sampling
from txtrain.model.decoding import Written

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


def saying(monkeypatch, *said):
    """The prompts and jobs that reach the generator, which says this."""
    seen, row = [], Written(torch.tensor(said, dtype=torch.long), torch.zeros(len(said)), False)

    def answered(model, prompts, job, numbers):
        seen.append((prompts, job))
        for token in said if job.on_step else ():
            job.on_step(torch.tensor([token]))
        return [row] * (len(prompts) * job.how.n)

    monkeypatch.setattr(writer, "continue_rows", answered)
    return seen


def test_one_process_reads_a_checkpoint_without_what_takes_as_long_to_import_as_torch(run):
    absent = "torch.distributed.checkpoint torch.distributed.tensor torch._dynamo sympy jinja2 lightning transformers datasets rich"
    heavy = f"[m for m in {absent.split()} if m in sys.modules]"
    program = f"import sys\nfrom txtrain.cli.main import main\nassert main(sys.argv[1:]) == 0\nassert not {heavy}, {heavy}"
    line = ["generate", f"checkpoint={run}", "prompt=a", "max_new_tokens=1"]
    done = subprocess.run([sys.executable, "-c", program, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_as_it_was_typed(prompt, run, capsys, monkeypatch):
    seen = saying(monkeypatch)
    assert said(capsys, f"checkpoint={run}", f"prompt={prompt}") == prompt + "\n"
    (((ids,), _),) = seen
    assert load_tokenizer("bytes").decode(ids[1:]) == prompt


def test_standard_input_is_one_prompt_with_its_line_ends(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one, two\nthree\n"))
    assert said(capsys, f"checkpoint={run}", "prompt=-", "max_new_tokens=1").startswith("one, two\nthree\n")


def test_a_file_holds_a_prompt_a_line_and_rows_do_not_disturb_each_other(run, capsys, folder):
    prompts = [f"{i} is " + "long, " * (i % 5) + "x= " for i in range(19)]  # more than one batch, of many lengths
    prompts[7] = "one \x0c prompt \u2028 of \x85 a line"
    (folder / "prompts.txt").write_text("\n\n".join(prompts), encoding="utf-8")
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
    seen = saying(monkeypatch)
    wanted = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "seed": 9, "repetition_penalty": 1.5}
    said(capsys, f"checkpoint={run}", "prompt=x", "batch_size=5", "stop=[a,' b']", *(f"{k}={v}" for k, v in wanted.items()))
    ((_, job),) = seen
    assert job.how == Sampling(**wanted, stop=("a", " b"))
    assert (job.ends, job.batch_size) == ((load_tokenizer("bytes").eos_id,), 5)
    assert said(capsys, f"checkpoint={run}", "prompt=x", "num_beams=3", "n=2") == "x\nx\n"
    assert seen[1][1].how == Sampling(num_beams=3, n=2)


def test_samples_are_rows_of_their_own_however_they_are_divided(run, capsys, folder):
    (folder / "prompts.txt").write_text("\n".join(["1", "a longer one", "The 2th", "x"] * 3))
    line = [f"checkpoint={run}", "prompt_file=prompts.txt", "max_new_tokens=8", "temperature=1.5", "n=2"]
    together = said(capsys, *line)
    assert together == said(capsys, *line, "batch_size=3")
    lines = [f"{len(text)}" for text in together.splitlines()]
    assert len(lines) >= 24
    assert main(["generate", *line]) == 0
    assert re.search(r"txtrain: [\d,]+ tokens in [\d.]+ s: [\d,]+ tokens/s\n$", capsys.readouterr().err)


def test_a_stop_string_is_not_printed_streamed_or_not(run, capsys, monkeypatch):
    tokenizer = load_tokenizer("bytes")
    saying(monkeypatch, *tokenizer.encode("one, two\nQ: three"))
    for stream in ("stream=true", "stream=false"):
        assert said(capsys, f"checkpoint={run}", "prompt=x", stream, "stop=['Q:',never]") == "xone, two\n\n"


def test_the_beginning_of_a_stop_string_waits(capsys):
    shown = []
    printer = writer.Printer("".join, shown.append, ("END", "stop"))
    text = ""
    for char in "an EN, a st, the EN":
        text += char
        printer([*text])
    assert "".join(shown) == "an EN, a st, the "
    assert printer.finish([*text]) == "".join(shown) == text
    assert shown[3:6] == ["EN,", " ", "a"]


def test_a_character_of_several_tokens_waits_until_it_is_whole(capsys):
    tokenizer = load_tokenizer("bytes")
    show = writer.Printer(tokenizer.decode, lambda text: print(text, end=""))
    shown, ids = [], []
    for token in [*tokenizer.encode("a½世"), tokenizer.eos_id]:
        show(ids := [*ids, token])
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
        (["checkpoint={run}"], "`prompt` must be given, or prompt_file, messages or chat=true"),
        (["checkpoint={run}", "prompt=x", "chat=true"], "must be given without prompt"),
        (["checkpoint={run}", "prompt=x", "out=a"], "`out` must be null without messages"),
        (["checkpoint={run}", "chat=true"], "its tokenizer has no chat template"),
        (["checkpoint={run}", "prompt=x", "num_beams=2", "temperature=1"], "`temperature` must be 0 with num_beams=2"),
        (["checkpoint={run}", "prompt=x", "stop=['']"], "`stop` must be a list of strings"),
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
    seen = saying(monkeypatch)
    prompt = "a <extra_id_0> b<extra_id_1><extra_id_999>"
    assert said(capsys, f"checkpoint={two_stacks}", f"prompt={prompt}") == f"{prompt}|\n"
    tokenizer = load(two_stacks).tokenizer
    first, second = (tokenizer.id_of(f"<extra_id_{k}>") for k in (0, 1))
    text = [*tokenizer.encode("a "), first, *tokenizer.encode(" b"), second, *tokenizer.encode("<extra_id_999>")]  # the last is no token of it
    assert seen[0][0] == [[*text, tokenizer.eos_id]]


def test_an_answer_is_printed_behind_its_prompt_whole_with_its_sentinels(two_stacks, capsys, monkeypatch, folder):
    tokenizer = load(two_stacks).tokenizer
    answer = [tokenizer.id_of("<extra_id_0>"), *tokenizer.encode(" gap"), tokenizer.id_of("<extra_id_1>"), tokenizer.eos_id]

    saying(monkeypatch, *answer)
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
