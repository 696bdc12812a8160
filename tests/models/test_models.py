"""Policies, scorers and the sampler against plain transformers, on three architectures and on one
real model.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fiducial.errors import InputError, RunError
from fiducial.models.load import (
    SHARED,
    load_policy,
    load_roles,
    load_scorer,
    load_tokenizer,
)
from fiducial.models.save import pick_pad_token, save
from fiducial.models.scores import ScoreFacts
from fiducial.models.trunk import plain
from fiducial.rollout.draw import streams
from fiducial.rollout.local import local_sampler
from fiducial.rollout.sampling import Keys, SamplingParams, sampling_params, stop_id
from fiducial.settings import LoraSettings, RowSettings, RunSettings
from fiducial.train.renderer import load_renderer
from support import ARCHITECTURES, ROOT, make_tokenizer
from support import sample as draw

STORIES = ROOT.parent / "shared" / "models" / "stories260K"
NO_STORIES = f"{STORIES} is not there: it is not part of the repository"
FULL, RUN, CPU = LoraSettings(), RunSettings(), torch.device("cpu")
PROMPTS = [[5, 9, 14, 22, 7, 31, 12], [6], [17, 40, 3], [11, 10, 9, 8, 7, 6, 5, 4, 33, 21, 36, 30]]
each = pytest.mark.parametrize("kind", ARCHITECTURES)


@pytest.fixture(scope="module")
def policies(models):
    return {
        kind: load_policy(models[kind], FULL, RUN, load_tokenizer(models[kind]))
        for kind in ARCHITECTURES
    }


@pytest.fixture(scope="module")
def theirs(models):
    return {
        kind: AutoModelForCausalLM.from_pretrained(models[kind]).eval() for kind in ARCHITECTURES
    }


def batch(rows=PROMPTS, extra=0, pad_id=0):
    """Right-padded ids, a mask over all but the first token (and over no padding), lengths."""
    lengths = torch.tensor([len(r) for r in rows])
    ids = torch.full((len(rows), int(lengths.max()) + extra), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    columns = torch.arange(ids.shape[1])
    return ids, (columns[None] < lengths[:, None]) & (columns[None] > 0), lengths


def sample(policy, prompts=PROMPTS, numbers=None, samples=None, seed=3, step=5, **changes):
    how = {"max_new_tokens": 8, "stop_ids": frozenset({2, 18, 25})} | changes
    return draw(policy, prompts, numbers, samples, seed=seed, step=step, **how)


# The policy
# ------------------------------------------------------------


@each
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_log_probabilities_are_those_of_the_full_logits(policies, theirs, kind, temperature):
    ids, mask, _ = batch()
    ours = policies[kind](ids, mask, temperature, entropy=True)
    for i, row in enumerate(
        PROMPTS
    ):  # each row alone, without padding, through the model's own forward pass
        logp = (
            theirs[kind](input_ids=torch.tensor([row])).logits[0, :-1] / temperature
        ).log_softmax(-1)
        expected = logp.gather(-1, torch.tensor(row)[1:, None])[:, 0]
        assert torch.allclose(ours.logprobs[i, 1 : len(row)], expected, atol=1e-5)
        assert torch.allclose(
            ours.entropy[i, 1 : len(row)], -(logp.exp() * logp).sum(-1), atol=1e-5
        )
    assert (ours.logprobs[~mask] == 0).all() and ours.values is None


@each
@torch.no_grad()
def test_neither_padding_nor_what_stands_on_it_nor_the_order_of_rows_matters(policies, kind):
    policy = policies[kind]
    ids, mask, _ = batch()
    plain_batch = policy(ids, mask).logprobs
    wide, wide_mask, _ = batch(extra=7)
    assert torch.allclose(
        policy(wide, wide_mask).logprobs[:, : ids.shape[1]], plain_batch, atol=1e-5
    )
    rubbish, _, _ = batch(pad_id=41)
    assert torch.allclose(policy(rubbish, mask).logprobs, plain_batch, atol=1e-6)
    order = [2, 0, 3, 1]
    assert torch.allclose(policy(ids[order], mask[order]).logprobs, plain_batch[order], atol=1e-6)


@each
def test_gradients_do_not_see_the_padding(policies, kind):
    policy = policies[kind]

    def gradient(**how):
        policy.zero_grad()
        ids, mask, _ = batch(**how)
        policy(ids, mask).logprobs.sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    reference = gradient()
    assert (gradient(extra=5, pad_id=41) - reference).norm() < 1e-5 * reference.norm()
    policy.zero_grad()


@each
@torch.no_grad()
def test_there_is_one_policy_and_no_dropout(models, policies, kind):
    ids, mask, _ = batch()
    first = policies[kind](ids, mask).logprobs
    assert torch.equal(policies[kind](ids, mask).logprobs, first)
    checkpointed = load_policy(models[kind], FULL, RunSettings(gradient_checkpointing=True))
    # the layers that are computed again are in training mode, as transformers wants it
    assert any(module.training for module in checkpointed.lm.modules())
    assert torch.equal(checkpointed(ids, mask).logprobs, first)


def test_gradient_checkpointing_gives_the_same_gradient(models):
    def gradient(checkpointing):
        policy = load_policy(
            models["gpt2"], FULL, RunSettings(gradient_checkpointing=checkpointing)
        )
        ids, mask, _ = batch()
        policy(ids, mask).logprobs.sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    assert torch.allclose(gradient(True), gradient(False), rtol=1e-4, atol=1e-5)


def test_the_first_token_cannot_be_a_label(policies):
    ids, mask, _ = batch()
    with pytest.raises(ValueError, match="token 0"):
        policies["llama"](ids, mask | True)


@each
@torch.no_grad()
def test_the_probabilities_of_all_responses_add_up_to_one(models, kind):
    """Every string of two tokens, and the ending token alone: a double shift or a lost ending token
    would not add up.
    """
    policy = load_policy(models[kind], FULL, RUN).double()
    eos, prompt = 2, [5, 9, 14]
    strings = [[eos], *([a, b] for a in range(64) if a != eos for b in range(64))]
    total = 0.0
    for start in range(0, len(strings), 1024):
        ids, mask, _ = batch([prompt + s for s in strings[start : start + 1024]])
        mask[:, : len(prompt)] = False
        total += float(policy(ids, mask).logprobs.sum(1).exp().sum())
    assert total == pytest.approx(1.0, abs=1e-10)


# The sampler
# ------------------------------------------------------------


@each
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_the_sampler_and_the_trainer_agree_on_every_sampled_token(policies, kind, temperature):
    prompts = PROMPTS * 3
    seen = sample(policies[kind], prompts, temperature=temperature)
    again = policies[kind](seen.ids, seen.mask, temperature).logprobs
    assert (again - seen.logprobs).abs().max() < 1e-4
    assert float(again.sum(1).std()) > 0.5  # there was something to agree on
    assert seen.temperature == temperature


@each
@torch.no_grad()
def test_a_response_does_not_depend_on_its_company(policies, kind):
    together = sample(policies[kind], tokens=10**6)
    assert sample(policies[kind], tokens=1).responses(ending=True) == together.responses(
        ending=True
    )  # one by one
    for i, prompt in enumerate(PROMPTS):
        alone = sample(policies[kind], [prompt], [i])
        assert alone.responses(ending=True) == [together.responses(ending=True)[i]]
        assert torch.allclose(
            alone.logprobs[alone.mask], together.logprobs[i][together.mask[i]], atol=1e-4
        )


@torch.no_grad()
def test_each_key_has_its_own_random_stream(policies):
    same = [PROMPTS[0]] * 6
    policy = policies["llama"]

    def one(seed=3, step=5, prompt=0, number=0):
        seen = sample(policy, [PROMPTS[0]], [prompt], [number], seed=seed, step=step)
        return seen.responses(ending=True)[0]

    assert (
        len({tuple(r) for r in (one(), one(seed=4), one(step=6), one(prompt=1), one(number=1))})
        == 5
    )
    assert one() == one()
    many = sample(policy, same, [0] * 6, list(range(6)))
    assert many.responses(ending=True)[0] == one() and len({tuple(r) for r in many.responses()}) > 4


@pytest.mark.parametrize("seed", [5, 2**40 + 3])
def test_a_rows_stream_is_numpys_philox_of_its_four_numbers(seed):
    keys = Keys(seed, 7, [4, 0, 9], [1, 2, 3])
    for length in (1, 4, 9):
        for found, row in zip(streams(keys, [2, 0], length), (2, 0), strict=True):
            words = np.random.SeedSequence([seed, 7, keys.prompt[row], keys.sample[row]])
            assert (found == np.random.Generator(np.random.Philox(words)).random(length)).all()


@each
@torch.no_grad()
def test_greedy_sampling_is_that_of_transformers(policies, theirs, kind):
    stops = [2, 18, 25]
    seen = sample(policies[kind], temperature=0, max_new_tokens=12)
    for prompt, response in zip(PROMPTS, seen.responses(ending=True), strict=True):
        out = theirs[kind].generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=stops,
            pad_token_id=0,
        )
        assert response == out[0, len(prompt) :].tolist()


@torch.no_grad()
def test_a_stop_token_ends_a_response_belongs_to_it_and_is_told_from_a_cut(policies):
    seen = sample(
        policies["llama"], PROMPTS * 10, max_new_tokens=12, stop_ids=frozenset(range(20, 28))
    )
    stops = set(range(20, 28))
    assert seen.finished.any() and not seen.finished.all()
    for i, whole in enumerate(seen.responses(ending=True)):
        finished = bool(seen.finished[i])
        assert finished == (whole[-1] in stops) and not set(whole[:-1]) & stops
        assert finished or len(whole) == 12
        assert seen.responses()[i] == (whole[:-1] if finished else whole)
        start = len((PROMPTS * 10)[i])
        assert seen.ids[i, :start].tolist() == (PROMPTS * 10)[i] and seen.prompt_lengths[i] == start
        assert seen.mask[i].nonzero()[:, 0].tolist() == list(range(start, start + len(whole)))
        assert seen.last[i].nonzero()[:, 0].tolist() == [
            start + len(whole) - 1
        ] and seen.response_lengths[i] == len(whole)
    assert (seen.logprobs[~seen.mask] == 0).all() and (seen.logprobs[seen.mask] < 0).all()


@torch.no_grad()
def test_a_stop_token_in_the_prompt_ends_nothing(policies):
    seen = sample(policies["llama"], [[5, 2, 9]], stop_ids=frozenset({2}), max_new_tokens=3)
    response = seen.responses(ending=True)[0]
    assert bool(seen.finished[0]) == (response[-1] == 2) and len(response) in (1, 2, 3)
    ends_there = sample(policies["llama"], [[5, 9, 2]], stop_ids=frozenset({2}), max_new_tokens=3)
    assert int(ends_there.response_lengths[0]) >= 1


@each
@torch.no_grad()
def test_samples_have_the_frequencies_of_the_model(policies, kind):
    """Chi-squared over all responses of two tokens, the rare ones in one cell; both prompts of the
    batch, so that one is padded.
    """
    n, prompts = 8000, [[5, 9, 14], [6]]
    seen = sample(
        policies[kind],
        [prompts[i % 2] for i in range(2 * n)],
        [i % 2 for i in range(2 * n)],
        [i // 2 for i in range(2 * n)],
        seed=1,
        step=0,
        max_new_tokens=2,
        stop_ids=frozenset({2}),
        temperature=0.8,
    )
    for which, prompt in enumerate(prompts):
        strings = [(2,), *((a, b) for a in range(64) if a != 2 for b in range(64))]
        probabilities = {}
        for start in range(0, len(strings), 1024):
            part = strings[start : start + 1024]
            ids, mask, _ = batch([[*prompt, *s] for s in part])
            mask[:, : len(prompt)] = False
            probabilities |= dict(
                zip(
                    part, policies[kind](ids, mask, 0.8).logprobs.sum(1).exp().tolist(), strict=True
                )
            )
        counts = Counter(tuple(r) for r in seen.responses(ending=True)[which::2])
        common = [s for s in strings if n * probabilities[s] >= 5]
        cells = [(counts[s], n * probabilities[s]) for s in common]
        cells.append((n - sum(c for c, _ in cells), n - sum(e for _, e in cells)))
        chi2, dof = sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1
        assert abs(chi2 - dof) < 4 * math.sqrt(2 * dof), (chi2, dof)


def test_a_prompt_and_response_beyond_the_context_are_refused(policies):
    with pytest.raises(
        InputError,
        match=r"prompt of 12 tokens and --max-new-tokens 8 exceed the model's context of 19",
    ):
        sample(policies["gpt2"], context=19)
    assert len(sample(policies["gpt2"], context=20)) == 4
    with pytest.raises(InputError, match="a prompt is empty"):
        sample(policies["gpt2"], [[]])
    with pytest.raises(InputError, match="a prompt is empty"):
        sample(policies["gpt2"], [[3, 4], []])


def test_stop_tokens_by_their_text(models, policies):
    renderer = load_renderer(models["qwen3"], RowSettings())
    assert stop_id(renderer, "<|im_start|>") == 1 and stop_id(renderer, "<|endoftext|>") == 0
    assert sampling_params(renderer, 4, stop=("<|im_start|>",)) == SamplingParams(
        4, 1.0, frozenset({1, 2})
    )
    assert local_sampler(policies["qwen3"]).context == 128
    with pytest.raises(InputError, match="--stop: the tokenizer has no single token 'nothing'"):
        stop_id(renderer, "nothing")


# Scorers
# ------------------------------------------------------------


@each
@torch.no_grad()
def test_a_new_head_has_the_spread_it_should_and_a_critic_starts_at_zero(make, kind):
    wide = make(
        kind,
        **(
            {"n_embd": 1024, "n_layer": 1}
            if kind == "gpt2"
            else {"hidden_size": 1024, "num_hidden_layers": 1}
        ),
    )
    scorer = load_scorer(wide, FULL, RUN, head="normal", seed=1)
    weight = plain(scorer.model).score.weight
    assert weight.shape == (1, 1024)
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(1025), rel=0.1)  # 4.5 standard errors
    assert torch.equal(
        weight, plain(load_scorer(wide, FULL, RUN, head="normal", seed=1).model).score.weight
    )
    assert not torch.equal(
        weight, plain(load_scorer(wide, FULL, RUN, head="normal", seed=2).model).score.weight
    )
    ids, _, _ = batch()
    assert (load_scorer(wide, FULL, RUN, head="zero")(ids) == 0).all()


@each
@torch.no_grad()
def test_scores_are_read_at_the_last_token_and_values_before_each(models, kind):
    scorer = load_scorer(models[kind], FULL, RUN, head="normal")
    ids, _, lengths = batch()
    scores = scorer(ids, lengths)
    head, trunk = plain(scorer.model).score, plain(scorer.model).base_model
    for i, row in enumerate(PROMPTS):  # each alone: the state behind its last token
        hidden = trunk(input_ids=torch.tensor([row])).last_hidden_state
        assert scores[i].item() == pytest.approx(head(hidden[0, -1]).item(), abs=1e-5)
    assert float(scores.std()) > 1e-3
    wide, _, _ = batch(extra=5, pad_id=2)
    assert torch.allclose(scorer(wide, lengths), scores, atol=1e-5)

    values = scorer(ids)
    assert values.shape == ids.shape and (values[:, 0] == 0).all()
    for t in range(
        1, len(PROMPTS[3])
    ):  # the value beside token t is the score of what stands before it
        assert values[3, t].item() == pytest.approx(
            scorer(ids[3:, :t], torch.tensor([t])).item(), abs=1e-5
        )


@each
@torch.no_grad()
def test_the_shared_critic_stands_before_each_token_too(models, kind):
    policy = load_roles(models[kind], FULL, RUN, None, CPU, critic=SHARED).policy
    ids, mask, _ = batch()
    assert (policy(ids, mask).values == 0).all()
    torch.nn.init.normal_(policy.value_head.weight)
    values = policy(ids, mask).values
    hidden = plain(policy.lm).base_model(input_ids=torch.tensor([PROMPTS[3]])).last_hidden_state[0]
    assert torch.allclose(values[3, 1:], policy.value_head(hidden[:-1])[:, 0], atol=1e-5)
    assert (values[~mask] == 0).all()


@each
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_saved_reward_model_scores_the_same_in_plain_transformers(models, tmp_path, kind, side):
    tokenizer = load_tokenizer(models[kind])
    scorer = load_scorer(models[kind], FULL, RUN, head="normal", tokenizer=tokenizer)
    pick_pad_token(tokenizer, scorer.model)
    folder = tmp_path / "model"
    save(scorer, tokenizer, folder, torch.tensor([PROMPTS[0]]))

    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (
        theirs.pad_token_id is not None
        and theirs.pad_token_id != theirs.eos_token_id
        and again.config.pad_token_id == theirs.pad_token_id
    )
    eos = theirs.eos_token_id
    rows = [[*p, eos] for p in PROMPTS] + [[5, eos, 9, eos]]  # an EOS inside, too
    ours = scorer(*batch(rows)[::2])
    theirs.padding_side = side
    padded = theirs.pad({"input_ids": rows}, return_tensors="pt")
    assert int((padded["attention_mask"] == 0).sum()) > 0
    got = again(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0]
    if (
        side == "left" and kind == "gpt2"
    ):  # GPT-2's own positions count the padding in transformers unless they are passed
        positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        got = again(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            position_ids=positions,
        ).logits[:, 0]
    assert torch.allclose(got, ours, atol=1e-5)
    assert torch.allclose(
        load_scorer(str(folder), FULL, RUN, head="saved")(*batch(rows)[::2]), ours, atol=1e-6
    )


def test_a_language_model_is_no_reward_model(models):
    with pytest.raises(
        InputError, match=r"is no reward model: its config names \['LlamaForCausalLM'\]"
    ):
        load_scorer(models["llama"], FULL, RUN, head="saved")


# LoRA
# ------------------------------------------------------------


def disturbed(module):
    """Adapters start at zero; give them something to say."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.2)
    return module


@each
@torch.no_grad()
def test_the_reference_is_the_base_with_adapters_off(models, policies, kind):
    roles = load_roles(models[kind], LoraSettings(r=4), RUN, None, CPU)
    policy = roles.policy
    ids, mask, _ = batch()
    base = policies[kind](ids, mask).logprobs
    assert torch.allclose(policy(ids, mask).logprobs, base, atol=1e-6)  # adapters start at zero
    disturbed(policy)
    assert (policy(ids, mask).logprobs - base).abs().max() > 0.1
    assert torch.allclose(roles.reference(ids, mask), base, atol=1e-6)
    assert (policy(ids, mask).logprobs - base).abs().max() > 0.1  # and they are on again
    assert all("lora_" in n for n, p in policy.named_parameters() if p.requires_grad)


@torch.no_grad()
def test_a_full_reference_does_not_move_with_the_policy(models):
    roles = load_roles(models["llama"], FULL, RUN, None, CPU)
    policy, reference = roles.policy, roles.reference
    ids, mask, _ = batch()
    before = reference(ids, mask, 0.6)
    assert torch.equal(before, policy(ids, mask, 0.6).logprobs)
    for p in policy.parameters():
        p.add_(0.1)
    assert torch.equal(reference(ids, mask, 0.6), before)


@each
@torch.no_grad()
def test_an_adapter_folder_is_loaded_merged(models, tmp_path, kind):
    tokenizer = load_tokenizer(models[kind])
    policy = disturbed(load_policy(models[kind], LoraSettings(r=4), RUN, tokenizer))
    save(policy, tokenizer, tmp_path / "model", torch.tensor([PROMPTS[0]]))
    again = load_policy(str(tmp_path / "model"), FULL, RUN, tokenizer)
    ids, mask, _ = batch()
    assert torch.allclose(again(ids, mask).logprobs, policy(ids, mask).logprobs, atol=1e-4)
    on_top = load_policy(
        str(tmp_path / "model"), LoraSettings(r=2), RUN
    )  # its reference is the policy as it is now, not the first base
    with on_top.adapters_off():
        assert torch.allclose(on_top(ids, mask).logprobs, policy(ids, mask).logprobs, atol=1e-4)
    expected = disturbed(on_top)(ids, mask).logprobs
    save(on_top, tokenizer, tmp_path / "second", torch.tensor([PROMPTS[0]]))
    assert torch.allclose(
        load_policy(str(tmp_path / "second"), FULL, RUN)(ids, mask).logprobs, expected, atol=1e-4
    )


@each
@torch.no_grad()
def test_a_reward_model_with_adapters_can_be_used_again(models, tmp_path, kind):
    tokenizer = load_tokenizer(models[kind])
    scorer = disturbed(
        load_scorer(models[kind], LoraSettings(r=4), RUN, head="normal", tokenizer=tokenizer)
    )
    pick_pad_token(tokenizer, scorer.model)
    scorer.facts = ScoreFacts(mean=0.25)
    save(scorer, tokenizer, tmp_path / "model", torch.tensor([PROMPTS[0]]))
    again = load_scorer(str(tmp_path / "model"), FULL, RUN, head="saved", tokenizer=tokenizer)
    ids, _, lengths = batch()
    assert torch.allclose(again(ids, lengths), scorer(ids, lengths), atol=1e-4)
    assert again.model.config.reward_mean == 0.25 == again.facts.mean


@each
@torch.no_grad()
def test_a_critic_or_reward_model_starts_from_a_policy_with_adapters(models, tmp_path, kind):
    tokenizer = load_tokenizer(models[kind])
    policy = disturbed(load_policy(models[kind], LoraSettings(r=4), RUN, tokenizer))
    save(policy, tokenizer, tmp_path / "model", torch.tensor([PROMPTS[0]]))
    scorer = load_scorer(str(tmp_path / "model"), FULL, RUN, head="normal", tokenizer=tokenizer)
    row = torch.tensor([PROMPTS[0]])
    expected = plain(policy.lm).base_model(input_ids=row).last_hidden_state
    assert torch.allclose(
        plain(scorer.model).base_model(input_ids=row).last_hidden_state, expected, atol=1e-4
    )


@each
@torch.no_grad()
def test_the_sampler_uses_the_adapters(models, kind):
    policy = disturbed(load_policy(models[kind], LoraSettings(r=4), RUN))
    seen = sample(policy)
    assert (policy(seen.ids, seen.mask).logprobs - seen.logprobs).abs().max() < 1e-4


# What is refused
# ------------------------------------------------------------


def refused(match, call):
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_does_not_belong_to_the_model(make):
    small = make("llama", vocab_size=20)
    refused(
        "token id 42 and the model has 20 embeddings",
        lambda: load_policy(small, FULL, RUN, load_tokenizer(small)),
    )
    refused(
        "token id 42 and the model has 20 embeddings",
        lambda: load_scorer(small, FULL, RUN, head="zero", tokenizer=load_tokenizer(small)),
    )


def test_folders_that_hold_no_model(models, tmp_path):
    for name in ("empty", "config", "pickle"):
        (tmp_path / name).mkdir()
    for name in ("config", "pickle"):
        (tmp_path / name / "config.json").write_bytes(
            (Path(models["llama"]) / "config.json").read_bytes()
        )
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    refused("no weights", lambda: load_policy(str(tmp_path / "config"), FULL, RUN))
    refused(
        "holds its weights in pytorch_model.bin, a pickle, .* never loaded: .*save it again",
        lambda: load_policy(str(tmp_path / "pickle"), FULL, RUN),
    )
    refused("no weights", lambda: load_policy(str(tmp_path / "empty"), FULL, RUN))
    refused(
        "no tokenizer can be loaded", lambda: load_renderer(str(tmp_path / "config"), RowSettings())
    )
    refused("there is no folder", lambda: load_renderer(str(tmp_path / "nowhere"), RowSettings()))
    refused(
        "no reward model|no model configuration",
        lambda: load_scorer(str(tmp_path / "empty"), FULL, RUN, head="saved"),
    )


def test_weights_that_are_torn(models, tmp_path):
    folder = tmp_path / "torn"
    folder.mkdir()
    for path in Path(models["llama"]).iterdir():
        (folder / path.name).write_bytes(
            path.read_bytes()[: None if path.suffix != ".safetensors" else 1000]
        )
    refused("cannot be loaded as a model", lambda: load_policy(str(folder), FULL, RUN))


def test_settings_of_rows_that_the_model_cannot_keep(models):
    refused(
        "--rows.eos-token: the tokenizer of .* has no token '<stop>'",
        lambda: load_renderer(models["qwen3"], RowSettings(eos_token="<stop>")),
    )
    refused(
        "--rows.max-length: 129 exceeds the context of .*, 128 tokens",
        lambda: load_renderer(models["llama"], RowSettings(max_length=129)),
    )
    assert load_renderer(models["qwen3"], RowSettings(eos_token="<|im_start|>")).eos == 1
    assert load_renderer(models["llama"], RowSettings()).max_length == 128


def test_a_saved_model_that_answers_differently_is_not_saved(models, tmp_path, monkeypatch):
    policy = load_policy(models["llama"], FULL, RUN)
    other = AutoModelForCausalLM.from_pretrained(models["llama"])
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: other)
    with pytest.raises(RunError, match="answers differently when it is loaded again"):
        save(policy, make_tokenizer("llama"), tmp_path / "model", torch.tensor([PROMPTS[0]]))


# Somebody else's model
# ------------------------------------------------------------


@pytest.mark.skipif(not STORIES.is_dir(), reason=NO_STORIES)
@torch.no_grad()
def test_a_real_model_speaks_and_trainer_and_sampler_agree(tmp_path):
    renderer = load_renderer(str(STORIES), RowSettings())
    policy = load_policy(str(STORIES), FULL, RUN, renderer.tokenizer)
    prompts = [
        renderer.prompt(p, "")
        for p in ("Once upon a time", "The little dog was very happy because", "One")
    ]
    assert all(p[0] == 1 and p[1] != 1 for p in prompts)
    how = {"stop_ids": frozenset({renderer.eos, 1}), "context": 512}
    greedy = draw(policy, prompts[:1], max_new_tokens=12, temperature=0, **how)
    assert renderer.decode(greedy.responses()[0]).strip().startswith(", there was a little")
    for temperature in (1.0, 0.7):
        seen = draw(policy, prompts, max_new_tokens=40, temperature=temperature, **how)
        assert (
            policy(seen.ids, seen.mask, temperature).logprobs - seen.logprobs
        ).abs().max() < 1e-4


@pytest.mark.skipif(not STORIES.is_dir(), reason=NO_STORIES)
@torch.no_grad()
def test_a_real_model_is_saved_and_scored_in_plain_transformers(tmp_path):
    renderer = load_renderer(str(STORIES), RowSettings())
    policy = load_policy(str(STORIES), FULL, RUN, renderer.tokenizer)
    row = torch.tensor([renderer.completion("Once upon a time", " there was a cat.", "").ids])
    save(policy, renderer.tokenizer, tmp_path / "policy", row)
    scorer = load_scorer(str(STORIES), FULL, RUN, head="normal", tokenizer=renderer.tokenizer)
    pick_pad_token(renderer.tokenizer, scorer.model)
    save(scorer, renderer.tokenizer, tmp_path / "reward", row)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    rows = [
        renderer.completion("Once upon a time", t, "").ids
        for t in (" there was a cat.", " a dog", " yes")
    ]
    padded = AutoTokenizer.from_pretrained(tmp_path / "reward").pad(
        {"input_ids": rows}, return_tensors="pt"
    )
    assert torch.allclose(again(**padded).logits[:, 0], scorer(*batch(rows)[::2]), atol=1e-5)
