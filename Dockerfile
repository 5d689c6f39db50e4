# docker build -t trapo .                              for CPUs
# docker build -t trapo --build-arg EXTRA=cuda12 .     for NVIDIA GPUs; run with --gpus all
FROM python:3.11-slim
ARG EXTRA=tasks
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY trapo_jax trapo_jax
RUN pip install --no-cache-dir ".[$EXTRA]" -c constraints.txt
WORKDIR /work
ENTRYPOINT ["trapo"]
CMD ["--help"]
