"""What ends a response: everything that the tokenizer, its chat template and the model's configs
say, for every user of a sampler, and in what is saved.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from fiducial.errors import InputError
from fiducial.models.load import load_policy
from fiducial.models.roles import plain
from fiducial.models.save import save
from fiducial.rollout.local import local_sampler
from fiducial.rollout.sampling import Keys, never_ended, sampling_params
from fiducial.settings import LoraSettings, RowSettings, RunSettings
from fiducial.train.renderer import end_ids, load_renderer, same_ends
from fiducial.use.generate import generate
from fiducial.use.settings import Generate
from support import make_tokenizer, write_jsonl


def edit(folder, file, **values):
    path = Path(folder) / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, None, {2, 5}),
        ({"eos_token_id": 0}, {"eos_token_id": 63}, {0, 2, 63}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {2, 5, 6, 7}),
        ({"eos_token_id": None}, {"eos_token_id": [8, 9]}, {2, 8, 9}),
        ({"eos_token_id": None, "text_config": {"eos_token_id": [4]}}, None, {2, 4}),
        ({"eos_token_id": None, "vision_config": {"eos_token_id": 4}}, {}, {2}),
    ],
)
def test_the_ends_are_all_that_the_configs_say(make, config, generation, expected):
    folder = make("llama")
    edit(folder, "config.json", **config)
    (Path(folder) / "generation_config.json").unlink()
    if generation is not None:
        edit(folder, "generation_config.json", **generation)
    assert end_ids(folder, 64) | {2} == expected
    if "text_config" not in config and "vision_config" not in config:
        renderer = load_renderer(folder, RowSettings())
        assert renderer.ends == expected
        assert sampling_params(renderer, 4).stop_ids == expected
        assert sampling_params(renderer, 4, stop=("a",)).stop_ids == expected | {3}


@pytest.mark.parametrize("bad", [1_000_000_000, 64, -1, [2, 64], "x", True, 2.0])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_id_of_the_vocabulary_is_refused(make, file, bad):
    folder = make("llama")
    shown = bad[1] if isinstance(bad, list) else bad
    if file == "config.json":
        (Path(folder) / "generation_config.json").unlink()
    edit(folder, file, eos_token_id=bad)
    with pytest.raises(InputError, match=f"--model: {file} of .* at eos_token_id {shown!r}, which"):
        end_ids(folder, 64)


def test_the_end_of_a_turn_in_the_template_is_an_end_and_is_saved(make, tmp_path):
    folder = make("qwen3", eos_token_id=0)
    tokenizer = make_tokenizer("qwen3")
    tokenizer.eos_token = "<|endoftext|>"  # as of a base model whose template ends a turn otherwise
    tokenizer.save_pretrained(folder)
    renderer = load_renderer(folder, RowSettings())
    assert renderer.eos == 0 and renderer.ends == {0, 2}
    policy = load_policy(folder, LoraSettings(), RunSettings(), renderer.tokenizer)
    same_ends(plain(policy.lm), renderer)
    save(policy, renderer.tokenizer, tmp_path / "m", torch.tensor([[3, 4, 5]]))
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [0, 2]
    again = load_renderer(str(tmp_path / "m"), RowSettings())
    assert again.end_ids == {0, 2}


def test_a_chosen_end_is_saved_beside_those_of_the_model(make, tmp_path):
    folder = make("llama", eos_token_id=[2, 7])
    renderer = load_renderer(folder, RowSettings(eos_token="<s>"))
    assert renderer.ends == {1, 2, 7}
    policy = load_policy(folder, LoraSettings(), RunSettings(), renderer.tokenizer)
    save(policy, renderer.tokenizer, tmp_path / "m", torch.tensor([[3, 4, 5]]))
    assert set(GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id) == {1, 2, 7}


def test_responses_that_never_end_are_said(make, tmp_path, capsys):
    folder = make("llama")
    rows = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the cat"}] * 3)
    renderer = load_renderer(folder, RowSettings())
    policy = load_policy(folder, LoraSettings(), RunSettings(), renderer.tokenizer)
    sampler, keys = local_sampler(policy), Keys(0, 0, [0, 1, 2], [0, 0, 0])
    prompts = [renderer.prompt("the cat", "")] * 3

    def sampled(ends):
        params = sampling_params(renderer, 2)
        params = type(params)(2, 1.0, frozenset(ends))
        return never_ended(sampler.sample(prompts, params, keys), params, renderer)

    never = sampled([2])
    assert never.startswith("none of 3 sampled responses ended within 2 tokens; what ends one is")
    assert "</s>" in never and "--stop" in never
    assert sampled(range(64)) == ""
    generate(Generate(model=folder, prompts=rows, out=str(tmp_path / "o"), max_new_tokens=1))
    said = capsys.readouterr()
    lines = [json.loads(x) for x in (tmp_path / "o").read_text().splitlines()]
    assert ("none of 3 sampled responses" in said.err + said.out) == (
        not any(line["finished"] for line in lines)
    )


def test_the_ids_that_generate_writes_are_those_that_were_sampled(make, tmp_path):
    folder = make("llama")
    rows = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the cat"}, {"prompt": "a"}])
    generate(Generate(model=folder, prompts=rows, out=str(tmp_path / "o"), max_new_tokens=6))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = load_renderer(folder, RowSettings())
    for line in map(json.loads, (tmp_path / "o").read_text().splitlines()):
        ids = line["completion_ids"]
        assert len(ids) == line["tokens"] and line["tokenizer"] == renderer.fingerprint
        assert (ids[-1] == 2) == line["finished"]
        said = ids[: len(ids) - line["finished"]]
        assert tokenizer.decode(said) == line["completion"]
