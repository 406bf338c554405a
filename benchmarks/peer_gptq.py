"""Times llm-compressor's GPTQ on one weight; run by benchmarks.gptq_speed under a Python that holds it.

    PEER_PYTHON -m benchmarks.peer_gptq FOLDER --group 128

FOLDER holds weight.npy f32[N, K] and hessian.npy f32[K, K], the mean of x x^T; quantized.npy and peer.json are written
there. Nothing here imports jax or jq4.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight


def scales_of(weight: torch.Tensor, arguments: QuantizationArgs, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points [N, G] of the groups' extremes, by its own rule."""
    groups = weight.reshape(weight.shape[0], -1, group)
    return calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", type=int, default=128)
    options = parser.parse_args()
    weight, hessian = (torch.from_numpy(np.load(options.folder / f"{name}.npy")) for name in ("weight", "hessian"))
    arguments = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=options.group)
    start = time.perf_counter()
    scale, zero_point = scales_of(weight, arguments, options.group)
    quantized = quantize_weight(
        weight.clone()[None], hessian.clone()[None], scale[None], zero_point[None], None, arguments
    )[0]
    seconds = time.perf_counter() - start
    np.save(options.folder / "quantized.npy", quantized[0].numpy())
    row = {"method": f"llm-compressor {version('llmcompressor')}", "run_seconds": seconds, "torch": torch.__version__}
    (options.folder / "peer.json").write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
