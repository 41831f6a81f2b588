"""The options: types, ranges and combinations."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from fusion_bench_smile import ConfigError, SmileConfig
from fusion_bench_smile.config import REMOVED, check_keys

BAD_OPTIONS = [
    ({"k": 0}, "k=0"),
    ({"k": -2}, "k=-2"),
    ({"gate_k": 0}, "gate_k=0"),
    ({"top_k": 0}, "top_k=0"),
    ({"k": 2.5}, "k=2.5 is not an integer"),
    ({"top_k": True}, "top_k=True is not an integer"),
    ({"gatek": 3}, "unknown option 'gatek' (did you mean 'gate_k'?)"),
    ({"device": "gpu"}, "device='gpu' is not a device"),
    ({"device": "cuda:77"}, "use device=auto"),
    ({"average_experts": "yes"}, "average_experts='yes' is not true or false"),
    ({"routing_scope": "tokens"}, "routing_scope='tokens' is not one of token, input"),
    ({"routing_scope": None}, "routing_scope=None is not one of token, input"),
    ({"execution": "fast"}, "execution='fast' is not one of auto, grouped, masked"),
    ({"refuse_unknown": True}, "refuse_unknown=true needs routing_scope=input"),
    ({"execution": "merged"}, "execution=merged was removed: execution=auto merges weights where it pays"),
    ({"gate_k": None, "k": -1}, "gate_k=null is the rank k of the experts, and k=-1 keeps them dense: set gate_k"),
    ({"gate_k": False}, "gate_k=False is not an integer"),
    ({"gate_k": "4"}, "gate_k='4' is not an integer"),
    ({"density": 0.02}, "density=0.02 keeps a share of dense deltas, which k=-1 gives; k is"),
    ({"density": 0, "k": -1}, "density=0 is not a share between 0 and 1"),
    ({"density": 1.0, "k": -1}, "density=1.0 is not a share between 0 and 1"),
    ({"density": "0.1", "k": -1}, "density='0.1' is not a share between 0 and 1"),
    ({"density": True, "k": -1}, "density=True is not a share between 0 and 1"),
    ({"param_ratio": 1.0}, "above 1"),
    ({"param_ratio": float("nan")}, "above 1"),
    ({"param_ratio": "1.5"}, "above 1"),
    ({"param_ratio": 1.5, "k": -1}, "k=-1"),
    ({"param_ratio": 1.5, "gate_k": 16, "k": 8}, "above k=8"),
    ({"param_ratio": 1.5, "gate_k": None}, "param_ratio needs a gate_k"),
    ({"byte_ratio": True}, "byte_ratio=True is not a number above 1"),
    ({"byte_ratio": 1.5, "param_ratio": 1.5}, "param_ratio and byte_ratio are two budgets of one model"),
    ({"storage": "int2"}, "storage='int2' is not one of same, int8, int4"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError) as error:
        SmileConfig.from_dict({"gate_k": 2, "k": 4, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["routing_score", "noise_baseline", "expert_parameters", "allocation"])
def test_a_removed_option_says_what_became_of_it(option):
    with pytest.raises(ConfigError, match=f"^the option {option} was removed: {re.escape(REMOVED[option])}$"):
        SmileConfig.from_dict({option: "x", "k": 4})
    assert SmileConfig.from_checkpoint({option: "x", "k": 4}) == SmileConfig(k=4)


@pytest.mark.parametrize("scope", ["two_pass", "global", "sequence"])
def test_a_removed_scope_names_its_successor(scope):
    message = f"^routing_scope={scope} is now routing_scope=input, one choice of experts for each input$"
    for make in (SmileConfig.from_dict, lambda options: SmileConfig(**options)):
        with pytest.raises(ConfigError, match=message):
            make({"routing_scope": scope})
    assert SmileConfig.from_checkpoint({"routing_scope": scope}) == SmileConfig(routing_scope="input")


def test_the_rank_of_the_router_is_that_of_the_experts_if_it_is_none():
    assert (SmileConfig(gate_k=None, k=4).router_rank, SmileConfig(gate_k=2, k=4).router_rank) == (4, 2)
    assert SmileConfig.from_dict(SmileConfig(gate_k=None).to_dict()) == SmileConfig(gate_k=None)
    assert SmileConfig(gate_k=None, byte_ratio=1.5, routing_use_diff=False).has_budget  # the router has rows of its own


def test_json_values_and_back():
    config = SmileConfig(k=-1, target_modules=["a.*"], exclude_modules="b")
    assert SmileConfig.from_dict(config.to_dict()) == config
    assert config.target_modules == ("a.*",)
    assert config.exclude_modules == ("b",)
    assert SmileConfig(exclude_modules=None).exclude_modules == ()
    assert list(config.to_dict()) == [field.name for field in dataclasses.fields(SmileConfig)]


def test_the_defaults_are_the_frameworks():
    config = SmileConfig()
    assert (config.gate_k, config.k, config.top_k) == (16, 32, 1)
    assert (config.routing_use_diff, config.average_experts, config.full_matrices) == (True, False, False)
    assert (config.routing_scope, config.execution, config.storage) == ("token", "auto", "same")


def test_the_second_name_of_the_device_takes_precedence():
    assert SmileConfig(device="cuda:99", upscaling_accelerator="cpu").compute_device == torch.device("cpu")
    assert SmileConfig(device="cpu").compute_device == torch.device("cpu")


def test_a_checkpoint_does_not_bind_to_the_device_that_wrote_it():
    options = {"k": 4, "gate_k": 2, "device": "cuda:99", "upscaling_accelerator": "cuda:99"}
    config = SmileConfig.from_checkpoint(options)
    assert (config.k, config.device, config.upscaling_accelerator) == (4, "auto", None)


def test_either_a_config_or_keywords():
    config = SmileConfig(k=4)
    assert SmileConfig.resolve(config, {}) is config
    assert SmileConfig.resolve(None, {"k": 4}) == config
    assert SmileConfig.resolve(None, {}) == SmileConfig()
    with pytest.raises(ConfigError, match=r"either config or keywords, not both \(got k, top_k\)"):
        SmileConfig.resolve(config, {"k": 4, "top_k": 1})


def test_unknown_keys_are_named_with_the_nearest_valid_one():
    check_keys({"one": 1}, ["one", "two"])
    with pytest.raises(
        ConfigError, match=r"unknown option 'tow' \(did you mean 'two'\?\), 'x'; valid options: one, two"
    ):
        check_keys({"one": 1, "tow": 2, "x": 3}, ["one", "two"])
