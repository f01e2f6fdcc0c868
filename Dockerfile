# Training image: NVIDIA's PyTorch with its torch, Transformer Engine, Apex and flash-attention left as they are.
#   docker build -t megatron-sip .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v $PWD/data:/workspace/megatron_sip/data \
#     megatron-sip bash examples/llama2_1.4b_continued.sh
# vLLM (judge, rewriter) does not go in here: it pins a torch of its own. Run its servers from NVIDIA's or vLLM's image.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /workspace/megatron_sip

# Whatever the image has of these must be the same afterwards: pip gets its versions as constraints.
COPY requirements-cuda.txt examples/image_constraints.py ./
RUN python image_constraints.py write /etc/pip/image-constraints.txt \
    && pip install -c /etc/pip/image-constraints.txt -r requirements-cuda.txt \
    && python image_constraints.py check /etc/pip/image-constraints.txt \
    && rm image_constraints.py

COPY . .
RUN pip install --no-deps --no-build-isolation -e . \
    && python -c "import megatron.core, torch, transformer_engine; print(torch.__version__, megatron.core.__version__)"

CMD ["python", "pretrain_sip.py", "--help"]
