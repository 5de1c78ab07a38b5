"""Which platform the program being traced will run on."""

import jax


def current_platform() -> str:
    """The platform of the mesh in use, so that programs compiled for absent devices pick well, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "platform", None) or jax.default_backend()


HOPPER = ("H100", "H200", "GH200", "H800", "H20")


def current_device_kind() -> str:
    """What the device is called that the computation being traced will run on."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "device_kind", None) or jax.devices()[0].device_kind


def is_hopper(device_kind: str) -> bool:
    """Whether a GPU of this kind runs Mosaic GPU kernels made for Hopper."""
    return any(name in device_kind for name in HOPPER)


def has_triton(device_kind: str) -> bool:
    """Whether a GPU of this kind runs Triton kernels on bfloat16: NVIDIA's since Ampere; before, Tesla."""
    return device_kind.startswith("NVIDIA")


def is_past_tritons_offsets(num_bytes: int) -> bool:
    """Whether Triton would miss places in an array of one-byte numbers: its offsets are int32 up to 4 GiB."""
    return 2**31 < num_bytes <= 2**32
