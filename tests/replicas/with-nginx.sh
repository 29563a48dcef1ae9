#!/usr/bin/env bash
# Run a command with an nginx, its path in NGINX: the one that is given or installed, else Debian's, which root installs here.
#   usage: with-nginx.sh COMMAND...
set -euo pipefail
NGINX=${NGINX:-$(PATH=$PATH:/usr/sbin command -v nginx || true)}
if [ -z "$NGINX" ]; then
  [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || { echo 'no nginx is installed: install one, or set NGINX to its path' >&2; exit 2; }
  echo 'installing Debian'"'"'s nginx-light' >&2
  log=$(mktemp) policy=/usr/sbin/policy-rc.d made=
  # Debian starts a server that it installs, unless this says no
  [ -e "$policy" ] || { made=1; printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod +x "$policy"; }
  rc=0
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light; } > "$log" 2>&1 || rc=2
  [ -z "$made" ] || rm "$policy"
  [ "$rc" = 0 ] || { cat "$log" >&2; exit "$rc"; }
  NGINX=/usr/sbin/nginx
fi
export NGINX
exec "$@"
