"""lm-eval, model local-completions: https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/API_guide.md"""

import json
import os

import httpx
import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.clients
DOCS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "a test"], "answer": 0},
    {"question": "Hello", "choices": ["world", "é😀"], "answer": 1},
    {"question": "What is this? This is", "choices": ["a test", "\n\n"], "answer": 0},
]
CHOOSING = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "Q:"], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in (("choosing", CHOOSING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text.format(docs=folder / "docs.jsonl"))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(server, tasks, task, **model_args):
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=dict(model=server.model, base_url=f"{server.url}/completions", max_length=1024) | model_args,
        tasks=[task],
        task_manager=tasks,
        bootstrap_iters=0,
        log_samples=True,
    )
    return [[answer[0] for answer in sample["resps"]] for sample in found["samples"][task]]


def test_loglikelihoods(server, checkpoint, tasks):
    """Prompts of token ids with echo and logprobs, through the server's tokenizer and through the model folder's."""
    here = {"tokenizer_backend": "huggingface", "tokenizer": str(checkpoint), "tokenized_requests": True}
    remote = evaluate(server, tasks, "tiny_choice", tokenizer_backend="remote")
    ways = [here, here | {"batch_size": 4}, here | {"num_concurrent": 4}]
    for found in (evaluate(server, tasks, "tiny_choice", **way) for way in ways):
        for one, other in zip(found, remote, strict=True):
            assert [(round(float(total), 3), best) for total, best in one] == [
                (round(float(total), 3), best) for total, best in other
            ]
    for doc, choices in zip(DOCS, remote, strict=True):
        for choice, (total, _) in zip(doc["choices"], choices, strict=True):
            assert abs(loglikelihood(server, doc["question"], f" {choice}") - float(total)) < 1e-3


def loglikelihood(server, context: str, continuation: str) -> float:
    """The same from two plain requests."""
    tokens = [
        httpx.post(f"{server.root}/tokenize", json={"prompt": text}).json()["tokens"]
        for text in (context, context + continuation)
    ]
    body = {"prompt": tokens[1], "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = httpx.post(f"{server.url}/completions", json=body).json()
    return sum(answer["choices"][0]["logprobs"]["token_logprobs"][len(tokens[0]) :])


def test_generation(server, tasks):
    found = evaluate(server, tasks, "tiny_writing", tokenizer_backend="remote")
    assert len(found) == len(DOCS) and all("\n" not in text for (text,) in found)
