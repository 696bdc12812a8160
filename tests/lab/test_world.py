"""The lab's worlds on disk, as text, and as models: what is written is read back, and every text
has the tokens of its response.
"""

import itertools
import re

import numpy as np
import pytest
import torch

from fiducial.data.render import Renderer
from fiducial.errors import InputError
from fiducial.lab.worlds import exact, policies
from fiducial.lab.worlds import world as lab
from fiducial.lab.worlds.files import write_world
from fiducial.lab.worlds.world import EOS, World, prompts_for, tree
from fiducial.models.load import load_policy
from fiducial.models.roles import Policy
from fiducial.rewards.types import Responses
from fiducial.rollout.local import local_sampler
from fiducial.rollout.sampling import Keys, SamplingParams, sampling_params
from fiducial.settings import LoraSettings, RowSettings, RunSettings
from fiducial.train.renderer import load_renderer


@pytest.fixture(scope="module")
def made():
    return policies.make("made", seed=1, prompts=3, vocabulary=4, horizon=3, std=0.3, uneven=True)


@pytest.fixture(scope="module")
def world(made) -> World:
    return made[0]


# ---- on disk ----


@pytest.mark.parametrize("full", [False, True])
def test_a_world_is_read_back_to_the_bit(world, full, tmp_path):
    if full:
        steps = lab.step_rewards(world, seed=0)
        world = steps.with_(
            proxy=np.nextafter(steps.reward, 9), beta=0.1 + 0.2, name="ein Name, 名前"
        )
    world.save(tmp_path / "a world")  # no ending is added
    again = World.load(tmp_path / "a world")
    assert (again.name, again.prompts, again.beta, again.horizon) == (
        world.name,
        world.prompts,
        world.beta,
        world.horizon,
    )
    assert all(isinstance(token, int) for prompt in again.prompts for token in prompt)
    for name in ("reference", "reward", "proxy", "step_reward"):
        mine, theirs = getattr(world, name), getattr(again, name)
        assert (mine is None) == (theirs is None) == (not full and name in ("proxy", "step_reward"))
        assert mine is None or (
            mine.dtype == theirs.dtype == np.float64 and mine.tobytes() == theirs.tobytes()
        )
    assert (
        again.responses == world.responses
        and exact.reference(again).tobytes() == exact.reference(world).tobytes()
    )


# ---- as text ----


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    return policies.save(made[1], tmp_path_factory.mktemp("transformer"))


@pytest.mark.parametrize("vocabulary", [2, 3, 4, 27])
def test_a_token_is_a_letter_and_back_and_nothing_is_put_in_front(vocabulary, tmp_path):
    tokenizer = policies.tokenizer(vocabulary)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        ids = [*range(1, vocabulary), EOS]
        text = ".abcdefghijklmnopqrstuvwxyz"[1:vocabulary] + "."
        assert (
            one(text).input_ids == ids
            and one.decode(ids) == text
            and one.decode(ids, skip_special_tokens=True) == text[:-1]
        )
        assert (one.eos_token_id, one.bos_token_id, len(one)) == (EOS, None, vocabulary)


def test_every_response_as_text_has_exactly_its_tokens_and_only_the_finished_ones_an_eos(
    world, folder
):
    for p, prompt in enumerate(world.prompts):
        renderer = Renderer(policies.tokenizer(4), len(prompt) + world.horizon)
        assert renderer.prompt(world.prompt_text(p), "") == list(prompt)
        for y, response in enumerate(world.responses):
            row = renderer.completion(world.prompt_text(p), world.response_text(y), "")
            assert row.ids == [*prompt, *response]
            assert row.mask == [False] * len(prompt) + [True] * len(response)
            assert (row.ids[-1] == EOS) == world.tree.finished[y] == (not row.truncated)
            assert row.ids.count(EOS) == int(world.tree.finished[y])
    limited = load_renderer(str(folder), RowSettings(max_length=5))
    assert limited.completion("aa", "abc", "").ids == [1, 1, 1, 2, 3]


def test_a_limit_that_is_not_the_prompts_own_adds_a_token_to_what_was_cut(world):
    """Prompts of different lengths have different limits: with the longest one's, a cut response
    behind a shorter prompt gets an EOS.
    """
    longest = max(map(len, world.prompts)) + world.horizon
    short = min(range(3), key=lambda p: len(world.prompts[p]))
    row = Renderer(policies.tokenizer(4), longest).completion(world.prompt_text(short), "abc", "")
    assert row.ids == [*world.prompts[short], 1, 2, 3, EOS]


def test_the_scores_of_texts_are_those_of_the_table(world):
    world = world.with_(proxy=world.reward + 100)
    every = list(itertools.product(range(3), range(len(world.responses))))
    np.random.default_rng(0).shuffle(every)
    prompts, completions = (
        [world.prompt_text(p) for p, _ in every],
        [world.response_text(y).rstrip(".") for _, y in every],
    )
    assert len(set(zip(prompts, completions, strict=True))) == len(every)
    assert world.scores(prompts, completions) == [world.reward[p, y] for p, y in every]
    assert world.scores(prompts, completions, "proxy") == [
        world.reward[p, y] + 100 for p, y in every
    ]
    assert world.scores(prompts, [world.response_text(y) for _, y in every]) == [
        world.reward[p, y] for p, y in every
    ]  # with their full stops all the same
    for prompt, completion in [("zz", ""), (prompts[0], "abca")]:
        with pytest.raises(KeyError):
            world.scores([prompt], [completion])
    with pytest.raises(ValueError):
        world.scores(prompts[:2], completions[:1])


def test_what_a_model_samples_is_scored_by_the_table(world, folder):
    renderer = load_renderer(str(folder), RowSettings())
    policy = load_policy(str(folder), LoraSettings(), RunSettings(), renderer.tokenizer)
    p = [i % 3 for i in range(300)]
    drawn = local_sampler(policy).sample(
        [world.prompts[i] for i in p],
        sampling_params(renderer, world.horizon),
        Keys(0, 0, p, list(range(300))),
    )

    class Row:
        def __init__(self, prompt: str) -> None:
            self.prompt, self.where = prompt, ""

    texts = Responses.of([Row(world.prompt_text(i)) for i in p], drawn, renderer)
    y = [world.responses.index(tuple(r)) for r in drawn.responses(ending=True)]
    assert world.scores(texts.prompts, texts.completions) == world.reward[p, y].tolist()
    assert (
        drawn.finished.tolist() == world.tree.finished[y].tolist()
        and 0 < drawn.finished.float().mean() < 1
    )


# ---- what a world refuses ----


def test_comparisons_need_prompts_of_one_length(made, tmp_path):
    world, model = made  # the lengths of its prompts differ
    with pytest.raises(ValueError, match="all prompts must have the same length"):
        write_world(world, model, tmp_path / "world", copies=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reference": np.zeros((2, 13, 4))},
            "reference must be logits of shape [3, 13, 4], not [2, 13, 4]",
        ),
        (
            {"reference": np.zeros((3, 12, 4))},
            "reference must be logits of shape [3, 13, 4], not [3, 12, 4]",
        ),
        (
            {"reward": np.zeros((3, 39))},
            "reward must have one number per prompt and response, [3, 40], not [3, 39]",
        ),
        (
            {"proxy": np.zeros(40)},
            "proxy must have one number per prompt and response, [3, 40], not [40]",
        ),
        (
            {"step_reward": np.zeros((3, 40))},
            "step_reward must have the shape of reference, [3, 13, 4], not [3, 40]",
        ),
        ({"horizon": 2}, "reference must be logits of shape [3, 4, 4]"),
        ({"prompts": ((1,), (2, 1), (1, 2))}, "prompt (1,) is a prefix of prompt (1, 2)"),
        ({"prompts": ((2,), (1,), (1,))}, "prompt (1,) is a prefix of prompt (1,)"),
        ({"prompts": ((), (1,), (2,))}, "prompt () is a prefix of prompt (1,)"),
    ],
)
def test_a_world_that_does_not_fit_together_is_refused(world, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        world.with_(**changes)


# ---- prompts ----


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    ("vocabulary", "count"), [(2, 1), (3, 1), (3, 2), (3, 3), (3, 9), (4, 4), (6, 64), (27, 30)]
)
def test_prompts_are_as_many_as_asked_for_letters_only_and_none_the_beginning_of_another(
    vocabulary, count, uneven
):
    prompts = prompts_for(count, vocabulary, uneven=uneven)
    assert len(prompts) == count
    assert all(0 < token < vocabulary for prompt in prompts for token in prompt) and all(prompts)
    assert not any(b[: len(a)] == a for a, b in itertools.permutations(prompts, 2))
    lengths = [len(p) for p in prompts]
    assert lengths == [lengths[0] + int(uneven and i % 2 == 1) for i in range(count)]


def test_two_prompts_of_one_letter_cannot_be_had():
    with pytest.raises(ValueError, match="would be a prefix of the other"):
        prompts_for(2, 2)


# ---- worlds around a transformer ----


def test_a_world_is_the_same_whenever_it_is_made_and_another_with_another_seed(made):
    world, model = made
    torch.manual_seed(123)
    again, same = policies.make(
        "made", seed=1, prompts=3, vocabulary=4, horizon=3, std=0.3, uneven=True
    )
    assert (
        again.reference.tobytes() == world.reference.tobytes()
        and again.reward.tobytes() == world.reward.tobytes()
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True)
    )
    other, _ = policies.make(
        "made", seed=2, prompts=3, vocabulary=4, horizon=3, std=0.3, uneven=True
    )
    assert (
        np.abs(other.reference - world.reference).max() > 0.1
        and np.abs(other.reward - world.reward).max() > 0.1
    )


def test_the_reference_of_a_made_world_is_the_transformer_prefix_by_prefix(made):
    world, model = made
    assert model.dtype == torch.float32 and not model.training  # it was left as it is
    for (p, prompt), (s, state) in itertools.product(
        enumerate(world.prompts), enumerate(world.tree.states)
    ):
        alone = model(input_ids=torch.tensor([[*prompt, *state]])).logits[0, -1].double()
        np.testing.assert_allclose(world.reference[p, s], alone.detach(), atol=1e-5)
    assert exact.log_softmax(world.reference).std() > 0.1


def test_the_package_gives_the_transformers_responses_the_probabilities_of_the_world(made):
    world, model = made
    policy = Policy(model)
    for p, prompt in enumerate(world.prompts):
        for y, response in enumerate(world.responses[::5]):
            ids = torch.tensor([[*prompt, *response]])
            mask = torch.arange(ids.shape[1])[None] >= len(prompt)
            assert policy(ids, mask).logprobs.sum().item() == pytest.approx(
                exact.reference(world)[p, 5 * y], abs=1e-5
            )


def test_table_and_transformer_start_from_the_same_mark_and_are_read_back_as_what_they_are(
    made, folder, tmp_path
):
    world, model = made
    table = policies.load(policies.save(policies.table(world), tmp_path / "table"))
    again = policies.load(folder)
    assert (type(table).__name__, type(again).__name__) == ("TabularLM", "GPT2LMHeadModel")
    for one, tolerance in ((table, 1e-6), (again, 1e-12)):
        np.testing.assert_allclose(
            exact.log_softmax(policies.logits(one, world.prompts, world.tree)),
            exact.log_softmax(world.reference),
            atol=tolerance,
        )
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_larger_std_of_the_weights_makes_the_reference_more_peaked():
    flat, peaked = (
        exact.log_softmax(policies.make("x", seed=0, std=std)[0].reference) for std in (0.02, 0.5)
    )
    assert peaked.std() > 3 * flat.std() > 0


@pytest.mark.parametrize("kl", [0.1, 1.25, 2.9])
def test_rewards_are_scaled_until_the_optimum_is_as_far_away_as_asked_for(kl):
    world, _ = policies.make("x", seed=3, beta=0.2, kl=kl)
    assert exact.kl(exact.optimum(world)[0], exact.reference(world)) == pytest.approx(kl, abs=1e-9)
    plain, _ = policies.make("x", seed=3, beta=0.2, kl=None)
    ratio = world.reward / plain.reward
    assert (
        ratio == pytest.approx(np.full_like(ratio, ratio[0, 0])) and ratio[0, 0] > 0
    )  # a factor, and nothing else
    with pytest.raises(
        ValueError, match="x: no scale of these rewards puts the optimum 9 nats from the reference"
    ):
        policies.make("x", seed=3, beta=0.2, kl=9.0)
    given = np.arange(30.0).reshape(2, 15)
    assert policies.make("x", reward=given, kl=None)[0].reward is given


@pytest.mark.parametrize(
    ("make", "responses", "kl"),
    [(policies.mild, 15, 1.25), (policies.peaked, 15, 2.9), (policies.large, 121, 1.25)],
)
def test_the_worlds_are_as_large_and_their_optima_as_far_as_they_say(make, responses, kl):
    world, model = make(seed=0)
    assert len(world.responses) == responses and len(world.prompts) == 2
    assert exact.kl(exact.optimum(world)[0], exact.reference(world)) == pytest.approx(kl, abs=1e-9)
    for a, b in itertools.combinations(
        range(len(world.tree.states)), 2
    ):  # and the transformer tells every two prefixes apart
        assert np.abs(world.reference[:, a] - world.reference[:, b]).max() > 1e-4
    assert not model.training


def test_a_prompt_and_its_longest_response_fit_the_context_of_table_and_transformer(
    world, folder, tmp_path
):
    longest = max(world.prompts, key=len)
    for one in (folder, policies.save(policies.table(world), tmp_path / "table")):
        model = policies.load(one)
        limit = model.config.max_position_embeddings
        assert limit >= len(longest) + world.horizon
        sampler, keys = local_sampler(Policy(model)), Keys(0, 0, [0], [0])
        params = SamplingParams(world.horizon, stop_ids=frozenset({EOS}))
        assert len(sampler.sample([longest], params, keys)) == 1
        with pytest.raises(InputError, match="exceed the model's context"):
            sampler.sample([longest], SamplingParams(limit, stop_ids=frozenset({EOS})), keys)


def test_every_tree_is_made_once_and_numbers_its_responses_as_the_world_does():
    assert (
        tree(4, 3) is tree(4, 3)
        and policies.make("x", vocabulary=4)[0].responses is tree(4, 3).responses
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_long_world_is_long_sparse_and_says_which_letters_are_right(seed):
    world, model = policies.long(seed)
    likely = np.exp(exact.reference(world))
    assert len(world.responses) == 511 and world.horizon == 8
    assert (
        (likely * world.tree.lengths).sum(1) > 6
    ).all()  # though an untrained model ends a response after three
    share = (likely * world.reward).sum(1)
    assert ((share > 0.005) & (share < 0.05)).all() and set(np.unique(world.reward)) == {0.0, 1.0}
    np.testing.assert_allclose(
        policies.logits(policies.table(world), world.prompts, world.tree),
        policies.logits(model, world.prompts, world.tree),
        atol=1e-6,
    )
    reward, keys = lab.letters_in_place(2, world.tree, seed, keys=5, within=7)
    assert reward.tobytes() == world.reward.tobytes() and all(
        len(k) == 5 and max(k) == 6 for k in keys
    )
    for p, key in enumerate(keys):
        for y in np.random.default_rng(seed).choice(511, 60):
            text = world.response_text(int(y)).ljust(8, " ")
            assert world.reward[p, y] == all(text[t] == " ab"[v] for t, v in key.items())


def test_a_rare_end_changes_the_probability_of_the_end_alone():
    plain, rare = (policies.make("x", seed=1, horizon=4, rare_end=nats)[0] for nats in (0.0, 2.0))
    a, b = (exact.log_softmax(w.reference) for w in (plain, rare))
    np.testing.assert_allclose(
        a[..., 1] - a[..., 2], b[..., 1] - b[..., 2], atol=1e-6
    )  # letters among each other
    np.testing.assert_allclose((b[..., 0] - b[..., 1]) - (a[..., 0] - a[..., 1]), -2.0, atol=1e-6)
