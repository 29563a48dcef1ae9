#!/usr/bin/env bash
# Run a command with a Chromium, its path in CHROMIUM: the one that is given or installed, else Debian's, which root installs here.
#   usage: with-chromium.sh COMMAND...
set -euo pipefail
CHROMIUM=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
if [ -z "$CHROMIUM" ]; then
  [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || { echo 'no Chromium is installed: install one, or set CHROMIUM to its path' >&2; exit 2; }
  echo 'installing Debian'"'"'s chromium' >&2
  log=$(mktemp)
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } > "$log" 2>&1 || { cat "$log" >&2; exit 2; }
  CHROMIUM=$(command -v chromium)
fi
export CHROMIUM
exec "$@"
