"""Settings: frozen, documented, validated; and what they compute from themselves."""

import pytest

from fiducial import kl_choice, verbs
from fiducial.building import build
from fiducial.errors import InputError
from fiducial.flags import flags
from fiducial.methods.settings.dpo import DPO
from fiducial.methods.settings.grpo import GRPO, VARIANTS
from fiducial.methods.settings.ppo import PPO
from fiducial.names import check_name
from fiducial.settings import KLSettings, RunSettings

VERBS = verbs.verbs()


def test_settings_refuse_to_be_changed():
    settings = DPO(model="m", data="d")
    with pytest.raises(ValueError, match="frozen"):
        settings.beta = 1.0  # type: ignore[misc]


def test_bad_python_settings_raise_a_value_error():
    with pytest.raises(ValueError, match="beta"):
        DPO(model="m", data="d", beta=-1)
    with pytest.raises(InputError, match="betta"):
        build(DPO, {"model": "m", "data": "d", "betta": 1})


NOT_ONE = {
    "collect --samples",  # responses are compared
    "demo --samples",
    "demo --prompts",
    "reinforce --group-size",  # a group is compared
    "grpo --group-size",
    "reinforce --batch-size",  # a batch is whole groups
    "grpo --batch-size",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_count_may_be_one_and_no_count_is_negative(verb):
    cls = verbs.resolve(VERBS[verb].settings)
    needed: dict = {n: "x" for n, f in cls.model_fields.items() if f.is_required()}

    def with_value(flag, value):
        values = dict(needed)
        at = values
        for part in flag.path[:-1]:
            at = at.setdefault(part, {})
        at[flag.path[-1]] = value
        if flag.path[-1] == "group_size":  # a batch is whole groups
            values["batch_size"] = 4
        return build(cls, values)

    counts = [f for f in flags(cls) if f.field.annotation in (int, int | None)]
    for flag in counts:
        # a row has at least a prompt and an answer
        if f"{verb} --{flag.name}" not in NOT_ONE and flag.name != "rows.max-length":
            with_value(flag, 1)
        if flag.name != "seed":
            with pytest.raises(InputError, match=f"--{flag.name}|--{flag.path[-1]}"):
                with_value(flag, -1)
    assert counts or verb in ("check", "demo", "report")


def test_a_section_that_is_built_keeps_the_defaults_of_its_method():
    built = build(DPO, {"model": "m", "data": "d", "optimizer": {"eps": 1e-6}})
    assert built.optimizer == DPO(model="m", data="d").optimizer.model_copy(update={"eps": 1e-6})
    assert built.optimizer.schedule == "constant"
    assert built.run == RunSettings()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_setting_is_explained_in_whole_sentences_of_two_lines_at_most(verb):
    cls = verbs.resolve(VERBS[verb].settings)
    assert (cls.__doc__ or "").strip().endswith(".")
    for flag in flags(cls):
        assert flag.text[:1].isupper() or flag.text.split()[0].rstrip(":").islower(), flag.name
        assert flag.text.endswith((".", "...")) and len(flag.text) <= 200, (flag.name, flag.text)
        assert "Ours" not in flag.text and "None: not" not in flag.text


def test_the_next_beta_leaves_the_settings_and_follows_the_target():
    held = KLSettings(target=2.0, horizon=100)
    assert (
        held.next_beta(0.5, 4.0, 50)
        == kl_choice.adapt(0.5, 4.0, target=2.0, episodes=50, horizon=100)
        == pytest.approx(0.5 * (1 + 0.2 * 50 / 100))
    )
    assert held.next_beta(0.5, 1.0, 50) < 0.5
    assert held == KLSettings(target=2.0, horizon=100)
    assert KLSettings().next_beta(0.5, 400.0, 50) == 0.5


@pytest.mark.parametrize("pair", sorted(kl_choice.REFUSED))
def test_a_penalty_with_a_wrong_gradient_is_refused_with_its_reason(pair):
    placement, estimator = pair
    with pytest.raises(ValueError, match=r"gradient|biased|differentiated"):
        KLSettings(placement=placement, estimator=estimator)


def test_a_target_with_a_coefficient_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"--kl\.target 3 with a beta of 0"):
        PPO(model="m", data="d", beta=0, kl={"target": 3})


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_variant_sets_its_parts_and_what_is_given_wins(variant):
    parts = GRPO(model="m", data="d", variant=variant).parts
    assert parts == VARIANTS[variant]
    changed = GRPO(model="m", data="d", variant=variant, loss_aggregation="constant", beta=0.5)
    assert changed.parts == VARIANTS[variant]._replace(loss_aggregation="constant", beta=0.5)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("model", "/no/such", "--flag: there is no folder /no/such"),
        ("model", "a/b/c", "--flag: there is no folder a/b/c"),
        ("rows", "rows.jsonl", "--flag: there is no file rows.jsonl"),
        ("rows", "rows.csv.gz", "--flag: there is no file"),
        ("scorer", "judge.py:score", "--flag: there is no file judge.py"),
        ("scorer", "./judge", "--flag: there is no folder ./judge"),
    ],
)
def test_a_name_that_can_only_be_a_path_is_refused_under_its_flag(kind, name, said):
    with pytest.raises(InputError, match=said):
        check_name(kind, name, "--flag")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("model", "gpt2"),
        ("model", "owner/name"),
        ("rows", "owner/name:train"),
        ("scorer", "module.sub:function"),
        ("scorer", "exact_match"),
    ],
)
def test_a_name_that_may_be_on_the_hub_or_in_python_is_left_to_the_loader(kind, name):
    check_name(kind, name, "--flag")


def test_a_path_that_exists_is_a_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "judge.py").write_text("")
    check_name("model", str(tmp_path), "--flag")
    check_name("rows", str(tmp_path / "rows.jsonl"), "--flag")
    check_name("scorer", f"{tmp_path / 'judge.py'}:score", "--flag")
