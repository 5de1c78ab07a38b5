"""What is planned for a mixture of experts, and what is refused before anything is read."""

import pytest
import tiny

from converters.checkpoint import open_checkpoint
from runtime import machine
from runtime.config import EngineConfig
from runtime.errors import ConfigError
from runtime.preparation import prepare


def planned(folder, family, **wishes):
    checkpoint = open_checkpoint(tiny.make_checkpoint(family, folder))
    return prepare(EngineConfig(model=str(folder), **wishes), checkpoint, machine.here())


def test_the_plan_tells_of_experts(tmp_path):
    rows = {name: (value, why) for name, value, why in planned(tmp_path, "qwen3_moe").plan.reasons}
    assert rows["experts"] == ("8", "3 a token")


def test_whole_experts_are_part_of_what_programs_are_kept_under(tmp_path):
    split, whole = (planned(tmp_path, "mixtral", enable_expert_parallel=on).facts for on in (False, True))
    assert {name for name in split if split[name] != whole[name]} == {"model"}


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_experts_are_not_rounded(tmp_path, method):
    with pytest.raises(ConfigError, match=f"quantization {method} does not round the weights of experts yet; leave it"):
        planned(tmp_path, "mixtral", quantization=method)


def test_a_model_without_experts_has_none_to_spread(tmp_path):
    with pytest.raises(ConfigError, match="enable_expert_parallel spreads experts, and this model has none; leave it"):
        planned(tmp_path, "llama", enable_expert_parallel=True)
