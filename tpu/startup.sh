#!/usr/bin/env bash
# Prepare one TPU VM worker for jaxherd; safe to run again.
#
#   bash startup.sh SOURCE     what to install: git+https://HOST/OWNER/REPOSITORY@COMMIT, the path of
#                              a wheel on this worker, or pypi==VERSION
#
# `jaxherd launch` does the same over SSH on all workers; this file is for slices you made yourself
# (gcloud: --metadata-from-file=startup-script=tpu/startup.sh --metadata=jaxherd-source=SOURCE).
set -euo pipefail

attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
source="${1:-$(curl -fsS -H "Metadata-Flavor: Google" "$attributes/jaxherd-source" || true)}"
case "$source" in
  git+https://*@*) requirement="jaxherd[tpu,demo,remote] @ $source" ;;
  *.whl) requirement="jaxherd[tpu,demo,remote] @ file://$(realpath "$source")" ;;
  pypi==?*) requirement="jaxherd[tpu,demo,remote]==${source#pypi==}" ;;
  *)
    echo "startup.sh: say what to install: git+https://...@COMMIT, a wheel, or pypi==VERSION" >&2
    exit 2
    ;;
esac
# Startup scripts run as root without HOME.
export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"
environment="${JAXHERD_ENV:-$HOME/jaxherd-env}"

# The image's own Python (3.10 on Ubuntu 22.04) is older than jaxherd needs; uv brings one.
python3 -m pip install -q --user uv
uv="$HOME/.local/bin/uv"
[ -x "$environment/bin/python" ] || "$uv" venv -q --python 3.12 "$environment"
"$uv" pip install -q --python "$environment/bin/python" "$requirement"
"$environment/bin/python" - <<'PYTHON'
import importlib.metadata as metadata

print("jaxherd", metadata.version("jaxherd"), "jax", metadata.version("jax"))
PYTHON
echo "ready: $environment/bin/jaxherd run ... --on tpu"
