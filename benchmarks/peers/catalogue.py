"""The programs that we are measured beside: what each is, what it needs, and where it cannot run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """distribution: whose version names it in rows; runner: its file in `runners`, without one it is not run here
    packages: for pip, in an environment of its own; without any it is expected in the present one
    tools:    programs that building it takes
    refusal:  why it is left out on a machine without CUDA
    """

    name: str
    about: str
    distribution: str
    runner: str = ""
    packages: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    refusal: str = ""


NO_DEVICE = "moves weights from RAM to a CUDA device; this machine has none, so there is nothing to move them to"

PEERS = {
    peer.name: peer
    for peer in (
        Peer("flux_quant", "ours", "flux_quant", "ours"),
        Peer("torch", "a dense product, weights unpacked", "torch", "dense"),
        Peer("torch chain", "weights unpacked by torch operations at every call, compiled or not", "torch", "chain"),
        Peer("diffusers", "GGUF layers of diffusers, unpacked by torch at every call", "diffusers", "diffusers_gguf"),
        Peer("gguf", "llama.cpp's Python package: its quantizers in numpy", "gguf", "gguf_py"),
        Peer("libgguf", "ggml's own quantizers in C behind a Python package", "libgguf", "ggml"),
        Peer("optimum-quanto", "weights in int8, fp8, int4", "optimum-quanto", "quanto", ("optimum-quanto",)),
        Peer("torchao", "weights in int8 and fp8, and activations in int8", "torchao", "ao", ("torchao",)),
        Peer("bitsandbytes", "weights in int8 and NF4", "bitsandbytes", "bits", ("bitsandbytes",)),
        Peer("aircanvas", "streams blocks from disk", "aircanvas", "air", ("aircanvas",)),
        Peer(
            "stable-diffusion.cpp",
            "ggml all through: its own products on packed weights, activations in 8 bits",
            "stable-diffusion-cpp-python",
            "sdcpp",
            ("stable-diffusion-cpp-python",),
            tools=("cmake", "c++"),
        ),
        Peer(
            "mmgp",
            "streams blocks from RAM, quantizes with optimum-quanto",
            "mmgp",
            packages=("mmgp",),
            refusal=NO_DEVICE,
        ),
        Peer("accelerate", "layer by layer from RAM, `cpu_offload`", "accelerate", refusal=NO_DEVICE),
        Peer("diffusers group offload", "blocks or layers from RAM, with streams", "diffusers", refusal=NO_DEVICE),
    )
}
