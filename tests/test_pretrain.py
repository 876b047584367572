"""The two stages of pretraining, a few steps each: what they must do is run, resume and leave loadable weights."""

import pytest
import torch
from test_examples import run

from agents.policies.var_text import VARTextPolicy
from var_env import Tokenizer

SMALL = ["--batch", "4", "--log-every", "2", "--save-every", "2", "--image-every", "4", "--device", "cpu"]
SMALL += ["--tokenizer-steps", "6", "--policy-steps", "4", "--width", "32", "--layers", "1", "--heads", "2"]


def pretrain(stage, out, *options):
    """One call of the script; what it printed."""
    return run("pretrain", stage, "--out", out, *SMALL, *options)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    assert "used_codes" in pretrain("tokenizer", folder)
    assert "scale/6_8x8" in pretrain("policy", folder)
    return folder


def test_weights_load(out):
    tokenizer = Tokenizer.load(out / "tokenizer.safetensors")
    policy = VARTextPolicy.load(out / "policy.safetensors", tokenizer)
    assert policy.temperatures() == [1.0] * 6
    assert list((out / "tensorboard" / "policy").iterdir())


def test_another_call_tells_what_differs(tmp_path, capsys):
    """On a module of one weight: no training is needed to see it."""
    from agents.experiments import pretrain as script
    from agents.experiments import pretraining

    def run(*options, stage="policy"):
        args = script.parse([stage, *SMALL, "--out", str(tmp_path), *options])
        module = torch.nn.Linear(1, 1)
        return pretraining.Run(args, stage, module, [torch.optim.AdamW(module.parameters())])

    run().save(2)
    again = run("--seed", "1", "--policy-steps", "8")
    again.resume()
    told = capsys.readouterr().out
    assert again.first == 2 and "--seed 1, was 0: it is another run" in told and "--policy-steps 8, was 4: " in told
    with pytest.raises(SystemExit, match=r"--width 64, was 32: .*policy\.checkpoint\.pt goes on as it began"):
        run("--width", "64").resume()
    run(stage="tokenizer").save(2)
    with pytest.raises(SystemExit, match="--vocab-size 64, was 512: "):
        run("--vocab-size", "64", stage="tokenizer").resume()
    run(stage="tokenizer").resume()
    assert "was" not in capsys.readouterr().out


def test_it_learns(out, tmp_path):
    """On the same batches, longer training fits better."""
    (tmp_path / "tokenizer.safetensors").write_bytes((out / "tokenizer.safetensors").read_bytes())
    lines = pretrain(
        "policy", tmp_path, "--policy-steps", "60", "--log-every", "30", "--picture-every", "60"
    ).splitlines()
    losses = [float(line.split("  loss ")[1].split()[0]) for line in lines if "  loss " in line]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.3


def test_interrupted_and_resumed_is_uninterrupted(out, tmp_path, monkeypatch):
    from agents.experiments import pretrain as script
    from agents.experiments import pretraining

    (tmp_path / "tokenizer.safetensors").write_bytes((out / "tokenizer.safetensors").read_bytes())
    save = pretraining.Run.save

    def save_and_stop(run, step):
        save(run, step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretraining.Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        script.main(["policy", "--out", str(tmp_path), *SMALL])
    assert not (tmp_path / "policy.safetensors").exists()
    assert torch.load(tmp_path / "policy.checkpoint.pt", weights_only=True)["step"] == 2

    assert "going on from step 2" in pretrain("policy", tmp_path)
    tokenizer = Tokenizer.load(out / "tokenizer.safetensors")
    whole, resumed = (VARTextPolicy.load(folder / "policy.safetensors", tokenizer) for folder in (out, tmp_path))
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight)


def test_a_temperature_that_is_none(capsys):
    from agents.experiments import pretrain as script

    with pytest.raises(SystemExit):
        script.parse(["export", "--temperature", "0"])
    assert "--temperature must be above 0, got 0.0" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_moves_the_blocks_and_goes_on(out, tmp_path):
    """The matrices of the blocks are Muon's, all other weights AdamW's, and each weight is in one of them."""
    from agents.experiments import pretraining

    tokenizer = Tokenizer.load(out / "tokenizer.safetensors")
    policy = VARTextPolicy(tokenizer, width=32, layers=1, heads=2)
    muon, adamw = pretraining.optimizers_of(policy, "muon")
    theirs = [[id(p) for group in part.param_groups for p in group["params"]] for part in (muon, adamw)]
    names = {id(p): name for name, p in policy.named_parameters()}
    assert {names[p].split(".")[-1] for p in theirs[0]} == {"weight"} and len(theirs[0]) == 9  # 5 and the text's 4
    assert all("block" in names[p] for p in theirs[0])
    assert sorted(theirs[0] + theirs[1]) == sorted(p for p in names if names[p] != "sharpness")

    (tmp_path / "tokenizer.safetensors").write_bytes((out / "tokenizer.safetensors").read_bytes())
    pretrain("policy", tmp_path, "--optimizer", "muon", "--policy-steps", "2")
    assert "going on from step 2" in pretrain("policy", tmp_path, "--optimizer", "muon")
    policy.sharded_layers = ()
    with pytest.raises(ValueError, match=r"VARTextPolicy names no blocks .* take adamw"):
        pretraining.optimizers_of(policy, "muon")
