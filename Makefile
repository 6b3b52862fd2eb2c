# A thin face: each target is one or two plain commands, which work without make too. README.md shows them.
# Another interpreter for .venv: make setup PYTHON=/path/to/python3.12

PYTHON ?= python3

.PHONY: setup setup-vllm demo chat test test-full gpu-check lint format clean

setup:  ## .venv with the tested packages, the project in place, the embedded model; does nothing if up to date
	@$(PYTHON) scripts/setup.py

setup-vllm: setup  ## .venv-vllm for --rollout_engine vllm: vLLM for CUDA, or for CPUs where there is no GPU
	.venv/bin/python scripts/setup_vllm.py

demo: setup  ## the three steps on the embedded model and the bundled data, in a new run under output/
	.venv/bin/python train.py --recipe demo

chat: setup  ## a page with the SFT and the RLHF model of the latest run side by side
	.venv/bin/python inference/gradio_chatbot.py

test: setup  ## the test suite, minutes; -n 0 runs it in one process
	.venv/bin/python -m pytest -m "not slow and not gpu" -n auto --dist loadfile --no-loadscope-reorder

test-full: setup  ## every test, long; those marked gpu are a GPU's, where there is one
	.venv/bin/python -m pytest -m "not gpu"
	TRIPOD_TEST_DEVICE=cuda .venv/bin/python -m pytest -m gpu tests/gpu

gpu-check: setup  ## everything that one GPU must show, 25 minutes: tests, speed, memory
	.venv/bin/python benchmarks/gpu_check.py

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:  ## the environment and caches; runs under output/ stay
	rm -rf .venv .venv-vllm *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
