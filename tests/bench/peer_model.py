"""Writes the demo model as a Hugging Face folder, which a peer reads: python -m tests.bench.peer_model FOLDER.

The weights are those of the GGUF file that our server loads, in bfloat16, so both serve the same numbers.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from converters.checkpoint import open_checkpoint
from runtime.demo import demo


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(demo())
    tensors = {name: np.ascontiguousarray(array.astype(ml_dtypes.bfloat16)) for name, array in checkpoint.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(checkpoint.hf_config | {"model_type": "llama", "torch_dtype": "bfloat16"}, indent=1)
    )
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": checkpoint.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(checkpoint.tokenizer_config | settings))
    print(f"written: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
