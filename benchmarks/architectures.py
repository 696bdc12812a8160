"""Which causal architectures of the installed transformers can be trained here, and are computed
right: a tiny random model of each, the checks at the start of a run, and one step of each method.

    python benchmarks/architectures.py                     # all of them, about twenty minutes
    python benchmarks/architectures.py llama gemma3 --out docs/architectures.md

An architecture is *right* if every method accepts it and what came out equals plain transformers:
the loss of the first SFT step, the log-probabilities of the first DPO step, a greedy answer, and
each saved model. It is *refused* if a command says in a sentence why not, before it trains.
Anything else is *wrong*, a traceback included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FIDUCIAL_CACHE"] = tempfile.mkdtemp()
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
warnings.simplefilter("ignore")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fiducial as fd
from fiducial.errors import InputError
from fiducial.models.load import load_policy
from fiducial.rollout.agreement import agreeing_sampler
from fiducial.rollout.local import LocalSampler
from fiducial.rollout.sampling import SamplingParams
from fiducial.settings import LoraSettings, RunSettings
from support import write_jsonl
from tiny_models import tiny_model

PROMPTS = ["the cat ", "in the other tin can on the throne, ", "the "]
GOOD, BAD = "ate the tin in the end", "on"
METHODS = ("sft", "lora", "reward", "dpo", "ppo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", help="model types; default: all")
    parser.add_argument("--out", type=Path, help="write the table there, as Markdown")
    arguments = parser.parse_args()
    kinds = arguments.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    folder = Path(tempfile.mkdtemp())
    pairs = [{"prompt": p, "chosen": GOOD, "rejected": BAD} for p in PROMPTS]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "answers.jsonl", [{"prompt": p, "completion": GOOD} for p in PROMPTS])
    (folder / "reward.py").write_text(
        "def score(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    rows = []
    for number, kind in enumerate(kinds, 1):
        began = time.perf_counter()
        row = judged(kind, folder)
        rows.append(row)
        spent = time.perf_counter() - began
        print(
            f"{number}/{len(kinds)} {kind}: {row['verdict']} ({spent:.0f} s) {row['why']}",
            flush=True,
        )
    counts = {v: sum(r["verdict"] == v for r in rows) for v in VERDICTS}
    print(", ".join(f"{n} {v}" for v, n in counts.items()))
    if arguments.out:
        arguments.out.write_text(table(rows, counts, arguments.kinds))
    sys.exit(1 if counts["wrong"] else 0)


VERDICTS = ("right", "right, slower sampling", "refused", "not built", "wrong")


def judged(kind: str, folder: Path) -> dict[str, str]:
    """The verdict on one architecture and, in a sentence, why."""
    where = folder / kind
    try:
        model = tiny_model(kind, where / "model")
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        with torch.no_grad():
            plain(input_ids=torch.arange(3, 11)[None])
    except Exception as error:
        why = f"no tiny model can be made of it: {type(error).__name__}"
        return {"kind": kind, "verdict": "not built", "why": why}
    finally:
        torch.set_default_dtype(torch.float32)
    verdict, why = "right", ""
    steps: list[tuple[str, Callable[[], str]]] = [
        ("sft", lambda: sft(model, plain, folder, where)),
        ("generate", lambda: generate(model, plain, folder, where)),
        ("lora", lambda: trained(fd.sft, lora_settings(model, folder, where))),
        ("reward", lambda: trained(fd.reward, reward_settings(model, folder, where))),
        ("dpo", lambda: dpo(model, plain, folder, where)),
        ("ppo", lambda: trained(fd.ppo, ppo_settings(model, folder, where))),
    ]
    refused = []
    for name, step in steps:
        try:
            found = step()
        except InputError as error:
            refused.append((name, str(error).replace(model, kind)))
            continue
        except Exception as error:
            verdict, why = "wrong", f"{name}: {type(error).__name__}: {str(error)[:200]}"
            break
        if found.startswith("slower"):
            verdict = "right, slower sampling"
        elif found:
            verdict, why = "wrong", f"{name}: {found}"
            break
    shutil.rmtree(where, ignore_errors=True)
    if verdict != "wrong" and refused:
        names = {name for name, _ in refused}
        why = f"{', '.join(name for name, _ in refused)}: {refused[0][1]}"
        verdict = "refused" if "sft" in names else verdict
    return {"kind": kind, "verdict": verdict, "why": why}


def common(model: str, data: Path, out: Path) -> dict[str, Any]:
    return {
        "model": model,
        "data": str(data),
        "out": str(out),
        "steps": 1,
        "batch_size": 3,
        "run": RunSettings(samples=1),
    }


def lora_settings(model: str, folder: Path, where: Path) -> Any:
    given = common(model, folder / "answers.jsonl", where / "lora")
    return fd.SFT(**given, lora=LoraSettings(r=2), max_new_tokens=4)


def reward_settings(model: str, folder: Path, where: Path) -> Any:
    return fd.RewardModel(**common(model, folder / "pairs.jsonl", where / "reward"))


def ppo_settings(model: str, folder: Path, where: Path) -> Any:
    given = common(model, folder / "answers.jsonl", where / "ppo")
    return fd.PPO(
        **given, reward=(f"{folder / 'reward.py'}:score",), max_new_tokens=6, minibatches=1
    )


def trained(method: Any, settings: Any) -> str:
    """One step; the run itself compares what it saves."""
    method(settings)
    return ""


def sft(model: str, plain: Any, folder: Path, where: Path) -> str:
    given = common(model, folder / "answers.jsonl", where / "sft")
    run = fd.sft(fd.SFT(**given, max_new_tokens=4))
    tokenizer = AutoTokenizer.from_pretrained(model)
    total = count = 0.0
    for prompt in PROMPTS:
        logp, labels = answer_logprobs(plain, tokenizer, prompt, GOOD)
        total, count = total - logp, count + labels
    return differs(first(run.path)["loss"], total / count, "the loss of the first step")


def dpo(model: str, plain: Any, folder: Path, where: Path) -> str:
    run = fd.dpo(fd.DPO(**common(model, folder / "pairs.jsonl", where / "dpo"), max_new_tokens=4))
    tokenizer = AutoTokenizer.from_pretrained(model)
    sums = [answer_logprobs(plain, tokenizer, p, GOOD)[0] for p in PROMPTS]
    said = first(run.path)["logps/chosen"]
    return differs(said, sum(sums) / len(sums), "log-probabilities of the chosen responses")


def generate(model: str, plain: Any, folder: Path, where: Path) -> str:
    """Greedy answers against transformers' own, each prompt alone."""
    out = where / "answers.jsonl"
    fd.generate(
        fd.Generate(
            model=model,
            prompts=str(folder / "answers.jsonl"),
            out=str(out),
            temperature=0.0,
            max_new_tokens=8,
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    for line, prompt in zip(out.read_text().splitlines(), PROMPTS, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            answer = plain.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=tokenizer.eos_token_id,
                forced_eos_token_id=None,  # translators end at the limit whatever they would say
                pad_token_id=0,
            )[0, ids.shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        said = json.loads(line)["completion"].replace(tokenizer.unk_token, "")
        if said != text:
            return f"greedy answers differ: {said!r}, {text!r}"
    policy = load_policy(model, LoraSettings(), RunSettings())
    prompts = [tokenizer(p).input_ids for p in PROMPTS]
    sampler, _ = agreeing_sampler(policy, prompts, SamplingParams(8))
    return "" if isinstance(sampler, LocalSampler) else "slower"


def answer_logprobs(plain: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """The sum of the log-probabilities of an answer and its EOS, in plain transformers."""
    start = tokenizer(prompt).input_ids
    labels = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([start + labels])
    with torch.no_grad():
        logp = plain(input_ids=ids).logits[0].float().log_softmax(-1)
    picked = logp[len(start) - 1 : -1].gather(-1, torch.tensor(labels)[:, None])
    return float(picked.sum()), len(labels)


def first(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return found


def differs(ours: float, theirs: float, what: str) -> str:
    if abs(ours - theirs) <= 1e-4 * max(1.0, abs(theirs)):
        return ""
    return f"{what} is {ours:.6g} here and {theirs:.6g} in plain transformers"


def table(rows: list[dict[str, str]], counts: dict[str, int], kinds: list[str]) -> str:
    named = "".join(f"{kind} " for kind in kinds)
    lines = [
        "# Architectures",
        "",
        f"Printed by `python benchmarks/architectures.py {named}--out docs/architectures.md`. For "
        f"{'these' if named else 'all'} causal architectures of the installed transformers: a tiny "
        "random model, the checks at the start of a run, and one step of `sft`, `sft` with LoRA, "
        "`reward`, `dpo` and `ppo`, compared with plain transformers.",
        "",
        ", ".join(f"{n} {v}" for v, n in counts.items()) + ".",
        "",
        "| architecture | verdict | why, or what else was refused |",
        "|---|---|---|",
    ]
    lines += [f"| {r['kind']} | {r['verdict']} | {r['why'].replace('|', '/')} |" for r in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
