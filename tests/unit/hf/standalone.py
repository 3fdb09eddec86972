"""Loads exported folders where txtrain cannot be imported, and compares them with what was recorded there.

python -I standalone.py CASES: a folder of cases, each an export with inputs and results in `case.pt`; prints a JSON line for each.
TXTRAIN_TRANSFORMERS: a folder with another version of transformers, which goes first.
"""

import json
import os
import sys
import warnings
from pathlib import Path


class Blocked:
    """No txtrain here."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "txtrain":
            raise ImportError("txtrain is not installed here")
        return None


sys.meta_path.insert(0, Blocked())
# Every `again` is one module for transformers 4, and bytecode is known by second and size alone.
sys.dont_write_bytecode = True
if other := os.environ.get("TXTRAIN_TRANSFORMERS"):
    sys.path.insert(0, other)
    sys.modules["datasets"] = None  # the one that is installed needs a newer client of the hub than that version has
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402  (after the block)
import transformers  # noqa: E402
from transformers import dynamic_module_utils  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.simplefilter("ignore")


def once_each(find):
    """Of get_imports, which transformers calls whenever it looks up a class of a modeling file, ten times a graft: half the time of
    this process went into parsing the same text."""
    known = {}

    def found(file):
        content = Path(file).read_bytes()
        if content not in known:
            known.clear()
            known[content] = find(file)
        return list(known[content])

    return found


dynamic_module_utils.get_imports = once_each(dynamic_module_utils.get_imports)

ROUNDING = 1e-5


def gap(a, b):
    """The largest difference, as a share of the largest value."""
    a, b = a.double(), b.double()
    return float("inf") if a.shape != b.shape or not a.isfinite().all() else ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def gradients(model, inputs, recorded, exact):
    """The largest difference, as a share of the largest gradient, beyond twice what rounding has moved the recorded ones from `exact` by:
    in float32, without norms, that alone is up to 3e-5. From 1e-3 on it is no rounding, but another choice of experts."""
    out = model(**inputs)
    (out.loss if out.loss is not None else out.logits.square().mean()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = {name for name, g in recorded.items() if g.abs().max() > 0}
    if missing := names - found.keys():
        return {"missing": sorted(missing)}
    scale = max(g.abs().max().item() for g in exact.values())
    apart, rounded = (
        max((a[n].double() - b[n].double()).abs().max().item() for n in names) for a, b in ((found, recorded), (recorded, exact))
    )
    return max(0.0, apart - 2 * rounded * (rounded < 1e-3 * scale)) / scale


def check(folder):
    case = torch.load(folder / "case.pt", weights_only=False)  # our own; its other reader takes ten times as long
    auto = getattr(transformers, case["auto"])
    # Without norms logits may reach 1e5: where float32 itself is that far from float64, only float64 is compared.
    made = {"rounding": gap(case["float32"]["logits"], case["float64"]["logits"])}
    for dtype in (torch.float64,) if made["rounding"] > ROUNDING else (torch.float32, torch.float64):
        want = case[str(dtype).removeprefix("torch.")]
        model = auto.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case["inputs"].items()}
        with torch.no_grad():
            short = {n: x for n, x in inputs.items() if n not in ("labels", "next_sentence_label")}
            made[f"logits {dtype}"] = gap(model(**short, **case["decoder"]).logits, want["logits"])
            if "padded" in want:
                padded = {n: x.to(dtype) if x.is_floating_point() else x for n, x in case["padded"].items()}
                made[f"padded {dtype}"] = gap(model(**padded, **case["decoder"]).logits[case["real"]], want["padded"])
        made[f"loss {dtype}"] = gap(model(**inputs).loss, want["loss"])
        made[f"gradients {dtype}"] = gradients(model, inputs, want["gradients"], case["float64"]["gradients"])
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model.train()
        made[f"checkpointed {dtype}"] = gradients(model, inputs, want["trained"], case["float64"]["trained"])
        model.eval()
    if "text" in case:
        made |= generated(model, case)
    if case["trainer"]:
        made["trainer"] = trained(folder, auto, case["inputs"])
    bare = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    with torch.no_grad():
        short = {n: x.to(dtype) if x.is_floating_point() else x for n, x in case["inputs"].items() if "label" not in n}
        made["bare"] = gap(bare(**short, **case["decoder"]).last_hidden_state, want["hidden"])
    model.save_pretrained(folder / "again")
    again = auto.from_pretrained(folder / "again", trust_remote_code=True, dtype=dtype).eval()
    with torch.no_grad():
        made["saved again"] = gap(again(**short, **case["decoder"]).logits, want["logits"])
    return made


def trained(folder, auto, inputs):
    """Two steps of transformers.Trainer: whole batches, and parts of them with gradient checkpointing, end in the same weights."""
    rows = [{name: x[i % len(x)] for name, x in inputs.items()} for i in range(8)]
    ends = []
    for checkpointing, parts in ((False, 1), (True, 4)):
        model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)  # steps are small beside weights
        args = transformers.TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=2, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
            gradient_checkpointing=checkpointing, optim="sgd", learning_rate=0.01, lr_scheduler_type="constant", max_grad_norm=0.0,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        transformers.Trainer(model, args, train_dataset=rows).train()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    return gap(*ends)


def generated(model, case):
    """Text of every way to decode, float64."""
    n, made = case["new"], {}
    given = {"input_ids": case["prompt"], "attention_mask": case["prompt_mask"]}
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ways = {
        "default": {}, "no cache": {"use_cache": False}, "static": {"cache_implementation": "static"},
    }
    for name, how in ways.items():
        text = model.generate(**given, max_new_tokens=n, do_sample=False, **how)
        made[f"generate {name}"] = bool(torch.equal(text, case["text"])) or [text.tolist(), case["text"].tolist()]
    beams = [model.generate(**given, max_new_tokens=n, do_sample=False, num_beams=3, use_cache=c) for c in (True, False)]
    made["generate beams"] = bool(torch.equal(*beams))
    if not model.config.is_encoder_decoder:
        rows = [model.generate(row[m.bool()][None], max_new_tokens=n, do_sample=False)[0, -n:] for row, m in zip(*given.values(), strict=True)]
        made["generate alone"] = bool(torch.equal(torch.stack(rows), case["text"][:, -n:]))
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        try:
            print(json.dumps({"case": folder.name, **check(folder)}), flush=True)
        except Exception as e:
            import traceback

            print(json.dumps({"case": folder.name, "error": "".join(traceback.format_exception(e))[-3000:]}), flush=True)
