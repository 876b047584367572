"""Files of weights, and which tokenizer a policy belongs to."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_policy

from agents.policies import load_policy
from agents.policies.table import TablePolicy
from agents.policies.var_text import VARTextPolicy
from var_env import Tokenizer
from var_env.tabular import TableTokenizer, table_schedule
from var_env.weights import fingerprint, load_config_and_weights, read_metadata
from var_env.weights import load_weights as load_into


def other_tokenizer(schedule, seed=1, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"vocab_size": 32, "channels": 4, "width": 8, "blocks": 1} | options
        return Tokenizer(schedule, **sizes).eval().requires_grad_(False)


class TestFingerprint:
    def test_is_the_same_for_the_same(self, tokenizer, schedule):
        assert fingerprint(tokenizer) == fingerprint(other_tokenizer(schedule, seed=0))
        assert len(fingerprint(tokenizer)) == 16

    @pytest.mark.parametrize("half", [False, True])
    def test_of_a_copy_on_disk(self, tokenizer, tmp_path, half):
        tokenizer.save(tmp_path / "copy.safetensors", half)
        copy = Tokenizer.load(tmp_path / "copy.safetensors")
        assert torch.equal(copy.codebook, tokenizer.codebook) is not half
        assert fingerprint(copy) == fingerprint(tokenizer)

    def test_one_weight_makes_another(self, tokenizer):
        before = fingerprint(tokenizer)
        tokenizer.codebook[0, 0] += 1
        assert fingerprint(tokenizer) != before

    def test_a_setting_makes_another_unless_it_is_the_default(self, tokenizer):
        before = fingerprint(tokenizer)
        tokenizer.config["added"] = 1
        assert fingerprint(tokenizer) != before
        del tokenizer.config["added"]
        tokenizer.config["width"] = 128  # the constructor's default
        without = fingerprint(tokenizer)
        del tokenizer.config["width"]
        assert fingerprint(tokenizer) == without != before

    def test_names_and_shapes_count(self):
        def module(**tensors):
            found = torch.nn.Module()
            for name, values in tensors.items():
                found.register_buffer(name, torch.tensor(values))
            return fingerprint(found)

        values = [1.0, 2.0]
        kinds = [module(a=values), module(b=values), module(a=[values]), module(a=[1, 2]), module(a=1.0), module()]
        assert len(set(kinds)) == len(kinds)


class TestPolicies:
    def test_another_tokenizer_of_the_same_shape_is_refused(self, tokenizer, schedule, tmp_path):
        path = tmp_path / "policy.safetensors"
        tiny_policy(tokenizer).save(path)
        assert read_metadata(path, "")["tokenizer"] == fingerprint(tokenizer)
        for load in (load_policy, VARTextPolicy.load):
            with pytest.raises(ValueError, match=r"policy\.safetensors was trained on another tokenizer") as error:
                load(path, other_tokenizer(schedule))
            assert "\n" not in str(error.value) and fingerprint(tokenizer) in str(error.value)

    @pytest.mark.parametrize("half", [False, True])
    def test_its_own_is_taken_in_either_precision(self, tokenizer, tmp_path, half):
        tokenizer.save(tmp_path / "tokenizer.safetensors", half=not half)
        tiny_policy(tokenizer).save(tmp_path / "policy.safetensors", half)
        policy = load_policy(tmp_path / "policy.safetensors", Tokenizer.load(tmp_path / "tokenizer.safetensors"))
        policy.save(tmp_path / "again.safetensors")
        assert load_policy(tmp_path / "again.safetensors", tokenizer).tokenizer is tokenizer

    def test_a_file_without_a_fingerprint_goes_with_any(self, tokenizer, schedule, tmp_path):
        path = tmp_path / "policy.safetensors"
        tiny_policy(tokenizer).save(path)
        metadata = read_metadata(path, "")
        del metadata["tokenizer"]
        save_file(load_file(path), tmp_path / "old.safetensors", metadata)
        assert load_policy(tmp_path / "old.safetensors", other_tokenizer(schedule)).config

    def test_made_from_an_object_it_is_taken_as_it_is(self, schedule, tmp_path):
        moved = tiny_policy(other_tokenizer(schedule))
        moved.save(tmp_path / "policy.safetensors")
        assert load_policy(tmp_path / "policy.safetensors", other_tokenizer(schedule)).tokenizer is not moved.tokenizer

    def test_of_other_projects(self, tmp_path):
        """Every policy whose file is made by `save_module` and read by `load_weights`."""
        table, other = (TableTokenizer(table_schedule([(1, 1), (2, 2)]), codes) for codes in (2, 3))
        TablePolicy(table).save(tmp_path / "table.safetensors")
        assert TablePolicy.load(tmp_path / "table.safetensors", table).tokenizer is table
        with pytest.raises(ValueError, match="another tokenizer"):
            TablePolicy.load(tmp_path / "table.safetensors", other)

    def test_a_plain_state_dict_is_loaded_as_before(self, tokenizer, schedule, tmp_path):
        policy = tiny_policy(tokenizer)
        policy.save(tmp_path / "policy.safetensors")
        _, weights = load_config_and_weights(tmp_path / "policy.safetensors", "")
        moved = tiny_policy(other_tokenizer(schedule), seed=1)
        with pytest.raises(ValueError, match="another tokenizer"):
            load_into(moved, weights, "here")
        load_into(moved, dict(weights), "here")
        assert torch.equal(moved.sharpness, policy.sharpness)
