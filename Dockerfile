# seqgpt serve in a container:
#   docker build -t seqgpt .
#   docker run --rm -p 127.0.0.1:8000:8000 --user "$(id -u):$(id -g)" -v "$PWD/outputs/best_model:/model:ro" \
#       -e SEQGPT_API_KEY --read-only --tmpfs /tmp seqgpt
# More options of `seqgpt serve` go after the last word. Everything in the image belongs to root; the server is nobody
# in particular.
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
# PyTorch for processors alone is gigabytes smaller: where pip finds it is said at pytorch.org, "Get started"
# (pip, CPU); pass that address as --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/seqgpt && /opt/seqgpt/bin/pip install --no-cache-dir -c requirements.txt '.[serve,onnx]'

FROM python:3.11-slim
COPY --from=build /opt/seqgpt /opt/seqgpt
ENV PATH=/opt/seqgpt/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=10)"]
ENTRYPOINT ["seqgpt", "serve", "--host", "0.0.0.0", "--port", "8000", "--model_path", "/model"]
