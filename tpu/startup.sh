#!/usr/bin/env bash
# Prepare one TPU VM worker for jaxherd; safe to run again.
#
#   bash startup.sh [REQUIREMENT]     REQUIREMENT: what pip installs, default jaxherd[tpu,demo,remote]
#
# `jaxherd launch` does the same over SSH on all workers; this file is for slices you made yourself
# (gcloud: --metadata-from-file=startup-script=tpu/startup.sh).
set -euo pipefail

requirement="${1:-jaxherd[tpu,demo,remote]}"
# Startup scripts run as root without HOME.
environment="${JAXHERD_ENV:-${HOME:-/opt}/jaxherd-env}"

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  sudo apt-get -y -q update
  sudo apt-get -y -q install python3.11 python3.11-venv
  python=python3.11
else
  python=python3
fi
if [ ! -x "$environment/bin/pip" ]; then
  "$python" -m venv "$environment" || {
    sudo apt-get -y -q install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    "$python" -m venv "$environment"
  }
fi
"$environment/bin/pip" install -q -U pip
"$environment/bin/pip" install -q "$requirement"
"$environment/bin/python" - <<'PYTHON'
import importlib.metadata as metadata

print("jaxherd", metadata.version("jaxherd"), "jax", metadata.version("jax"))
PYTHON
echo "ready: $environment/bin/jaxherd run ... --on tpu"
