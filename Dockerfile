# syntax=docker/dockerfile:1

FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/notifyd
COPY requirements.lock ./
RUN /opt/notifyd/bin/pip install --no-cache-dir --require-hashes --no-deps -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY notifyd ./notifyd
RUN /opt/notifyd/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin notifyd
COPY --from=build /opt/notifyd /opt/notifyd
ENV PATH=/opt/notifyd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NOTIFYD_SERVER__HOST=0.0.0.0 \
    NOTIFYD_SERVER__MODE=production
WORKDIR /var/lib/notifyd
USER 10001
EXPOSE 8081
# With another port, or with TLS, give `docker run` a --health-cmd of its own.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8081/health/live', timeout=2)"]
CMD ["notifyd", "serve"]
