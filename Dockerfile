# Two images: `api`, without torch, which also runs the dispatcher, the migrations and the keys
# command; and `worker`, with the engine.
#
#   docker build --target api --tag trimtab-api .
#   docker build --target worker --tag trimtab-worker .
#
# --build-arg PIP_INDEX_URL=... takes the packages from another index than pip's own.

FROM python:3.11-slim AS base
ENV PATH=/opt/trimtab/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    TRIMTAB_HOME=/var/lib/trimtab
# A new volume takes over the owner of the folder that it is mounted on.
RUN groupadd --gid 10001 trimtab \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/trimtab \
    --shell /usr/sbin/nologin trimtab \
 && install --directory --owner=10001 --group=10001 --mode=0700 \
    /var/lib/trimtab \
    /var/lib/trimtab/artifacts \
    /var/lib/trimtab/models \
    /var/lib/trimtab/scratch
WORKDIR /var/lib/trimtab


FROM base AS build
ARG PIP_INDEX_URL
WORKDIR /source
# For the engine's kernels, which are compiled when the package is installed.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/trimtab
COPY pyproject.toml constraints.txt hatch_build.py README.md LICENSE ./
COPY api ./api
COPY core ./core
COPY migrations ./migrations
COPY ppo_engine ./ppo_engine
COPY trimtab ./trimtab
COPY worker ./worker

FROM build AS build-api
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --disable-pip-version-check --only-binary=:all: \
    --constraint constraints.txt '.[server]'

FROM build-api AS build-worker
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --disable-pip-version-check --only-binary=:all: \
    --constraint constraints.txt '.[server,engine]'


FROM base AS worker
COPY --from=build-worker /opt/trimtab /opt/trimtab
USER 10001:10001
CMD ["python", "-m", "worker"]


FROM base AS api
# Inside a container, the loopback address is reachable from nowhere.
ENV TRIMTAB_HOST=0.0.0.0
COPY --from=build-api /opt/trimtab /opt/trimtab
USER 10001:10001
EXPOSE 8000
CMD ["python", "-m", "api"]
