"""The evidence of docs/RESULTS.md: `make evidence` conducts every experiment on the starter and writes the file.

Each is one command, printed before it runs; one that was interrupted goes on. Real texts take part where they lie beside the repository: a
sample of their training half calibrates, pieces of their held-out half judge. So does a larger model, where tests/smollm2.py has fetched it.
"""

import argparse
import gzip
import json
import random
import shlex
import shutil
from pathlib import Path

import smollm2

from dpruner import cli

ROOT = Path(__file__).parents[1]
CORPORA = ROOT.parent / "shared" / "corpora"
EXPERIMENTS, STORED = Path("experiments"), Path("docs/results")
PIECES, CHARACTERS, DOCUMENTS = 32, 900, 300   # held-out pieces of each text and their length; documents to calibrate on
FURTHER = {"wikitext2": 144}   # held-out pieces that no other experiment is judged on; of the other texts, where less is in doubt, 48
BUILT_IN = "--nsamples 32 --seqlen 128 --eval-documents 6 --eval-seqlen 128"


def real(domain: str, judged: str = "heldout") -> str:
    """Calibrated on real text of a domain and of the open domain, judged on both and on WikiText-2."""
    tasks = " ".join(f"--task {name}={{texts}}/{name}-{judged}.jsonl" for name in (domain, "general", "wikitext2"))
    return f"--domain {domain}={{texts}}/{domain}.jsonl --general general={{texts}}/general.jsonl --column text --eval-seqlen 256 {tasks}"


COMMANDS = [
    *(f"goal {real(domain)} --nsamples 32 --value 0.5 --value 0.6 --value 0.7 --value 0.8" for domain in ("legal", "finance", "healthcare")),
    *(f"goal --model {{smollm2}} --dtype bfloat16 {real(domain)} --nsamples 32 --value 0.5 --value 0.6 --value 0.7 --value 0.8"
      for domain in ("legal", "healthcare", "finance")),
    f"goal --model {{smollm2}} --dtype bfloat16 {real('legal')} --nsamples 64 --seqlen 256 --value 0.5",   # four times the text
    *(f"seeds {real(domain, 'further')} --nsamples 32 --limit 144" for domain in ("legal", "finance", "healthcare")),
    f"seeds {real('healthcare', 'further')} --sparsity 0.6 --nsamples 32 --limit 144",   # the one comparison that the goal leaves open at 60 %
    f"sparsity {real('legal')} --nsamples 32",
    f"sparsity --domain legal {BUILT_IN} --value 0.3 --value 0.5 --value 0.7",
    f"formulas --domain legal --domain healthcare {BUILT_IN}",
    f"transfer --domain legal --domain healthcare --domain finance --domain science --domain code {BUILT_IN}",
    f"lambda --domain legal {BUILT_IN} --value 0 --value 0.1 --value 1 --value 10",
    f"lambda --domain legal --sparsity 0.7 {BUILT_IN} --value 0 --value 1 --value 10",
    f"granularities --domain legal {BUILT_IN}",
    f"calibration --domain legal {BUILT_IN}",
    f"text --domain legal --sparsity 0.6 {BUILT_IN}",
    f"walk --domain legal {BUILT_IN}",
    f"finetune --domain legal --sparsity 0.6 {BUILT_IN} --value none --value full --value lora",
]


def documents(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def real_texts(folder: Path) -> None:
    """Calibration and held-out pieces of each real text, drawn by a fixed seed."""
    for name in ("general", "legal", "healthcare", "finance", "wikitext2"):
        heldout = CORPORA / "general/wikitext2-valid.jsonl.gz" if name == "wikitext2" else CORPORA / name / "heldout.jsonl.gz"
        pieces = [text[at:at + CHARACTERS] for text in documents(heldout) for at in range(0, len(text) - CHARACTERS // 2, CHARACTERS)]
        judged = random.Random(0).sample(range(len(pieces)), PIECES)
        write(folder / f"{name}-heldout.jsonl", [pieces[i] for i in judged])
        left = [piece for i, piece in enumerate(pieces) if i not in judged]
        write(folder / f"{name}-further.jsonl", random.Random(1).sample(left, FURTHER.get(name, 48)))
        if name != "wikitext2":
            texts = documents(CORPORA / name / "train.jsonl.gz")
            write(folder / f"{name}.jsonl", random.Random(0).sample(texts, min(DOCUMENTS, len(texts))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="experiments to conduct (default: all)")
    names = parser.parse_args().names
    texts = EXPERIMENTS / "texts"
    if CORPORA.is_dir() and not (texts / "wikitext2-further.jsonl").is_file():
        real_texts(texts)
    for command in COMMANDS:
        needed = {"texts": texts, "smollm2": smollm2.FOLDER}
        if names and command.split()[0] not in names or any(f"{{{name}}}" in command and not folder.is_dir() for name, folder in needed.items()):
            continue
        command = command.format(**needed)
        print(f"python -m dpruner experiment {command}", flush=True)
        if cli.main(["experiment", *shlex.split(command), "--experiments", str(EXPERIMENTS)]):
            continue
        for found in EXPERIMENTS.glob("*/results.parquet"):
            for name in ("experiment.json", "results.parquet"):
                (STORED / found.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found.with_name(name), STORED / found.parent.name / name)
    cli.main(["experiment", "report", "--experiments", str(STORED)])


if __name__ == "__main__":
    main()
