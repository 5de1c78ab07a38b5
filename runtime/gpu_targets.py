"""GPUs as XLA's compiler wants them described where there is none to ask.

Values are from public specifications, not read off a card. The memory is stated larger: where no allocator says how
much there is, the compiler takes 80% of it for its limit, and with a card it is 95%.
"""

_COMMON = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_per_core}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_per_block}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""

_SPECIFIC = {
    "NVIDIA H100 80GB HBM3": dict(
        major=9, cores=132, units_per_core=128, clock=1.98, l2=52428800, bandwidth=3352320000000, memory=84929347584,
        shared_per_core=233472, shared_per_block=232448,
    ),
    "NVIDIA H200": dict(
        major=9, cores=132, units_per_core=128, clock=1.98, l2=62914560, bandwidth=4800000000000, memory=150117089280,
        shared_per_core=233472, shared_per_block=232448,
    ),
    "NVIDIA B200": dict(
        major=10, cores=148, units_per_core=128, clock=1.965, l2=132644864, bandwidth=8000000000000,
        memory=191500000000, shared_per_core=233472, shared_per_block=232448,
    ),
    "NVIDIA A100-SXM4-80GB": dict(
        major=8, cores=108, units_per_core=64, clock=1.41, l2=41943040, bandwidth=2039000000000, memory=84929347584,
        shared_per_core=167936, shared_per_block=166912,
    ),
}  # fmt: skip


def described(kind: str) -> str:
    """The compiler's target config, as text, of a GPU that JAX calls so."""
    specific = _SPECIFIC[kind]
    return _COMMON.format(kind=kind, **specific | {"memory": int(specific["memory"] * 0.95 / 0.8)})
