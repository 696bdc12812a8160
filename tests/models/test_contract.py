"""The checks at the start of a run, on families that people train and with each guard broken.

The independent truth is plain transformers: `forward(...).logits` of one row, alone.
"""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
)

from fiducial.data.render import Rendered
from fiducial.errors import InputError
from fiducial.methods.dpo import Pair, agree_when_shared, pair_logprobs
from fiducial.models import roles as roles_module
from fiducial.models import trunk as trunk_module
from fiducial.models.contract import check_policy, check_roles, check_scorer, probe_rows
from fiducial.models.load import SHARED, load_policy, load_roles, load_scorer, load_teacher
from fiducial.models.roles import Policy, Roles
from fiducial.models.save import save
from fiducial.models.trunk import context, plain, trunk
from fiducial.rollout import local as local_module
from fiducial.rollout.agreement import agreeing_sampler, check_online
from fiducial.rollout.generated import GenerateSampler
from fiducial.rollout.local import LocalSampler
from fiducial.rollout.sampling import Keys, SamplingParams
from fiducial.settings import LoraSettings, RunSettings
from support import make_tokenizer
from tiny_models import WINDOW, tiny_model

FULL, RUN, CPU = LoraSettings(), RunSettings(), torch.device("cpu")
CHECKPOINTED = RunSettings(gradient_checkpointing=True)
PROMPTS = [[5, 9, 30, 17], [7, 8, 9, 10, 11, 12, 13], [50, 51, 52, *[60, 61] * 8]]
PARAMS = SamplingParams(max_new_tokens=24)
FAST = [
    *("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma3", "phi3"),
    *("mistral", "gpt2", "gpt_neox", "olmo2", "deepseek_v3", "gpt_oss", "llama4_text"),
    *("falcon", "lfm2"),
]
SLOW = ["mamba2", "qwen3_5_text", "openai-gpt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder("gemma3"): a tiny random model of this type, made once."""
    made: dict[str, str] = {}

    def get(kind, **changes):
        key = kind + str(changes)
        if key not in made:
            made[key] = tiny_model(kind, tmp_path_factory.mktemp(kind), **changes)
        return made[key]

    return get


@pytest.fixture
def copy(folder, tmp_path):
    """copy("llama"): a folder whose weights a test may spoil."""
    return lambda kind, **more: Path(shutil.copytree(folder(kind, **more), tmp_path / kind))


@torch.no_grad()
def alone(model, ids):
    """[T-1] log-probabilities of one row in plain transformers."""
    row = torch.tensor([ids])
    logp = model.eval()(input_ids=row).logits[0, :-1].float().log_softmax(-1)
    return logp.gather(-1, row[0, 1:, None])[:, 0]


def sampled(sampler, prompts=PROMPTS, **params):
    keys = Keys(3, 0, list(range(len(prompts))), [0] * len(prompts))
    return sampler.sample(prompts, SamplingParams(**{"max_new_tokens": 24, **params}), keys)


# Families that people train
# ------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAST, *SLOW])
def test_trainer_and_sampler_say_what_plain_transformers_says(folder, kind):
    plain = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32)
    policy = load_policy(folder(kind), FULL, RUN)
    sampler, said = check_online(Roles(policy=policy), PROMPTS, PARAMS, None, {"model": kind})
    assert isinstance(sampler, LocalSampler if kind in FAST else GenerateSampler)
    assert ("slower" in said) == (kind in SLOW)
    prompts = [*PROMPTS, PROMPTS[0]]
    drawn = sampled(sampler, prompts)
    assert max(map(len, drawn.responses())) + len(PROMPTS[2]) > 2 * WINDOW
    for row, prompt in enumerate(prompts):
        segment = drawn.segments(row)[1]
        theirs = alone(plain, prompt + segment.ids)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(segment.logprobs), theirs, atol=1e-4, rtol=0)


def test_an_architecture_that_looks_ahead_is_refused(folder):
    policy = load_policy(folder("bert"), FULL, RUN)
    with pytest.raises(InputError, match=r"BertLMHeadModel of .* gives other log-probabilities"):
        check_roles(Roles(policy=policy), PROMPTS, 40, {"model": "bert"})


def test_both_samplers_draw_the_same_tokens(folder):
    policy = load_policy(folder("llama"), FULL, RUN)
    fast, slow = (sampled(kind(policy, 128)) for kind in (LocalSampler, GenerateSampler))
    assert fast.responses() == slow.responses()
    torch.testing.assert_close(fast.logprobs, slow.logprobs, atol=1e-5, rtol=0)
    stop = frozenset({fast.responses()[0][3]})
    ended = sampled(GenerateSampler(policy, 128), stop_ids=stop)
    assert ended.responses() == sampled(LocalSampler(policy, 128), stop_ids=stop).responses()
    assert bool(ended.finished[0]) and int(ended.response_lengths[0]) <= 4


def test_generate_ignores_the_model_s_own_sampling_settings(copy):
    model = copy("llama")
    before = sampled(GenerateSampler(load_policy(str(model), FULL, RUN), 128)).responses()
    text = '{"repetition_penalty": 9.0, "do_sample": true, "top_k": 2, "eos_token_id": 7}'
    (model / "generation_config.json").write_text(text)
    policy = load_policy(str(model), FULL, RUN)
    assert sampled(GenerateSampler(policy, 128)).responses() == before
    assert policy.lm.generation_config.repetition_penalty == 9.0  # and it is kept for its users


# 1. Weights
# ------------------------------------------------------------


def rewritten(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return str(folder)


def without(tensors, part):
    return {name: t for name, t in tensors.items() if part not in name}


SPOILT = {
    "deleted": (
        lambda t: without(t, "layers.1.mlp.up_proj"),
        "lacks 1 of the weights .*up_proj.weight",
    ),
    "renamed": (
        lambda t: {f"other.{name}": x for name, x in t.items()},
        r"lacks \d+ of the weights .*holds \d+ tensors that .* does not use: other",
    ),
    "extra": (lambda t: t | {"model.extra.weight": torch.ones(2)}, "does not use: model.extra"),
    "integer": (
        lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.int32)},
        r"no floating-point numbers: model.norm.weight \(I32\)",
    ),
    "not a number": (
        lambda t: t | {"model.norm.weight": torch.full((32,), torch.nan)},
        "not finite: model.norm.weight",
    ),
    "shape": (
        lambda t: t | {"model.norm.weight": torch.ones(16)},
        r"model.norm.weight \(16 in the folder, 32 in the model\)",
    ),
}
LOADERS = {
    "policy": lambda f: load_policy(f, FULL, RUN),
    "new scorer": lambda f: load_scorer(f, FULL, RUN, head="normal"),
    "adapters": lambda f: load_policy(f, LoraSettings(r=2), RUN),
}


@pytest.mark.parametrize("role", LOADERS)
@pytest.mark.parametrize("how", SPOILT)
def test_weights_that_are_missing_unused_or_no_numbers_are_refused_by_name(copy, role, how):
    change, said = SPOILT[how]
    with pytest.raises(InputError, match=said):
        LOADERS[role](rewritten(copy("llama"), change))


def test_every_other_role_reads_its_folder_as_strictly(folder, copy, tmp_path):
    spoilt = rewritten(copy("llama"), SPOILT["deleted"][0])
    tokenizer = make_tokenizer("llama")
    policy = load_policy(folder("llama"), FULL, RUN)
    with pytest.raises(InputError, match=r"--teacher: .* lacks 1 of the weights"):
        load_teacher(spoilt, policy, tokenizer, 32, RUN)
    with pytest.raises(InputError, match="lacks 1 of the weights"):
        load_roles(folder("llama"), FULL, RUN, tokenizer, CPU, critic=spoilt)
    scorer = load_scorer(folder("llama"), FULL, RUN, head="normal", tokenizer=tokenizer)
    tokenizer.pad_token = "<unk>"
    scorer.model.config.pad_token_id = 0
    save(scorer, tokenizer, tmp_path / "reward", torch.tensor([PROMPTS[0]]))
    load_scorer(str(tmp_path / "reward"), FULL, RUN, head="saved")
    rewritten(tmp_path / "reward", lambda t: without(t, "score"))
    with pytest.raises(InputError, match=r"lacks 1 of the weights .*score.weight"):
        load_scorer(str(tmp_path / "reward"), FULL, RUN, head="saved")


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "olmo2", "gemma3_text"])
def test_a_scorer_starts_from_any_language_model_and_drops_its_head(folder, kind):
    scorer = load_scorer(folder(kind), FULL, RUN, head="normal")
    assert check_scorer(scorer, PROMPTS, kind, "--model") < 1e-5


def test_a_reward_model_s_folder_is_no_policy(folder, tmp_path):
    scorer = load_scorer(folder("qwen3", tie_word_embeddings=True), FULL, RUN, head="normal")
    scorer.model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"does not use: score.weight"):
        load_policy(str(tmp_path), FULL, RUN)


@pytest.mark.parametrize("lost", ["layers.0.self_attn.q_proj.lora_A", "lora_"])
def test_an_adapter_that_lacks_tensors_is_refused(folder, tmp_path, lost):
    base = AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32)
    adapter = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(tmp_path)
    load_policy(str(tmp_path), FULL, RUN)
    path = tmp_path / "adapter_model.safetensors"
    left = load_file(path)
    if lost == "lora_":  # all of them under other names
        left = {name.replace("layers", "blocks"): t for name, t in left.items()}
    else:
        left = without(left, lost)
    save_file(left, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the adapter .* lacks \d+ of the weights"):
        load_policy(str(tmp_path), FULL, RUN)


def test_a_bias_may_forbid_a_token(copy):
    forbidden = torch.zeros(64)
    forbidden[60:] = -torch.inf
    model = copy("phi")
    rewritten(model, lambda t: t | {"lm_head.bias": forbidden})
    policy = load_policy(str(model), FULL, RUN)
    sampler, _ = check_online(Roles(policy=policy), PROMPTS[:2], PARAMS, None, {"model": "phi"})
    assert max(max(r) for r in sampled(sampler, PROMPTS[:2]).responses()) < 60


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_the_first_kl_is_exactly_zero_in_any_precision(folder, kind, rank, precision):
    run = RunSettings(precision=precision)
    tokenizer = make_tokenizer("llama")
    roles = load_roles(folder(kind), LoraSettings(r=rank), run, tokenizer, CPU, critic=None)
    check_roles(roles, PROMPTS, 40, {"model": kind})
    with torch.no_grad():  # a reference that is rounded further is found
        own = roles.policy.lm if rank == 0 else None
        if own is not None:
            own.get_input_embeddings().weight.mul_(1.001)
            with pytest.raises(InputError, match="policy and reference differ before the first"):
                check_roles(roles, PROMPTS, 40, {"model": kind})


# 2. The trainer
# ------------------------------------------------------------


def broken_head(monkeypatch):
    known = Policy._head
    monkeypatch.setattr(Policy, "_head", lambda self, hidden: known(self, hidden) * 1.1)


def broken_positions(monkeypatch):
    known = roles_module.hidden_states

    def shifted(model, ids, precision, layout=None):
        return known(model, torch.roll(ids, 1, 1), precision, layout)

    monkeypatch.setattr(roles_module, "hidden_states", shifted)


@pytest.mark.parametrize("broken", [broken_head, broken_positions])
def test_a_trainer_that_computes_something_else_is_refused(folder, monkeypatch, broken):
    policy = load_policy(folder("llama"), FULL, RUN)
    assert check_policy(policy, probe_rows(PROMPTS, 40), "m", "--model") < 1e-5
    broken(monkeypatch)
    with pytest.raises(InputError, match="--model: LlamaForCausalLM of m gives other log-prob"):
        check_policy(policy, probe_rows(PROMPTS, 40), "m", "--model")


def test_a_scorer_that_reads_another_token_is_refused(folder, monkeypatch):
    scorer = load_scorer(folder("llama"), FULL, RUN, head="normal")
    assert check_scorer(scorer, PROMPTS, "m", "--reward") < 1e-5
    known = scorer.forward
    monkeypatch.setattr(scorer, "forward", lambda ids, lengths: known(ids, lengths - 1))
    with pytest.raises(InputError, match=r"--reward: .* gives other scores"):
        check_scorer(scorer, PROMPTS, "m", "--reward")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen3_5_text"])
def test_checkpointing_changes_neither_the_trainer_nor_the_samples(folder, kind):
    plain = load_policy(folder(kind), FULL, RUN)
    policy = load_policy(folder(kind), FULL, CHECKPOINTED)
    sampler, _ = check_online(Roles(policy=policy), PROMPTS, PARAMS, None, {"model": kind})
    fast = sampled(agreeing_sampler(plain, PROMPTS, PARAMS)[0])
    assert sampled(sampler).responses() == fast.responses()


def test_a_model_that_gets_no_gradient_is_refused(folder, monkeypatch):
    policy = load_policy(folder("reformer"), FULL, RUN)
    with pytest.raises(InputError, match="ReformerModelWithLMHead of m cannot read the rows of t"):
        check_roles(Roles(policy=policy), PROMPTS, 20, {"model": "m"})
    policy = load_policy(folder("llama"), FULL, RUN)
    check_roles(Roles(policy=policy), PROMPTS, 20, {"model": "m"})
    assert all(p.grad is None for p in policy.parameters())
    weight, known = torch.zeros(1, requires_grad=True), policy._head
    monkeypatch.setattr(policy, "_head", lambda hidden: known(hidden.detach()).detach() + weight)
    with pytest.raises(InputError, match="--model: no weight of m gets a gradient"):
        check_roles(Roles(policy=policy), PROMPTS, 20, {"model": "m"})


@pytest.mark.parametrize("run", [RUN, CHECKPOINTED], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["gpt2", "phimoe", "opt", "falcon", "mixtral", "gemma3"])
def test_a_model_that_is_made_ready_to_train_computes_what_its_folder_says(folder, kind, run):
    """PhiMoE routes by the value of its jitter also where no jitter is added; dropout is in the
    configurations of the others.
    """
    policy = load_policy(folder(kind), FULL, run)
    untouched = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32).eval()
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    ours = policy(ids, mask).logprobs[0, 1:]
    logp = untouched(input_ids=ids).logits[0, :-1].log_softmax(-1)
    theirs = logp.gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.equal(ours, policy(ids, mask).logprobs[0, 1:])  # nothing is random
    if run is RUN:
        untouched.config.use_cache = True
        assert plain(policy.lm).config.to_dict() == untouched.config.to_dict()


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("phimoe", 0),
        *((k, r) for k in ("llama", "gpt2", "opt", "falcon", "gemma3") for r in (0, 2)),
    ],
)
def test_checkpointing_computes_layers_again_in_the_backward_pass(folder, kind, rank):
    calls = []
    for run in (RUN, CHECKPOINTED):
        policy, counted = load_policy(folder(kind), LoraSettings(r=rank), run), []
        inner = trunk(policy.lm).named_modules()
        norm = next(m for n, m in inner if ".0." in n and "norm" in type(m).__name__.lower())
        norm.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        mask = torch.tensor([[False, True, True, True]])
        policy(torch.tensor([[5, 6, 7, 8]]), mask).logprobs.sum().backward()
        calls.append(len(counted))
    assert calls == [1, 2]


def test_a_position_encoding_that_depends_on_the_batch_is_refused_beyond_its_limit(folder):
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    }
    model = folder("phi3", rope_parameters=scaling, original_max_position_embeddings=32)
    policy = load_policy(model, FULL, RUN)
    check_roles(Roles(policy=policy), PROMPTS, 32, {"model": "phi3"})
    with pytest.raises(InputError, match="more than 32 tokens, and this run may have 33: give"):
        check_roles(Roles(policy=policy), PROMPTS, 33, {"model": "phi3"})


# 3. The sampler
# ------------------------------------------------------------


def forgetful(self, indices):
    """A cache whose rows stay where they are when others leave."""


def test_a_cache_that_is_not_kept_up_is_found_and_generate_takes_over(folder, monkeypatch):
    policy = load_policy(folder("llama"), FULL, RUN)
    monkeypatch.setattr(DynamicCache, "batch_select_indices", forgetful)
    sampler, said = agreeing_sampler(policy, PROMPTS, PARAMS)
    assert isinstance(sampler, GenerateSampler) and "slower" in said


def test_checkpointing_left_on_while_sampling_is_found(folder, monkeypatch):
    policy = load_policy(folder("llama"), FULL, CHECKPOINTED)
    monkeypatch.setattr(local_module, "evaluating", lambda model: contextlib.nullcontext())
    sampler, _ = agreeing_sampler(policy, PROMPTS, PARAMS)
    assert isinstance(sampler, GenerateSampler)


def test_a_policy_that_neither_loop_can_sample_is_refused(folder, monkeypatch):
    policy = load_policy(folder("llama"), FULL, RUN)
    broken_head(monkeypatch)
    monkeypatch.setattr(local_module, "logits", trunk_module.logits)
    with pytest.raises(InputError, match="--model: LlamaForCausalLM cannot be sampled from: in"):
        agreeing_sampler(policy, PROMPTS, PARAMS)


# 4. Shared prompts
# ------------------------------------------------------------


def pair(length):
    prompt = [3 + i % 50 for i in range(length)]
    mask = [False] * length + [True] * 3
    return Pair(*(Rendered(prompt + t, mask, "") for t in ([9, 10, 11], [12, 13, 2])))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral", "gpt2", "qwen3_5_text", "bloom"])
def test_pairs_have_the_log_probabilities_of_each_response_alone(folder, kind):
    plain = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32)
    policy = load_policy(folder(kind), FULL, RUN)
    both = pair(3 * WINDOW)
    with torch.no_grad():
        ours = torch.cat(pair_logprobs(policy, [both], CPU))
    theirs = torch.stack([alone(plain, r.ids)[-3:].sum() for r in both])
    torch.testing.assert_close(ours, theirs, atol=3e-4, rtol=0)


def test_a_shared_prompt_that_changes_a_pair_is_found(folder, monkeypatch):
    policy = load_policy(folder("mistral"), FULL, RUN)
    monkeypatch.setattr(roles_module, "windowed", lambda config: False)
    assert policy.supports_shared_prefix  # the short probe sees no window
    assert agree_when_shared(policy, pair(4), CPU)
    assert not agree_when_shared(policy, pair(3 * WINDOW), CPU)


# 5. Saved and loaded
# ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft, in this test
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_embeddings_is_merged_as_it_was_trained(folder, tmp_path, target):
    tied = folder("llama", tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj", target], task_type="CAUSAL_LM")
    adapter = get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.5)
    adapter.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32), tmp_path / "adapter"
    )
    policy = load_policy(str(tmp_path / "adapter"), FULL, RUN)
    ids = PROMPTS[2]
    torch.testing.assert_close(alone(policy.lm, ids), alone(again, ids), atol=1e-4, rtol=0)
    save(policy, make_tokenizer("llama"), tmp_path / "saved", torch.tensor([ids]))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(alone(saved, ids), alone(again, ids), atol=1e-4, rtol=0)


# Settings are read where the model keeps them
# ------------------------------------------------------------


def test_a_context_in_a_nested_configuration_is_read():
    assert context(Gemma3Config(text_config={"max_position_embeddings": 77})) == 77


def test_a_shared_value_head_has_the_trunk_s_width(folder):
    roles = load_roles(folder("gemma3"), FULL, RUN, make_tokenizer("llama"), CPU, critic=SHARED)
    ids = torch.tensor([PROMPTS[2]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    with torch.no_grad():
        assert roles.outputs(ids, mask).values.abs().max() == 0


def test_adapters_that_would_break_a_layer_are_refused(folder):
    with pytest.raises(InputError, match=r"--lora.r: Mamba2ForCausalLM cannot have these adapters"):
        load_policy(folder("mamba2"), LoraSettings(r=2), RUN)


def test_an_adapter_on_a_layer_that_is_not_there_is_refused_with_those_that_are(folder):
    lora = LoraSettings(r=2, target_modules=("q_proj", "nonsense"))
    with pytest.raises(InputError, match=r"no layer 'nonsense': it has down_proj, .*q_proj"):
        load_policy(folder("llama"), lora, RUN)
