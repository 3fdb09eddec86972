"""Every command and example of docs/evaluate.md, run as a reader would."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.training import RUN, TINY, tiny, write_text
from txtrain.cli.main import main
from txtrain.training.run import train

DOCS = (Path(__file__).parents[3] / "docs/evaluate.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines() if line.startswith("txtrain ")]
PYTHON = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)

TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: CHOICES}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("docs")
    write_text(folder / "train.txt")
    write(folder / "held_out.jsonl", [{"text": f"The {i}th line, {'more ' * (i % 5)}."} for i in range(24)])
    questions = [{"question": f"Two times {i} is", "choices": [str(2 * i), "seven", "no"], "answer": i % 2} for i in range(8)]
    write(folder / "choices.jsonl", questions)
    write(folder / "cloze.jsonl", [{"text": "The end of it all is here"} for _ in range(4)])
    write(folder / "problems.jsonl", [{"question": q["question"], "answer": q["choices"][0]} for q in questions])
    (folder / "mine.py").write_text(PYTHON[1])
    (folder / "tasks").mkdir()
    (folder / "tasks/my_task.yaml").write_text(TASK.replace("CHOICES", str(folder / "choices.jsonl")))
    train(tiny(folder, f"run_dir={folder / 'RUN'}", "trainer.max_steps=3"))
    return folder


# importing lm_eval alone takes longer than all other commands
MARKED = [pytest.param(line, marks=pytest.mark.slow) if "tasks=[" in line else line for line in COMMANDS]


@pytest.mark.parametrize("command", MARKED)
def test_a_command_of_the_page_runs(folder, command, monkeypatch, capsys):
    if "tasks=[" in command:
        pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TXTRAIN_CACHE", str(folder / "cache"))
    words = shlex.split(command)[1:]
    if not words[0].isalpha():  # train: made short
        small = [word for word in (*TINY, *RUN) if word.partition("=")[0] not in ("model", "data")]
        words = [word for word in (*words, *small, "run_dir=trained") if word != "trainer.eval_tasks_interval=100"]
    else:
        words.append("trainer.accelerator=cpu")
    assert main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def test_the_example_in_python_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TXTRAIN_CACHE", str(folder / "cache"))
    exec(PYTHON[0], {})
    low = [float(word) for word in capsys.readouterr().out.split()]
    assert low[1] < low[0]


GRAFT = ("model=gpt2", "model/position=rope", "model/ffn=swiglu", "model.norm_position=sandwich", "model.n_layers=1")  # leaves with its own modeling file


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), GRAFT], ids=["llama2", "graft"])
def test_lm_eval_gives_the_figures_of_its_own_model_on_the_export(folder, capsys, more):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval.tasks import TaskManager

    name = "graft" if more else "llama2"
    ours, run, exported = folder / f"{name}.json", folder / name, folder / f"exported-{name}"
    train(tiny(folder, *more, f"run_dir={run}", "trainer.max_steps=8"))
    (folder / "tasks/my_words.yaml").write_text(
        (folder / "tasks/my_task.yaml").read_text().replace("my_task", "my_words").split("output_type")[0]
        + "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 6}\nmetric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    assert main(["evaluate", f"checkpoint={run}", "tasks=[my_task,my_words]", f"lm_eval.include_path={folder / 'tasks'}", f"out={ours}", "trainer.accelerator=cpu"]) == 0
    assert main(["export", f"checkpoint={run}", f"out={exported}"]) == 0
    assert (exported / "modeling_txtrain.py").exists() == bool(more)
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={exported},trust_remote_code=True", tasks=["my_task", "my_words"], device="cpu", batch_size=3,
        task_manager=TaskManager(include_path=str(folder / "tasks")), bootstrap_iters=100,
    )["results"]
    found = json.loads(ours.read_text())["metrics"]
    for task, metric in (("my_task", "acc,none"), ("my_task", "acc_norm,none"), ("my_words", "exact_match,none")):
        assert found[f"{metric.partition(',')[0]}/{task}"]["value"] == pytest.approx(theirs[task][metric], abs=1e-9), (task, metric)
    assert found["acc/my_task"]["n"] == 8
    words = ["data=multiple_choice", f"data.path={folder / 'choices.jsonl'}", f"out={ours}", "trainer.accelerator=cpu", f"data.cache_dir={folder / 'cache'}"]
    assert main(["evaluate", f"checkpoint={run}", *words]) == 0
    found = json.loads(ours.read_text())["metrics"]
    for metric, of_theirs in (("accuracy", "acc,none"), ("accuracy_per_byte", "acc_norm,none")):
        assert found[metric]["value"] == pytest.approx(theirs["my_task"][of_theirs], abs=1e-9), metric
