# The locked environment, for GPU users; docs/gpu.md says how to run it. The checkout is mounted, so that records name its commit.
FROM python:3.13-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

COPY requirements.lock /tmp/requirements.lock
RUN pip install --no-cache-dir --no-deps --require-hashes --root-user-action ignore --requirement /tmp/requirements.lock \
    && printf '#!/bin/sh\nexec python -m isd_repro "$@"\n' > /usr/local/bin/isd-repro \
    && chmod 755 /usr/local/bin/isd-repro \
    && git config --system --add safe.directory /isd_repro

# For a user that the image does not know: caches of compiled kernels go to the home folder and are named by the user.
ENV PYTHONPATH=/isd_repro HOME=/tmp USER=user
WORKDIR /isd_repro
CMD ["bash"]
