"""What generation_config.json says of requests that leave a field out, and of tokens that end an answer."""

import json
import types

import pytest

from runtime.config import EngineConfig
from runtime.errors import ConfigError
from runtime.loading import default_sampling, end_tokens

OWN = {"temperature": 0.6, "top_p": 1.0, "top_k": 20, "max_new_tokens": 9, "do_sample": False, "eos_token_id": 3}


def checkpoint(generation_config, hf_config=None):
    return types.SimpleNamespace(generation_config=generation_config, hf_config=hf_config or {})


@pytest.mark.parametrize(
    "wishes, expected",
    [
        ({}, {"temperature": 0.6, "top_k": 20, "max_new_tokens": 9}),  # top_p says what everybody's does
        ({"generation_config": "vllm"}, {}),
        ({"generation_config": "vllm", "override_generation_config": {"min_p": 0.1}}, {"min_p": 0.1}),
        (
            {"override_generation_config": {"temperature": 0.2}},
            {"temperature": 0.2, "top_k": 20, "max_new_tokens": 9},
        ),
        # What is laid over counts though it is what everybody's says: 50 is not what requests get otherwise.
        ({"override_generation_config": {"top_k": 50}}, {"temperature": 0.6, "top_k": 50, "max_new_tokens": 9}),
        ({"override_generation_config": {"max_new_tokens": None}}, {"temperature": 0.6, "top_k": 20}),
    ],
)
def test_the_models_values_and_what_is_laid_over_them(wishes, expected):
    assert default_sampling(EngineConfig(model="m", **wishes), checkpoint(OWN)) == expected


def test_another_folders_values_can_be_taken(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1}))
    config = EngineConfig(model="m", generation_config=str(tmp_path))
    assert default_sampling(config, checkpoint(OWN)) == {"repetition_penalty": 1.1}
    with pytest.raises(ConfigError, match="generation_config"):
        default_sampling(EngineConfig(model="m", generation_config=str(tmp_path / "none")), checkpoint(OWN))


@pytest.mark.parametrize(
    "listed, in_config, primary, expected",
    [
        ([2, 0], None, 2, (2, {0, 2})),
        (3, 4, 2, (2, {2, 3})),
        (None, [4, 5], 2, (2, {2, 4, 5})),
        ([7, 8], None, None, (7, {7, 8})),
    ],
)
def test_every_listed_id_ends_an_answer_and_the_tokenizers_is_the_primary(listed, in_config, primary, expected):
    own = {} if listed is None else {"eos_token_id": listed}
    found = end_tokens(checkpoint(own, {"eos_token_id": in_config}), types.SimpleNamespace(eos_token_id=primary))
    assert found == expected
