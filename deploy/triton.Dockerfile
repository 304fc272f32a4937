# NVIDIA Triton with kimia in the Python of its backend. Built from the repository's root:
#
#     docker build -f deploy/triton.Dockerfile -t kimia-triton .
#
# It writes its model repository anew at each start, from the checkpoint in /models/current.

# NOTE: NVIDIA's image, under the name that your registry has it: any release whose Python is 3.11 or newer.
#     docker build --build-arg TRITON_IMAGE=...
ARG TRITON_IMAGE=tritonserver:25.06-py3
FROM ${TRITON_IMAGE}
ENV PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY kimia kimia
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt '.[serve,model]'
ENV HF_HUB_OFFLINE=1 \
    KIMIA_MODEL=/models/current
STOPSIGNAL SIGTERM
EXPOSE 8001
USER 10001:10001
# Triton answers grpc.health.v1 once its models are loaded.
HEALTHCHECK --interval=10s --timeout=20s --retries=3 --start-period=10m --start-interval=2s \
    CMD ["python3", "-m", "kimia.runtime.health", "127.0.0.1:8001"]
ENTRYPOINT ["sh", "-c"]
CMD ["kimia triton export /tmp/repository --device \"${KIMIA_TRITON_DEVICE:-cuda}\" && exec tritonserver --model-repository /tmp/repository --allow-http false --allow-metrics false --disable-auto-complete-config"]
