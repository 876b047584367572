import pytest
import torch
from tiny import STEPS_A_ROLLOUT, tiny_envs, tiny_policy

import agents
from agents import GRPO, PANW, VMR, Agent, MaskPropagation, Wrapper, registry
from agents.registry import AGENTS, BUNDLES, VARIANTS, Registry, known, listing, make, options_of, parts_of, register

NAMES = [*known(), *VARIANTS, *BUNDLES]


@pytest.fixture
def made(parts):
    """`make` for the small world."""

    def call(recipe, **options):
        available = registry.options_in(recipe)
        settings = {"group_size": 4, "prompts_per_update": 2, "seed": 0, "device": "cpu"}
        settings = {name: value for name, value in settings.items() if name in available} | options
        return make(recipe, tiny_envs(parts), tiny_policy(parts["tokenizer"]), **settings)

    return call


@pytest.fixture
def own_names(monkeypatch):
    """What a test registers is forgotten after it."""
    known()
    monkeypatch.setattr(AGENTS, "_entries", dict(AGENTS))


class TestRegistry:
    def test_is_a_mapping_in_the_order_of_registration(self):
        shapes = Registry("shape")
        square = shapes.register("square")(lambda side: side**2)
        cube = shapes.register("cube")(lambda side: side**3)
        assert shapes["square"] is square and dict(shapes) == {"square": square, "cube": cube}
        assert list(shapes) == ["square", "cube"] and len(shapes) == 2
        assert "cube" in shapes and "circle" not in shapes

    def test_gives_back_what_it_decorates(self):
        shapes = Registry("shape")

        @shapes.register("circle")
        class Circle:
            pass

        assert isinstance(Circle, type) and shapes["circle"] is Circle

    def test_a_name_is_taken_once(self):
        shapes = Registry("shape")
        shapes.register("square")(1)
        with pytest.raises(ValueError, match="a shape called 'square' already"):
            shapes.register("square")
        assert shapes["square"] == 1

    def test_an_unknown_name_lists_the_known_ones(self):
        shapes = Registry("shape")
        shapes.register("square")(1)
        shapes.register("cube")(2)
        with pytest.raises(ValueError, match="unknown shape 'circle': choose one of square, cube"):
            shapes["circle"]
        with pytest.raises(ValueError, match="unknown shape"):
            shapes[["square"]]


class TestRecipes:
    def test_an_algorithm_alone(self, made):
        agent = made("grpo", kl_coef=0.5)
        assert type(agent) is GRPO and agent.kl_coef == 0.5 and agent.group_size == 4

    def test_wrappers_go_around_from_the_inside_out_and_options_where_they_belong(self, made):
        agent = made("vmr+panw+mp", alpha=0.9, split=1, suffix_samples=3, kl_coef=0.1, dilation=2)
        assert [type(wrapper) for wrapper in agent.wrappers] == [PANW, MaskPropagation]
        assert type(agent) is MaskPropagation and type(agent.agent) is PANW and type(agent.unwrapped) is VMR
        assert agent.dilation == 2 and agent.agent.alpha == 0.9
        core = agent.unwrapped
        assert (core.split, core.suffix_samples, core.kl_coef) == (1, 3, 0.1)

    def test_a_recipe_that_starts_with_a_wrapper_wraps_grpo(self, made):
        agent = made("mp+panw")
        assert [type(wrapper) for wrapper in agent.wrappers] == [MaskPropagation, PANW]
        assert type(agent.unwrapped) is GRPO

    def test_a_bundle_is_several_wrappers(self, made, monkeypatch):
        monkeypatch.setitem(BUNDLES, "both", ("panw", "mp"))
        assert parts_of("vmr+both") == parts_of("vmr+panw+mp") and parts_of("both") == [GRPO, PANW, MaskPropagation]
        assert made("both", alpha=0.3).agent.alpha == 0.3

    def test_a_variant_is_an_algorithm_with_options_that_may_be_changed(self, made):
        agent = made("gspo+panw", clip_range=0.1)
        assert type(agent.unwrapped) is GRPO and agent.ratio_level == "sequence"
        assert agent.clip_range == 0.1 and agent.clip_range_high == VARIANTS["gspo"].options["clip_range_high"]
        assert registry.options_in("gspo+panw")["ratio_level"] == "sequence"
        assert registry.options_in("grpo")["ratio_level"] == "token"

    def test_what_is_made_learns(self, made):
        assert made("panw+mp").learn(STEPS_A_ROLLOUT).n_updates == 1

    @pytest.mark.parametrize("name", NAMES)
    def test_every_name_can_be_made(self, made, name):
        agent = made(name)
        assert isinstance(agent, Agent | Wrapper)
        assert [type(agent.unwrapped), *map(type, agent.wrappers)] == parts_of(name)

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ("grop", "unknown agent 'grop' in 'grop': choose from grpo, .*panw"),
            ("vmr+pnaw", "unknown agent 'pnaw'"),
            ("", "unknown agent ''"),
            ("grpo+", "unknown agent ''"),
            ("grpo+vmr", r"'grpo\+vmr' names two algorithms"),
            ("panw+vmr", "two algorithms"),
            ("panw+gspo", "two algorithms"),
        ],
    )
    def test_bad_recipes(self, made, recipe, message):
        with pytest.raises(ValueError, match=message):
            make(recipe, env=None)

    @pytest.mark.parametrize("recipe", ["grpo", "vmr+mp", "gspo"])
    def test_an_option_that_no_part_has(self, made, recipe):
        with pytest.raises(ValueError, match=r"has no option 'alpha': it has .*kl_coef"):
            made(recipe, alpha=0.6)

    def test_the_package_exports_them(self):
        assert agents.make is make and agents.register is register


class TestThirdParties:
    def test_a_wrapper(self, made, own_names):
        @register("coarse_only")
        class CoarseOnly(Wrapper):
            """Learns the first scales only."""

            def __init__(self, agent, *, scales=2):
                super().__init__(agent)
                self.scales = scales

            def token_weights(self, rollout, steps):
                weights = self.agent.token_weights(rollout, steps)
                mask = torch.zeros_like(weights.policy)
                mask[:, : sum(self.schedule_sizes()[: self.scales])] = 1
                return weights._replace(policy=weights.policy * mask)

            def schedule_sizes(self):
                return self.unwrapped.policy.schedule.sizes

        agent = made("vmr+panw+coarse_only", scales=1, alpha=0.8)
        assert type(agent) is CoarseOnly and agent.scales == 1 and agent.agent.alpha == 0.8
        weights = agent.token_weights(agent.sample(), range(3))
        assert (weights.policy[:, 0] > 0).all() and (weights.policy[:, 1:] == 0).all()
        assert "  coarse_only     Learns the first scales only." in listing().splitlines()

    def test_an_algorithm(self, made, own_names):
        @register("sign")
        class Sign(GRPO):
            """Advantages of plus and minus one."""

            def __init__(self, policy, env, *, size=1.0, **grpo):
                super().__init__(policy, env, **grpo)
                self.size = size

            def advantages(self, rollout, steps):
                return self.size * super().advantages(rollout, steps).sign()

        agent = made("sign+panw", size=2.0, kl_coef=0.0)
        rollout = agent.unwrapped.judge(agent.sample(), range(3))
        assert set(rollout.advantages.tolist()) == {2.0, -2.0}
        with pytest.raises(ValueError, match="two algorithms"):
            made("sign+grpo")
        with pytest.raises(ValueError, match="'sign' already"):
            register("sign")

    def test_are_forgotten_by_the_other_tests(self):
        assert not {"sign", "coarse_only"} & known().keys()


class TestOptions:
    def test_follow_the_keywords_that_are_handed_on(self):
        found = options_of(VMR)
        assert found["eta"] == 1.0 and found["kl"] == "k3" and found["learning_rate"] == 5e-5
        assert "policy" not in found and "env" not in found and "_init_setup_model" not in found
        assert options_of(GRPO).keys() == found.keys() - {
            "split",
            "suffix_samples",
            "eta",
            "suffix_kl_coef",
            "prefix_updates",
            "suffix_updates",
            "alternation",
        }

    def test_stop_where_nothing_is_handed_on(self):
        class Closed(VMR):
            def __init__(self, policy, env, *, depth=3):
                super().__init__(policy, env)

        assert options_of(Closed) == {"depth": 3}
        assert options_of(PANW) == {"alpha": 0.6}

    def test_a_subclass_changes_a_default_and_one_without_a_constructor_nothing(self):
        class Careful(GRPO):
            def __init__(self, policy, env, *, kl_coef=1.0, **grpo):
                super().__init__(policy, env, kl_coef=kl_coef, **grpo)

        class MoreCareful(Careful):
            pass

        assert options_of(Careful)["kl_coef"] == 1.0 and options_of(MoreCareful) == options_of(Careful)
        assert options_of(Careful).keys() == options_of(GRPO).keys()

    def test_one_option_goes_to_all_that_have_it(self, made, own_names):
        @register("listener")
        class Listener(Wrapper):
            """Has an option of the same name as the algorithm."""

            def __init__(self, agent, *, kl_coef=0.7):
                super().__init__(agent)
                self.__dict__["kl_coef"] = kl_coef

        agent = made("grpo+listener", kl_coef=0.2)
        assert agent.kl_coef == 0.2 == agent.unwrapped.kl_coef


class TestListing:
    @pytest.mark.parametrize("name", known())
    def test_every_class_says_its_idea_in_one_line(self, name):
        summary = registry.summary_of(known()[name])
        assert 20 <= len(summary) <= 90 and summary.endswith(".") and summary[0].isupper()

    @pytest.mark.parametrize("name", VARIANTS)
    def test_every_variant_changes_options_that_there_are(self, name):
        summary, of, options = VARIANTS[name]
        assert 0 < len(summary) <= 90 and options
        assert options.keys() <= options_of(known()[of]).keys()

    def test_has_a_line_for_every_name(self):
        lines = [line.split(maxsplit=1) for line in listing().splitlines() if line.startswith("  ")]
        assert sorted(name for name, _ in lines) == sorted([*known(), *VARIANTS, *BUNDLES])

    def test_tells_algorithms_from_wrappers(self):
        algorithms, wrappers = listing().split("Wrappers")
        assert "  vmr " in algorithms and "  dapo " in algorithms
        assert "  panw " in wrappers and "  stage " in wrappers and "  panw " not in algorithms
