"""Recipes: the shipped ones, a user's own, and what is refused; bit widths; hyper-parameters left to the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from edadm_cli.config import BitWidth, ReconstructConfig
from edadm_cli.errors import UsageError
from edadm_cli.models.registry import known_models
from edadm_cli.recipe import LearnRecipe, Recipe, load_recipe, shipped_recipes
from edadm_cli.reconstruct.hyperparameters import resolve

SHIPPED = (
    "default",
    "default-attention",
    "gptq",
    "network-wise",
    "normal-steps",
    "paper",
    "ptq4dm",
    "q-diffusion",
    "quick",
    "rtn",
    "thorough",
    "uniform-steps",
)


def _written(folder: Path, text: str, name: str = "own.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_these_recipes_are_shipped() -> None:
    assert tuple(shipped_recipes()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_under_its_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_shipped_recipes_are_what_they_are_named_after() -> None:
    paper, rtn, ptq4dm, q_diffusion, default = (
        load_recipe(name) for name in ("paper", "rtn", "ptq4dm", "q-diffusion", "default")
    )
    assert (paper.select.strategy, paper.ranges.activation, paper.ranges.norm) == ("tdac", "search", 2.4)
    assert paper.attention.quantize
    assert paper.output_float_input
    assert (paper.learn.input_drop, paper.learn.activation_drop, paper.learn.rounding_regularizer) == (
        0.5,
        0.5,
        0.001,
    )
    assert (rtn.ranges.weight, rtn.ranges.activation, rtn.learn.granularity) == ("minmax", "minmax", "none")
    assert (ptq4dm.select.strategy, ptq4dm.learn.granularity) == ("normal", "none")
    assert (q_diffusion.select.strategy, q_diffusion.learn.layer_loss_weight) == ("uniform", 0)
    assert (q_diffusion.learn.rounding_first, q_diffusion.edge_weight_bits) == (0.8, None)
    assert (paper.select.model_radius, paper.learn.mixed_inputs) == (True, "hidden")
    with_attention = load_recipe("default-attention").model_copy(
        update={"name": "default", "description": default.description, "attention": default.attention}
    )
    assert load_recipe("default-attention").attention.quantize
    assert with_attention == default
    fields = Recipe(name="default", description=default.description)
    later = {
        "learn": fields.learn.model_copy(update={"rounding_sharpness": 20.0}),
        "ranges": fields.ranges.model_copy(update={"pooled": True}),
    }
    assert default == fields.model_copy(update=later), "the defaults of the fields, and what came later"
    assert paper.learn.rounding_sharpness == 20
    thorough = load_recipe("thorough")
    assert (thorough.select.samples_per_trajectory, thorough.learn.layer_loss_weight) == (4, 0)
    assert thorough.ranges.float_input_share == 0.05


@pytest.mark.parametrize(("name", "strategy"), [("uniform-steps", "uniform"), ("normal-steps", "normal")])
def test_an_ablation_differs_from_default_in_one_field(name: str, strategy: str) -> None:
    recipe, default = load_recipe(name), load_recipe("default")
    as_default = {"name": "default", "description": default.description, "select": default.select}
    assert recipe.model_copy(update=as_default) == default
    assert recipe.select == default.select.model_copy(update={"strategy": strategy})


def test_a_later_field_changes_the_identity_only_where_it_changes_what_is_done() -> None:
    def identity(recipe: Recipe) -> dict[str, object]:
        config = ReconstructConfig(bits=BitWidth.parse("w4a8"), recipe=recipe)
        learned: dict[str, object] = config.identity_fields()["recipe"]["learn"]
        return learned

    names = {"rounding_sharpness", "rounding_sharpness_start"}
    assert not names & identity(Recipe(name="earlier")).keys()
    assert identity(load_recipe("default"))["rounding_sharpness"] == 20
    assert not names & resolve(LearnRecipe(), None, BitWidth.parse("w4a8")).identity_fields().keys()
    assert "iterations" in resolve(LearnRecipe(), None, BitWidth.parse("w4a8")).identity_fields()


@pytest.mark.parametrize(("bits", "rates"), [("w4a8", (5e-1, 5e-4)), ("w4a4", (5e-1, 5e-4)), ("w8a8", (5e-2, 1e-3))])
def test_what_paper_leaves_to_the_model_is_the_published_number(bits: str, rates: tuple[float, float]) -> None:
    learn = load_recipe("paper").learn
    assert learn.iterations is None
    actual = resolve(learn, known_models()["ddpm-cifar10"].paper, BitWidth.parse(bits))
    assert (actual.iterations, actual.batch_size, actual.layer_loss_weight) == (5000, 32, 0.8)
    assert (actual.weight_learning_rate, actual.activation_learning_rate) == rates
    assert not actual.relative_scale_steps


def test_a_number_that_is_given_is_not_left_to_the_model() -> None:
    learn = LearnRecipe(iterations=7, weight_learning_rate=0.25, batch_size=None)
    actual = resolve(learn, known_models()["ddpm-cifar10"].paper, BitWidth.parse("w4a8"))
    assert (actual.iterations, actual.weight_learning_rate, actual.batch_size) == (7, 0.25, 32)


def test_a_model_without_published_numbers_has_some_all_the_same() -> None:
    actual = resolve(load_recipe("paper").learn, None, BitWidth.parse("w4a8"))
    assert actual.iterations > 0


def test_the_word_model_in_a_users_recipe_leaves_a_number_open(tmp_path: Path) -> None:
    recipe = load_recipe(_written(tmp_path, 'extends = "default"\n[learn]\niterations = "model"\n'))
    assert recipe.learn.iterations is None
    assert recipe.learn.batch_size == load_recipe("default").learn.batch_size


def test_a_users_recipe_changes_only_what_it_names(tmp_path: Path) -> None:
    text = 'extends = "ptq4dm"\n[learn]\niterations = 5\n[[layers]]\npattern = "conv_in"\nexclude = true\n'
    recipe, base = load_recipe(_written(tmp_path, text)), load_recipe("ptq4dm")
    assert recipe.name == "own"
    assert recipe.learn == base.learn.model_copy(update={"iterations": 5})
    assert recipe.select == base.select
    assert [rule.pattern for rule in recipe.layers] == ["conv_in"]


def test_a_recipe_finds_its_base_beside_itself(tmp_path: Path) -> None:
    _written(tmp_path, 'extends = "rtn"\nedge_weight_bits = 6\n', "base.toml")
    recipe = load_recipe(_written(tmp_path, 'extends = "base.toml"\nedge_activation_bits = 7\n'))
    assert (recipe.edge_weight_bits, recipe.edge_activation_bits, recipe.name) == (6, 7, "own")
    assert recipe.learn.granularity == "none"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("iteration = 5", "iteration: there is no such field"),
        ("[learn]\niterations = -1", r"learn\.iterations"),
        ("[learn]\niterations = 'many'", r"learn\.iterations: .*got 'many'"),
        ("[learn]\nweight_learning_rate = inf", r"learn\.weight_learning_rate: .*finite"),
        ("learn = 3", r"learn: a table is expected; got 3"),
        ("layers = 3", r"layers: a list is expected; got 3"),
        ("[learn]\nrate = 5", r"learn\.rate"),
        ("[select]\nstrategy = 5", r"select\.strategy"),
        ('[[layers]]\npattern = "a"\nweight_bits = 9', r"layers\.0\.weight_bits"),
        ("[[layers]]\nweight_bits = 4", r"layers\.0\.pattern"),
        ('[[layers]]\npattern = "a"\nexclude = true\nweight_bits = 4', "both excludes"),
        ('extends = "nothing"', "no recipe '.*nothing'"),
        ("[learn\n", "not readable TOML"),
        ("iterations 5", "not readable TOML"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        load_recipe(_written(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"), [("edge_wieght_bits = 8", "edge_weight_bits"), ("[learn]\niteratoins = 5", "iterations")]
)
def test_a_message_names_the_field_that_was_meant(tmp_path: Path, text: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(_written(tmp_path, text))
    assert caught.value.hint == f"did you mean '{meant}'?"


def test_a_misspelt_recipe_is_answered_with_the_known_one() -> None:
    with pytest.raises(UsageError, match="There is no recipe 'quik'") as caught:
        load_recipe("quik")
    assert caught.value.hint == "did you mean 'quick'?"


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not readable TOML"):
        load_recipe(str(tmp_path / "own.toml"))


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'extends = "{path}"\n')
    with pytest.raises(UsageError, match="extends itself"):
        load_recipe(str(path))


def test_a_recipe_that_is_nowhere_is_refused_with_the_shipped_names() -> None:
    with pytest.raises(UsageError, match=", ".join(SHIPPED)) as caught:
        load_recipe("best")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "w8a8",
        "w6a6",
        "w4a8",
        "w4a4",
        "w3a5",
        "W4A8",
        " w2a2 ",
        "w4.25a8",
        "w1.5miba8",
        "w4.25g32a8",
        "w1.5mibg32a8",
        "w12345.678miba8",
        "w0.001miba4",
        "w4g32a8",
        "W3G8A8",
    ],
)
def test_bit_widths_are_read_and_written(text: str) -> None:
    assert str(BitWidth.parse(text)) == text.strip().lower()


@pytest.mark.parametrize("text", ["w9a8", "w4", "banana", "", "w1a8", "w4a16", "w04a8", "a8w4", "w4a8x", "w4a8\nw4a8"])
def test_other_bit_widths_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="2 to 8 each") as caught:
        BitWidth.parse(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["w8g32a8", "w5g32a8", "w4g4a8", "w4g1025a8"])
def test_groups_that_are_not_possible_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="from 8 to 1024 weights of at most 4 bits"):
        BitWidth.parse(text)
