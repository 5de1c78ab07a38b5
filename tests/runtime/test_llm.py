"""The LLM of notebooks: prompts in every form, and what is none is refused before anything runs."""

import numpy as np
import pytest
import tiny

from runtime import LLM, SamplingParams
from runtime.errors import RequestRefused

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny.make_checkpoint("llama", tmp_path_factory.mktemp("model"))
    return LLM(str(folder), max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64)


def test_a_prompt_is_the_same_in_every_form(llm):
    ids = llm.tokenizer.encode("Hello world")
    forms = ["Hello world", ids, {"prompt": "Hello world"}, {"prompt_token_ids": ids}, list(map(np.int64, ids))]
    [expected] = llm.generate("Hello world", PARAMS, use_tqdm=False)
    assert len(expected.token_ids) == 4
    for form in forms:
        assert [answer.token_ids for answer in llm.generate(form, PARAMS, use_tqdm=False)] == [expected.token_ids]
    assert [answer.token_ids for answer in llm.generate(forms, PARAMS, use_tqdm=False)] == 5 * [expected.token_ids]


@pytest.mark.parametrize(
    "prompt",
    [[["a"]], [{"text": "a"}], [{"prompt": "a", "prompt_token_ids": [1]}], [None], [[1.5]], [{"prompt": None}]],
)
def test_what_is_no_prompt_is_refused_with_its_forms(llm, prompt):
    with pytest.raises(RequestRefused, match="a prompt is a text, a list of token ids") as refusal:
        llm.generate(["fine", prompt], PARAMS, use_tqdm=False)
    assert refusal.value.param == "prompt"
    assert not llm.engine.has_work
