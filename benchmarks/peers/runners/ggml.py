"""libgguf: ggml's quantizers in C, behind the writer of llama.cpp's Python package."""

from collections.abc import Callable


def convert(task: dict) -> Callable[[], None]:
    import gguf
    import libgguf
    from safetensors import safe_open

    kind = gguf.GGMLQuantizationType[task["format"].upper()]
    block = gguf.GGML_QUANT_SIZES[kind][0]

    def call() -> None:
        writer = gguf.GGUFWriter(task["target"], "flux")
        with safe_open(task["source"], "pt") as source:
            for name in source.keys():  # noqa: SIM118, it is no mapping
                weight = source.get_tensor(name).float().numpy()
                if weight.ndim == 2 and weight.shape[1] % block == 0:
                    writer.add_tensor(name, libgguf.quantize_rows(weight, kind.value), raw_dtype=kind)
                else:
                    writer.add_tensor(name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return call
