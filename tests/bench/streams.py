"""Tokens to bytes: `python -m tests.bench.streams [--streams 256] [--rate 20000]`.

An engine whose device step is a stand-in gives every stream a token a step, as often as the rate asks. The real engine
thread hands them to the event loop, where each chat completion turns its own into server-sent events; nothing is sent.
What keeps up makes a chunk of each token. The last line has no pause between steps: all that one core can do.
"""

import argparse
import asyncio
import cProfile
import pstats
import time
import types

import tokenizers

from openai_api import generation
from openai_api.config import ServerConfig
from openai_api.readers import Readers
from openai_api.schema.chat import ChatRequest
from openai_api.schema.chat_answers import ChatFormat
from runtime import bench
from runtime.async_engine import AsyncEngine
from runtime.params import SamplingParams
from runtime.request import Prompt
from runtime.tokenizer import Tokenizer
from tests.bench.host_loop import plan_for, stand_in_engine

TARGET = 20_000  # chunks a second on 256 streams
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True}


def byte_tokenizer() -> Tokenizer:
    """A token a printable byte."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def paced_engine(num_streams: int, num_tokens: int, pause_s: float) -> AsyncEngine:
    """An engine that begins no step before its time."""
    engine = stand_in_engine(plan_for(num_streams, num_tokens + 64))
    engine.tokenizer = engine.admission.tokenizer = engine.loaded.tokenizer = byte_tokenizer()
    engine.loaded.checkpoint = types.SimpleNamespace(chat_template=None, path=types.SimpleNamespace(stem="m"))
    engine.loaded.default_sampling = {}
    engine.grammar_compiler = lambda: None  # type: ignore[method-assign]
    step, due = engine.step, [time.monotonic()]

    def paced():
        due[0] = max(due[0] + pause_s, time.monotonic())
        time.sleep(max(0.0, due[0] - time.monotonic()))
        return step()

    engine.step = paced  # type: ignore[method-assign]
    return AsyncEngine(engine)


async def read(engine: AsyncEngine, index: int, num_tokens: int) -> tuple[int, int]:
    """(chunks, bytes) of one stream."""
    body = ChatRequest.model_validate(BODY)
    config = ServerConfig(api_keys=())
    prompt = Prompt([1 + index % 200] * 16, "hello")
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    readers = Readers(body, config, "hello")
    answer = ChatFormat(
        body, config, engine.tokenizer, prompt, model="m", id=f"chatcmpl-{index}", role="assistant", last_text=None,
        readers=readers,
    )  # fmt: skip
    num_chunks = num_bytes = 0
    async for chunk in answer.chunks(generation.run(engine, generation.Work("r", [prompt], [params]))):
        num_chunks += 1
        num_bytes += len(chunk)
    return num_chunks, num_bytes


async def measure(num_streams: int, num_tokens: int, rate: float | None, shows_profile: bool = False) -> dict:
    """Serves so many streams once, with that many tokens a second in all; None for no pause."""
    engine = paced_engine(num_streams, num_tokens, num_streams / rate if rate else 0.0)
    engine.attach(asyncio.get_running_loop())
    profiler = cProfile.Profile() if shows_profile else None
    before, thread_before = time.monotonic(), time.thread_time()
    if profiler:
        profiler.enable()
    found = await asyncio.gather(*(read(engine, i, num_tokens) for i in range(num_streams)))
    if profiler:
        profiler.disable()
        pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(25)
    wall, busy = time.monotonic() - before, time.thread_time() - thread_before
    await asyncio.to_thread(engine.stop)
    num_chunks = sum(chunks - 1 for chunks, _ in found)  # the first of each stream holds no token
    return {
        "tokens_s": num_streams * num_tokens / wall,
        "chunks_s": num_chunks / wall,
        "tokens_a_chunk": num_streams * num_tokens / num_chunks,
        "us_a_chunk": 1e6 * busy / num_chunks,
        "loop_busy": busy / wall,
        "bytes_a_chunk": sum(size for _, size in found) / num_chunks,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--rate", type=float, nargs="+", default=[5000, 10000, TARGET], help="tokens a second, in all")
    parser.add_argument("--profile", action="store_true", help="of the event loop's thread, without a pause")
    args = parser.parse_args()
    about = bench.machine()
    print(
        f"{about['processor']}, {about['cpus']} CPUs; Python {about['python']}; {about['versions']}; {about['commit']}"
    )
    print(f"{args.streams} streams of {args.tokens} tokens; the target is {TARGET:,} chunks a second\n")
    print("offered tok/s   tok/s    chunks/s   tokens a chunk   us a chunk   loop busy   bytes a chunk")
    for rate in [*args.rate, None]:
        found = asyncio.run(measure(args.streams, args.tokens, rate, args.profile and rate is None))
        offered = f"{rate:,.0f}" if rate else "all it can"
        print(
            f"{offered:>13}   {found['tokens_s']:>6,.0f}   {found['chunks_s']:>8,.0f}   "
            f"{found['tokens_a_chunk']:>14.2f}   {found['us_a_chunk']:>10.1f}   "
            f"{found['loop_busy']:>9.0%}   {found['bytes_a_chunk']:>13.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
