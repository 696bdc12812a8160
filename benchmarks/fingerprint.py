"""Prints a SHA-256 of what every verb computes on tiny models with fixed seeds: final weights,
metrics without times, samples, written files.

    python benchmarks/fingerprint.py > after.txt && diff benchmarks/fingerprint.txt after.txt

A change that is meant to change no result prints the same lines. The digits belong to one build of
torch on one kind of processor, so make the first file on the machine where the second is made:
benchmarks/fingerprint.txt is kept as an example. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

REWARD = """
def score(completions, **columns):
    return [c.count("e") + len(c) / 10 for c in completions]

def some(completions, number, **columns):
    return [0.0 if n % 3 == 2 else s for n, s in zip(number, score(completions))]

def first(prompts, first, second, **columns):
    return [len(a) >= len(b) for a, b in zip(first, second)]
"""
COMMON = (
    "--steps 4 --learning-rate 1e-2 --batch-size 4 --optimizer.schedule constant "
    "--run.eval-every 2 --run.samples 3"
)
OFFLINE = f"{COMMON} --rows.held-out 0.3"
ONLINE = (
    f"{COMMON} --data {{data}}/prompts.jsonl --max-new-tokens 6 --reward {{data}}/reward.py:score"
)
KL = "--kl.target 0.1 --kl.horizon 20 --score.normalise first"

TRAININGS = {  # name: (verb, model, flags); {out} is the folder of all runs
    "sft-text": ("sft", "llama", f"{OFFLINE} --data {{data}}/texts.jsonl --max-new-tokens 4"),
    "sft-chat": (
        "sft",
        "qwen3",
        f"{OFFLINE} --data {{data}}/messages.jsonl --max-new-tokens 4 --run.tokens 64",
    ),
    "sft-completion": (
        "sft",
        "gpt2",
        f"{OFFLINE} --data {{data}}/completions.jsonl --max-new-tokens 4 "
        "--optimizer.warmup-steps 2",
    ),
    "sft-lora": (
        "sft",
        "llama",
        f"{OFFLINE} --data {{data}}/completions.jsonl --max-new-tokens 4 --lora.r 2",
    ),
    "reward": ("reward", "gpt2", f"{OFFLINE} --data {{data}}/ranked.jsonl --centering 0.01"),
    "reward-lora": ("reward", "llama", f"{OFFLINE} --data {{data}}/pairs.jsonl --lora.r 2"),
    "prm": ("prm", "gpt2", f"{OFFLINE} --data {{data}}/steps.jsonl"),
    "prm-outcomes": (
        "prm",
        "llama",
        f"{OFFLINE} --data {{data}}/outcomes.jsonl --lora.r 2 --aggregate min",
    ),
    "dpo": (
        "dpo",
        "gpt2",
        f"{OFFLINE} --data {{data}}/pairs.jsonl --max-new-tokens 4 --label-smoothing 0.1",
    ),
    "dpo-lora": (
        "dpo",
        "llama",
        f"{OFFLINE} --data {{data}}/pairs.jsonl --max-new-tokens 4 --lora.r 2",
    ),
    "dpo-qwen3": (
        "dpo",
        "qwen3",
        f"{OFFLINE} --data {{data}}/pairs.jsonl --max-new-tokens 4 --run.tokens 64",
    ),
    "ppo": ("ppo", "gpt2", f"{ONLINE} --epochs 2 --minibatches 2 {KL}"),
    "ppo-shared": (
        "ppo",
        "llama",
        f"{ONLINE} --critic.start shared --ptx.data {{data}}/texts.jsonl --target-kl 0.02 --epochs "
        "3",
    ),
    "ppo-lora": (
        "ppo",
        "llama",
        f"{ONLINE} --lora.r 2 --score.missing-eos-penalty 1 --temperature 0.7",
    ),
    "ppo-model": ("ppo", "gpt2", f"{ONLINE} --reward {{out}}/reward/model --reward-weights 0.5 1"),
    "ppo-loss-kl": (
        "ppo",
        "qwen3",
        f"{ONLINE} --kl.estimator k2 --score.length-buffer 2 --no-whiten",
    ),
    "ppo-process": (
        "ppo",
        "gpt2",
        f"{ONLINE} --reward {{out}}/prm/model --critic.learning-rate 1e-3",
    ),
    "rloo": ("reinforce", "gpt2", f"{ONLINE} --group-size 2 {KL}"),
    "remax": (
        "reinforce",
        "llama",
        f"{ONLINE} --baseline remax --group-size 1 --lora.r 2 --score.normalise batch",
    ),
    "reinforce-mean": (
        "reinforce",
        "qwen3",
        f"{ONLINE} --baseline mean --group-size 1 --kl.estimator k2_tokens",
    ),
    "reinforce++": (
        "reinforce",
        "gpt2",
        f"{ONLINE} --baseline reinforce++ --group-size 1 --long.correction tis "
        "--long.mask-truncated",
    ),
    "reinforce-process": (
        "reinforce",
        "gpt2",
        f"{ONLINE} --baseline none --group-size 1 --reward {{out}}/prm/model --credit {{to_go}}",
    ),
    "grpo": ("grpo", "gpt2", f"{ONLINE} --group-size 2 --minibatches 2 --epochs 2 {{stale}} 0.1"),
    "dr-grpo": (
        "grpo",
        "llama",
        f"{ONLINE} --group-size 2 --variant dr_grpo --beta 0.05 --lora.r 2",
    ),
    "dapo": (
        "grpo",
        "gpt2",
        f"{ONLINE} --group-size 2 --variant dapo --reward {{data}}/reward.py:some --beta 0.05",
    ),
    "gspo": (
        "grpo",
        "qwen3",
        f"{ONLINE} --group-size 2 --variant gspo --minibatches 2 --long.correction sequence_tis",
    ),
    "cispo": (
        "grpo",
        "llama",
        f"{ONLINE} --group-size 2 --variant cispo --epochs 2 --stop e --long.correction icepop",
    ),
    "distill": (
        "distill",
        "gpt2",
        f"{COMMON} --data {{data}}/prompts.jsonl --max-new-tokens 6 --teacher {{data}}/teacher "
        "--discount 0.5 --eval-samples 4",
    ),
    "distill-sampled": (
        "distill",
        "gpt2",
        f"{COMMON} --data {{data}}/prompts.jsonl --max-new-tokens 6 --teacher {{data}}/teacher "
        "--estimator sampled "
        "--eval-samples 4 --lora.r 2",
    ),
}
TWO = (
    "sft-completion",
    "reward",
    "prm",
    "dpo",
    "dpo-lora",
    "ppo",
    "ppo-lora",
    "rloo",
    "grpo",
    "dapo",
    "distill",
)
"""Run with two processes too."""
RESUMED = ("sft-completion", "reward", "prm", "dpo-lora", "ppo", "rloo", "dapo", "distill")
"""Stopped after two steps and gone on with."""
SAMPLED = "--max-new-tokens 5 --samples 2"
OTHERS = {  # name: (verb, flags, where its answer is)
    "generate": (
        "generate",
        f"--model {{out}}/sft-completion/model --prompts {{data}}/prompts.jsonl {SAMPLED} --out "
        f"{{out}}/generate.jsonl",
        "generate.jsonl",
    ),
    "generate-best": (
        "generate",
        f"--model {{out}}/ppo/model --prompts {{data}}/prompts.jsonl {SAMPLED} --best-of 3 --score "
        f"{{out}}/reward/model "
        "--out {out}/best.jsonl",
        "best.jsonl",
    ),
    "generate-prm": (
        "generate",
        f"--model {{out}}/ppo/model --prompts {{data}}/prompts.jsonl {SAMPLED} --best-of 2 --score "
        f"{{out}}/prm/model "
        "--aggregate product --out {out}/best-prm.jsonl",
        "best-prm.jsonl",
    ),
    "collect": (
        "collect",
        f"--model {{data}}/gpt2 --prompts {{data}}/prompts.jsonl {SAMPLED} --judge "
        f"{{data}}/reward.py:score --out {{out}}/pairs.jsonl",
        "pairs.jsonl",
    ),
    "collect-compare": (
        "collect",
        f"--model {{data}}/qwen3 --prompts {{data}}/prompts.jsonl {SAMPLED} --judge "
        f"{{data}}/reward.py:first "
        "--out {out}/compared.jsonl",
        "compared.jsonl",
    ),
    "label-steps": (
        "{label_steps}",
        "--model {data}/gpt2 --prompts {data}/prompts.jsonl --max-new-tokens 12 --samples 2 "
        "{completions} 2 --separator e "
        "--judge {data}/reward.py:score --threshold 1.5 --out {out}/labelled.jsonl",
        "labelled.jsonl",
    ),
    "eval": (
        "eval",
        f"--model {{out}}/ppo/model --baseline {{data}}/gpt2 --reference {{data}}/gpt2 --prompts "
        f"{{data}}/prompts.jsonl {SAMPLED} "
        "--judge {out}/reward/model --out {out}/eval.json",
        "eval.json",
    ),
    "eval-best": (
        "eval",
        f"--model {{data}}/gpt2 --baseline {{data}}/llama --prompts {{data}}/prompts.jsonl "
        f"{SAMPLED} --judge {{data}}/reward.py:first "
        "--best-of 2 --score {data}/reward.py:score --out {out}/eval-best.json",
        "eval-best.json",
    ),
}
WORDS = {
    "to_go": "reward_to_go",
    "stale": "--off-policy-mask",
    "label_steps": "label-steps",
    "completions": "--completions",
}
"""Names of the command line that stand in the flags above in braces."""


def prepare(folder: Path) -> None:
    """Models, rows and a reward function."""
    from support import BAD, GOOD, PROMPTS, make_model, write_jsonl

    for kind in ("gpt2", "llama", "qwen3"):
        make_model(kind, folder / kind)
    make_model("gpt2", folder / "teacher", n_layer=3)
    (folder / "reward.py").write_text(REWARD)
    triples = list(zip(PROMPTS, GOOD, BAD, strict=True))

    def chat(*texts: str) -> list[dict[str, str]]:
        return [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]

    rows: dict[str, Iterable[dict[str, object]]] = {
        "texts": ({"text": p + g} for p, g, _ in triples),
        "messages": ({"messages": chat(p, g, p, b)} for p, g, b in triples),
        "completions": ({"prompt": p, "completion": g} for p, g, _ in triples),
        "pairs": ({"prompt": p, "chosen": g, "rejected": b} for p, g, b in triples),
        "ranked": (
            {"prompt": p, "chosen": g, "rejected": b + "z" * k}
            for p, g, b in triples
            for k in range(1 + len(p) % 3)
        ),
        "steps": (
            {"prompt": p, "completions": [g, b, g], "labels": [True, len(g) % 2 == 1, True]}
            for p, g, b in triples
        ),
        "outcomes": (
            {"prompt": p, "completion": g + "\n" + b, "label": len(g) % 2 == 1}
            for p, g, b in triples
        ),
        "prompts": ({"prompt": p, "number": i} for i, p in enumerate(PROMPTS)),
    }
    for name, some in rows.items():
        write_jsonl(folder / f"{name}.jsonl", some)


def in_child(arguments: list[str]) -> None:
    """One command in a process of its own that has trained nothing before."""
    child = os.fork()
    if child == 0:
        from fiducial.cli import main

        quiet = os.open(
            os.environ.get("FINGERPRINT_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(main(arguments))
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"fiducial {' '.join(arguments)}: exit code {code}")


def in_two(arguments: list[str]) -> None:
    """One command in two processes."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "fiducial",
        *arguments,
    ]
    done = subprocess.run(
        launch, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
    )
    if done.returncode:
        sys.exit(f"{' '.join(launch)}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def weights(folder: Path) -> str:
    """Over names, shapes, types and bytes of all tensors."""
    import torch
    from safetensors.torch import load_file

    state = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            state.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]


def metrics(path: Path) -> str:
    """Over the lines of metrics.jsonl without what the clock says, names in alphabetical order."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "-" * 16


def show(name: str, run: Path) -> None:
    print(
        f"{name:<24} weights {weights(run / 'model')}  metrics {metrics(run / 'metrics.jsonl')}  "
        f"samples {file(run / 'samples.jsonl')}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--keep", type=Path, help="a folder for models, rows and runs; default: a temporary one"
    )
    parser.add_argument(
        "--only",
        default="",
        help="of the jobs, those whose names contain this; what they build on must be there",
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        top = given.keep or Path(temporary)
        data, out = top / "data", top / "runs"
        os.environ["FIDUCIAL_CACHE"] = str(top / "cache")
        data.mkdir(parents=True, exist_ok=True)
        prepare(data)
        import fiducial.methods.dpo  # once for all children  # noqa: F401

        def arguments(verb: str, flags: str, **changes: object) -> list[str]:
            return [
                verb.format(**WORDS),
                *flags.format(data=data, out=out, **WORDS).split(),
                *(str(x) for k, v in changes.items() for x in (f"--{k}", v)),
            ]

        for name, (verb, model, flags) in TRAININGS.items():
            if given.only in name:
                in_child(arguments(verb, flags, model=data / model, out=out / name))
                show(name, out / name)
        for name in RESUMED:
            if given.only in name:
                verb, model, flags = TRAININGS[name]
                some = flags.replace("--steps 4", "--steps 2")
                where = out / f"{name}-resumed"
                in_child(
                    [
                        *arguments(verb, some, model=data / model, out=where),
                        "--run.checkpoint-every",
                        "1",
                    ]
                )
                in_child([verb, "--out", str(where), "--resume", "--steps", "4"])
                show(f"{name} resumed", where)
        for name, (verb, flags, answer) in OTHERS.items():
            if given.only in name:
                in_child(arguments(verb, flags))
                print(f"{name:<24} file    {file(out / answer)}", flush=True)
        for name in TWO:
            if given.only in name:
                verb, model, flags = TRAININGS[name]
                in_two(arguments(verb, flags, model=data / model, out=out / f"{name}-two"))
                show(f"{name} in two", out / f"{name}-two")


if __name__ == "__main__":
    main()
