"""The options that all runs of a comparison have in common."""

import pytest
from test_comparable import comparison
from test_examples import weights  # noqa: F401 (a fixture)

from agents import Decoding
from agents.common.schedules import WarmupCosine, WarmupLinear
from agents.experiments import compare
from agents.experiments.run_options import Preset, learning_rate_of, sampler_of
from agents.policies.var_text import VARTextPolicy
from var_env.tokenizers import load_tokenizer


def rate_of(**changes):
    return learning_rate_of({"learning_rate": 1e-4, "schedule": "constant", "warmup": 0.0} | changes)


def test_a_learning_rate_is_a_number_or_a_schedule():
    assert rate_of() == 1e-4
    assert rate_of(warmup=0.1) == WarmupLinear(1e-4, 0.1, end=1e-4)
    assert rate_of(schedule="linear", warmup=0.1) == WarmupLinear(1e-4, 0.1)
    assert rate_of(schedule="cosine") == WarmupCosine(1e-4, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "square"}, "unknown schedule 'square': choose one of constant, linear, cosine"),
        ({"warmup": 1.0}, "warmup must be a share of the training"),
        ({"schedule": "linear", "learning_rate": 0.0}, "start must be a finite learning rate above 0, got 0"),
        ({"temperature": -1.0}, "--temperature must be at least 0, got -1"),
        ({"images": 0}, "images must be at least 1"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        Preset(**changes)


def test_an_agent_gets_the_schedule_with_its_own_rate(weights):  # noqa: F811
    found = comparison(weights, "--agents", "grpo", "--learning-rate", "1e-3")
    cell = found.cell("grpo", 0)
    assert found.agent(cell).unwrapped.learning_rate == 1e-3
    assert found.asked(cell)["schedule"] == "constant"
    found = comparison(
        weights, "--agents", "grpo", "--learning-rate", "1e-3", "--schedule", "linear", "--warmup", "0.1"
    )
    assert found.agent(found.cell("grpo", 0)).unwrapped.learning_rate == WarmupLinear(1e-3, 0.1)


def test_the_papers_preset():
    args = compare.parse(["--preset", "paper", "--images", "6400", "--suffix-samples", "4", "--agents", "grpo", "vmr"])
    assert (args.settings.images, args.settings.group_size, args.settings.prompts_per_update) == (6400, 16, 16)
    sampler = Decoding(top_k=2, top_p=0.9, guidance=5.0)
    assert sampler_of(vars(args.settings)) == sampler_of(vars(args.settings), evaluating=True) == sampler
    assert (args.method["split"], args.method["suffix_samples"], args.method["weight_decay"]) == ("quarter", 4, 0.05)


@pytest.mark.parametrize("option", [("--top-p", "0"), ("--guidance", "-1"), ("--top-k", "-1")])
def test_a_sampler_that_cannot_be(option):
    with pytest.raises(SystemExit, match="must"):
        compare.parse(list(option))


def test_guidance_that_the_policy_cannot_bear(weights, tmp_path):  # noqa: F811
    options = dict(zip(weights[::2], weights[1::2], strict=True))
    policy = VARTextPolicy.load(options["--policy"], load_tokenizer(options["--tokenizer"]))
    policy.config["null_prompt"] = False
    policy.save(tmp_path / "policy.safetensors")
    options["--policy"] = str(tmp_path / "policy.safetensors")
    given = [part for pair in options.items() for part in pair]
    with pytest.raises(ValueError, match="never seen an empty prompt"):
        comparison(given, "--preset", "paper", "--agents", "grpo")


def test_an_unknown_schedule_is_refused_by_the_command(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["--schedule", "square"])
    assert "invalid choice: 'square'" in capsys.readouterr().err
