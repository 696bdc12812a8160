"""Canaries: files from somewhere else that would run code, write elsewhere or steer the terminal.
Nothing of the kind happens, and a sentence says what was found.
"""

import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fiducial as fd
from fiducial.cli import main
from fiducial.data.row_types import Message
from fiducial.errors import InputError
from fiducial.models.load import load_policy, load_scorer, load_tokenizer
from fiducial.models.remote_code import brought
from fiducial.names import printable
from fiducial.settings import LoraSettings, RowSettings, RunSettings
from fiducial.train import checkpoint
from fiducial.train.progress import say
from fiducial.train.renderer import load_renderer
from fiducial.use.generate import generate
from fiducial.use.settings import Generate
from support import make_tokenizer, write_jsonl

CODE = """
import pathlib
pathlib.Path({canary!r}).write_text("ran")
from transformers import {base} as Base
class Mine(Base):
    model_type = "mine"
"""


@pytest.fixture
def canary(tmp_path):
    """A file that whatever runs would write."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file was run"


@pytest.fixture
def copy(models, tmp_path):
    """copy("llama"): a folder of its own to do harm in."""

    def made(kind="llama", name="model"):
        return Path(shutil.copytree(models[kind], tmp_path / name))

    return made


class Bomb:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def edit(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def settings(model, tmp_path, **changes):
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, ({"prompt": "the cat", "completion": f" sat {c}"} for c in "abcdefghij"))
    common = {"model": str(model), "data": str(rows), "out": str(tmp_path / "run"), "steps": 2}
    common |= {"batch_size": 2, "max_new_tokens": 4}
    return fd.SFT(**(common | {"run": RunSettings(checkpoint_every=1, samples=1)} | changes))


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """The settings of a finished run of two steps."""
    values = settings(models["llama"], tmp_path_factory.mktemp("trained"))
    fd.sft(values)
    return values


@pytest.fixture
def resumable(trained, tmp_path):
    """The settings that go on with a copy of that run, in a folder of its own to do harm in."""
    out = shutil.copytree(trained.out, tmp_path / "run")
    return trained.model_copy(update={"out": str(out), "resume": True, "steps": 3})


# ---- pickles ----


def test_a_pickle_of_weights_is_refused_with_what_to_do(copy, canary):
    folder = copy()
    (folder / "model.safetensors").unlink()
    others = {name: torch.ones(1) for name in "abc"}
    for ending in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        pickled = folder / f"pytorch_model{ending}"
        pickled.write_bytes(pickle.dumps(Bomb(canary)))
        for load in (
            lambda: load_policy(str(folder), LoraSettings(), RunSettings()),
            lambda: load_scorer(str(folder), LoraSettings(), RunSettings(), head="normal"),
        ):
            with pytest.raises(InputError, match=rf"model\{ending}, a pickle, .*safe_serial"):
                load()
        pickled.unlink()
        save_file(others, folder / "other.safetensors")  # not the model's, from the second on


def test_a_pickle_beside_the_weights_is_not_read(copy, canary, tmp_path):
    folder = copy()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
    fd.sft(settings(folder, tmp_path))


def test_an_adapter_in_a_pickle_is_refused(copy, canary, tmp_path):
    run = fd.sft(settings(copy(), tmp_path, lora=LoraSettings(r=2)))
    adapter = run.path / "model"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(canary)))
    save_file({"a": torch.ones(1)}, adapter / "x.safetensors")
    with pytest.raises(InputError, match=r"adapter_model.bin, a pickle, which could run code"):
        load_policy(str(adapter), LoraSettings(), RunSettings())


def sealed(folder):
    """A manifest that fits what is in a checkpoint now, as whoever changed it would write."""
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint.seal(folder)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "pytorch_model.bin"])
def test_a_checkpoint_with_a_pickle_that_runs_code_is_refused(resumable, canary, name):
    newest = Path(resumable.out, "checkpoints", "checkpoint-2")
    if name == "pytorch_model.bin":
        (newest / "model.safetensors").unlink()
    torch.save({"a": Bomb(canary)}, newest / name)
    sealed(newest)
    with pytest.raises(InputError, match=r"reading it could run code .*: remove this checkpoint"):
        fd.sft(resumable)


def test_random_states_that_cannot_be_restored_are_said(resumable):
    newest = Path(resumable.out, "checkpoints", "checkpoint-2")
    states = {"random_state": 1, "torch_manual_seed": torch.get_rng_state() ^ 1}
    torch.save(states, newest / "random_states_0.pkl")
    sealed(newest)
    with pytest.raises(InputError, match=r"random state in .* cannot be restored"):
        fd.sft(resumable)


# ---- code that a model brings ----


def with_code(folder, canary, config=True, tokenizer=True, known=False):
    """A folder that names its own classes in `auto_map`."""
    (folder / "mine.py").write_text(CODE.format(canary=str(canary), base="LlamaConfig"))
    net = CODE.format(canary=str(canary), base="LlamaForCausalLM")
    (folder / "net.py").write_text(
        f"from .mine import Mine as Config{net}    config_class = Config\n"
    )
    if config:
        names = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "net.Mine"}
        edit(folder / "config.json", auto_map=names, **({} if known else {"model_type": "mine"}))
    if tokenizer:
        (folder / "words.py").write_text(CODE.format(canary=str(canary), base="LlamaTokenizer"))
        edit(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["words.Mine", None]},
            tokenizer_class="Mine",
        )


VERBS = ("sft", "dpo", "reward", "prm", "ppo", "reinforce", "grpo", "distill")


@pytest.mark.parametrize("verb", [*VERBS, "collect", "label-steps", "generate", "eval"])
def test_a_model_that_needs_code_is_refused_by_every_verb(
    copy, canary, tmp_path, capsys, verb, data, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    folder = copy()
    with_code(folder, canary, tokenizer=False)
    rows = {"dpo": "pairs", "reward": "pairs", "prm": "completions", "sft": "completions"}
    args = [verb, "--model", str(folder), "--out", str(tmp_path / "out.jsonl")]
    args += ["--data" if verb in VERBS else "--prompts", data[rows.get(verb, "prompts")]]
    args += ["--reward", "length"] if verb in ("ppo", "reinforce", "grpo") else []
    args += ["--teacher", str(folder)] if verb == "distill" else []
    judge = tmp_path / "judge.py"
    judge.write_text("def f(completions, **columns):\n    return [1.0 for c in completions]\n")
    args += ["--judge", f"{judge}:f"] if verb in ("collect", "label-steps") else []
    assert main(args) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said == (
        f"fiducial: --model: {folder} needs Python code of its own, mine.py (auto_map in "
        "config.json), net.py (auto_map in config.json), which was not run: read it, and give "
        "--trust-remote-code if you trust its author"
    )


@pytest.mark.parametrize("flag", ["--judge", "--score", "--reference", "--teacher", "--reward"])
def test_and_so_is_every_other_model_of_a_command(
    copy, models, canary, tmp_path, capsys, flag, data
):
    other = copy(name="other")
    with_code(other, canary)
    verb = {"--teacher": "distill", "--reward": "ppo"}.get(flag, "eval")
    args = [verb, "--model", models["llama"], "--max-new-tokens", "4", flag, str(other)]
    args += ["--data" if verb != "eval" else "--prompts", data["prompts"]]
    args += ["--best-of", "2"] if flag == "--score" else []
    args += ["--out", str(tmp_path / "run")]
    assert main(args) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"fiducial: {flag}: {other} needs Python code of its own")


def test_code_that_is_not_needed_is_not_run_and_said(copy, canary, tmp_path, capsys):
    folder = copy()
    with_code(folder, canary, tokenizer=False, known=True)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(canary)!r}, 'w')\ndef generate(model, **keywords):\n    pass\n"
    )
    fd.sft(settings(folder, tmp_path))
    said = capsys.readouterr().err
    assert f"{folder} brings Python code of its own, mine.py (auto_map in config.json)" in said
    assert "which is not run: the classes of transformers are used" in said


def test_a_tokenizer_that_needs_code_is_refused(copy, canary):
    folder = copy()
    with_code(folder, canary, config=False)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"words.py \(auto_map in tokenizer_config.json\)"):
        load_tokenizer(str(folder))


def test_the_flag_runs_the_code_and_what_is_saved_loads_with_it(copy, tmp_path, capsys):
    ran, folder = tmp_path / "ran", copy()
    with_code(folder, ran, tokenizer=False)
    run = fd.sft(settings(folder, tmp_path, trust_remote_code=True))
    assert ran.exists() and "is not run" not in capsys.readouterr().err
    saved = run.path / "model"
    assert brought(str(saved)) and (saved / "net.py").exists()
    with pytest.raises(InputError, match="needs Python code of its own"):
        load_policy(str(saved), LoraSettings(), RunSettings())
    load_policy(str(saved), LoraSettings(), RunSettings(), trust=True)


def test_where_code_is_named_in_any_form(tmp_path):
    edit(tmp_path / "config.json", auto_map={"A": "them/repo--code.A", "B": ["a.b.C", None]})
    edit(tmp_path / "tokenizer_config.json", auto_map=7)
    assert brought(str(tmp_path)) == [
        "code.py of them/repo (auto_map in config.json)",
        "a.b.py (auto_map in config.json)",
    ]


# ---- templates, YAML ----


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ messages.append(1) }}",
        "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{{ self._TemplateReference__context.eval_ctx.environment.overlay() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ raise_exception.__globals__['os'] }}",
    ],
)
def test_a_chat_template_that_reaches_for_more_is_refused(copy, canary, template):
    folder = copy("qwen3")
    (folder / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    renderer = load_renderer(str(folder), RowSettings())
    with pytest.raises(InputError, match="f:1: the chat template refuses"):
        renderer.prompt((Message("user", "the cat"),), "f:1")


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/new:os.system", "name:os.system", "module:os"]
)
def test_tags_of_yaml_make_nothing(tmp_path, canary, capsys, models, tag):
    text = f"model: !!python/{tag} ['touch {canary}']\n"
    (tmp_path / "c.yaml").write_text(text)
    assert main(["sft", "--config", str(tmp_path / "c.yaml"), "--data", "d"]) == 2
    said = capsys.readouterr().err
    assert "c.yaml:1: not YAML: could not determine a constructor for the tag" in said
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"method: sft\n{text}")
    assert main(["sft", "--model", "m", "--data", "d", "--out", str(run), "--resume"]) == 2
    assert main(["report", str(run)]) in (0, 2)


# ---- names and links ----


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "x\x1b[2J.safetensors",
        5,
    ],
)
def test_an_index_that_names_files_elsewhere_is_refused(copy, tmp_path, name):
    folder = copy()
    os.rename(folder / "model.safetensors", tmp_path / "outside.safetensors")
    weights = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, folder / "model-1.safetensors")
    with pytest.raises(
        InputError, match=r"index.json names .*in the folder itself alone" if name != 5 else "index"
    ):
        load_policy(str(folder), LoraSettings(), RunSettings())


def test_an_index_of_files_beside_it_and_the_links_of_a_cache_are_read(copy, tmp_path):
    """Hugging Face's own cache is a folder of links to files elsewhere."""
    folder = copy()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        os.rename(path, blobs / str(i))
        path.symlink_to(blobs / str(i))
    load_policy(str(folder), LoraSettings(), RunSettings())
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_policy(str(folder), LoraSettings(), RunSettings())


def test_a_resumed_run_does_not_write_through_links(resumable, tmp_path):
    run, outside = Path(resumable.out), tmp_path / "outside"
    for name in (
        *("metrics.jsonl", "samples.jsonl", "summary.json", "config.yaml"),
        *("model", "checkpoints", "checkpoints/checkpoint-1"),
    ):
        os.rename(run / name, outside)
        (run / name).symlink_to(outside)
        before = outside.read_bytes() if outside.is_file() else sorted(outside.iterdir())
        with pytest.raises(InputError, match=f"{name} is a link to .*outside, out of the run"):
            fd.sft(resumable)
        assert before == (outside.read_bytes() if outside.is_file() else sorted(outside.iterdir()))
        (run / name).unlink()
        os.rename(outside, run / name)
    (run / "notes").symlink_to(run / "model")  # leads nowhere else
    assert fd.sft(resumable).step == 3


EVIL = "a\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eb"
NEUTRAL = r"a\u001b]0;owned\u0007\u001b[2J\u000d\u009b31m\u202eb"


def clean(text):
    return not any(c in text for c in "\x1b\x07\r\x9b\u202e")


def test_what_is_printed_moves_no_cursor(capsys, tmp_path, copy, data):
    say(EVIL)
    assert capsys.readouterr().err == f"{NEUTRAL}\n" and printable("a\tb\né 你") == "a\tb\né 你"
    rows, folder = str(tmp_path / "rows.jsonl"), str(copy(name=EVIL))
    write_jsonl(Path(rows), [{"prompt": "a", EVIL: 1, f"x\nfiducial: done {EVIL}": 2}])
    resumed = ["--prompts", data["prompts"], "--out", f"{tmp_path}/{EVIL}\n", "--resume"]
    for args in (
        ["sft", "--data", rows, "--model", folder],
        ["sft", "--data", f"{tmp_path}/{EVIL}.jsonl", "--model", folder],
        ["sft", "--data", data["completions"], "--model", f"./{EVIL}\nfiducial: done"],
        [EVIL],
        ["sft", f"--{EVIL}"],
        ["generate", "--model", folder, *resumed],
    ):
        assert main(args) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert clean(said) and said.startswith("fiducial: ")


def test_answers_on_the_terminal_are_rows_without_control_characters(copy, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    write_jsonl(prompts, [{"prompt": f"the cat{EVIL}"}])
    values = Generate(model=str(copy()), prompts=str(prompts), max_new_tokens=3)
    generate(values)
    (line,) = capsys.readouterr().out.splitlines()
    assert clean(line) and json.loads(line)["prompt"] == f"the cat{EVIL}"


def test_a_page_of_a_run_with_evil_names_is_text(copy, tmp_path):
    folder = copy(name="<img src=x onerror=alert(1)>")
    run = fd.sft(settings(folder, tmp_path, out=str(tmp_path / "<script>alert(2)<")))
    html = (run.path / "report.html").read_text()
    assert "<img src=x" not in html and "<script>alert" not in html


# ---- the tokenizer of another model ----


def test_a_tokenizer_that_was_swapped_in_a_saved_folder_is_refused(copy, tmp_path):
    for name, changes in (("full", {}), ("lora", {"lora": LoraSettings(r=2)})):
        run = fd.sft(
            settings(copy(name=name), tmp_path, out=str(tmp_path / f"run {name}"), **changes)
        )
        saved = run.path / "model"
        load_renderer(str(saved), RowSettings())
        text = (saved / "tokenizer.json").read_text()
        other = json.loads(text)
        words = other["model"]["vocab"]
        words["x"], words["y"] = words["y"], words["x"]  # as many tokens as before
        (saved / "tokenizer.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=r"is not the one that the model was saved with: copy"):
            load_renderer(str(saved), RowSettings())
        (saved / "fiducial.json").unlink()
        load_renderer(str(saved), RowSettings())


def test_an_end_that_the_tokenizer_has_as_text_is_said(copy, capsys):
    folder = copy("llama")
    load_renderer(str(folder), RowSettings())
    assert "plain text" not in capsys.readouterr().err
    make_tokenizer("gpt2").save_pretrained(folder)  # its token 2 is a letter
    load_renderer(str(folder), RowSettings())
    assert "ends a response at token 2, which its tokenizer has as plain text, 'b'" in (
        capsys.readouterr().err
    )


# ---- the network ----


def test_the_tests_themselves_reach_nothing(no_network):
    with socket.socket() as own:
        for reach in (
            lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
            lambda: socket.getaddrinfo("huggingface.co", 443),
            lambda: own.bind(("0.0.0.0", 0)),
            lambda: own.connect_ex(("192.0.2.1", 80)),
        ):
            no_network.clear()
            with pytest.raises(OSError, match="the tests open no socket"):
                reach()
            assert no_network
    no_network.clear()
    with socket.create_server(("127.0.0.1", 0)) as server:  # processes of a group meet here
        socket.create_connection(server.getsockname()).close()


def test_a_run_and_its_page_from_local_files_open_no_socket(
    copy, tmp_path, data, no_network, monkeypatch
):
    import huggingface_hub.constants

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    run = fd.sft(settings(copy(), tmp_path))
    assert main(["report", str(run.path)]) == 0
    values = {"model": str(run.path / "model"), "prompts": data["prompts"], "max_new_tokens": 2}
    generate(Generate(**values, out=str(tmp_path / "g.jsonl")))
    lora = {"lora": LoraSettings(r=2), "out": str(tmp_path / "lora")}
    adapter = fd.sft(settings(tmp_path / "model", tmp_path, **lora)).path / "model"
    load_policy(str(adapter), LoraSettings(), RunSettings())
    for name in ("./none", str(tmp_path / "none"), "a/b/c", "~/none"):
        with pytest.raises(InputError, match="there is no folder"):
            fd.sft(settings(name, tmp_path, out=str(tmp_path / "other")))
    assert no_network == []
