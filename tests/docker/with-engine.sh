#!/usr/bin/env bash
# Run a command with a Docker engine: the one that answers, else a private one of its own, started for the command and stopped after it.
#   usage: with-engine.sh COMMAND...
# The private one needs root on Debian 12 and its package mirror, and no registry: its base image is made out of Debian's packages, in the
# likeness of python:3.11-slim. It starts without NAT, so that containers have no way out: whatever they do is known to need none.
set -euo pipefail
say() { echo "[engine +${SECONDS}s] $*" >&2; }

if docker info > /dev/null 2>&1; then exec "$@"; fi
[ "$(id -u)" = 0 ] || { echo 'no Docker engine answers, and only root can start one here: start Docker, or set DOCKER_HOST' >&2; exit 2; }
grep -q 'VERSION_ID="12"' /etc/os-release || { echo 'no Docker engine answers, and a private one is only made on Debian 12: start Docker' >&2; exit 2; }

work=${DISTILL_ENGINE_DIR:-/var/tmp/blackbox-distill-engine}
mkdir -p "$work"
export DEBIAN_FRONTEND=noninteractive
mirror=$(grep -hoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -1 | tr -d ' ' || true)
mirror=${mirror%/}
[ -n "$mirror" ] || { echo 'the apt sources name no Debian mirror' >&2; exit 2; }

if ! dpkg-query -W -f='${Version}\n' docker.io docker-compose docker-buildx debootstrap 2>/dev/null | grep -q '^26\.'; then
  debs=$(mktemp -d)
  mkdir -p "$debs/lists/partial"
  # Debian 12's own compose is too old; Debian 13 stands in a list of its own, so that the system never upgrades to it
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$debs/trixie.list"
  trixie=(-o "Dir::Etc::sourcelist=$debs/trixie.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$debs/lists" -o APT::Sandbox::User=root)
  apt-get update -qq
  apt-get "${trixie[@]}" update -qq
  (cd "$debs" && apt-get "${trixie[@]}" download -qq docker.io docker-cli containerd docker-compose docker-buildx)
  apt-get install -y -qq --no-install-recommends debootstrap iproute2 "$debs"/*.deb > "$work/apt.log" 2>&1
  rm -rf "$debs"
fi

export DOCKER_HOST=unix://$work/docker.sock
forward=$(sysctl -n net.ipv4.ip_forward)
dockerd --iptables=false --ip6tables=false --ip-forward=false --data-root="$work/root" --exec-root="$work/exec" \
  --pidfile="$work/dockerd.pid" -H "$DOCKER_HOST" > "$work/dockerd.log" 2>&1 &
engine=$!
stop() {  # containers first, else their shims outlive the engine
  docker ps -q | xargs -r docker kill > /dev/null || true
  docker network prune -f > /dev/null || true
  kill "$engine" && wait "$engine" || true
  ip link del docker0 2> /dev/null || true
  sysctl -qw "net.ipv4.ip_forward=$forward" || true
  umount "$work/exec/netns/default" 2> /dev/null || true
}
trap stop EXIT
for _ in $(seq 120); do
  docker info > /dev/null 2>&1 && break
  kill -0 "$engine" || { tail -5 "$work/dockerd.log" >&2; exit 2; }
  sleep 0.25
done
say "$(docker version -f 'engine {{.Server.Version}}'), $(docker compose version)"

if ! docker image inspect python:3.11-slim > /dev/null 2>&1 && ! timeout 60 docker pull -q python:3.11-slim 2> /dev/null; then
  root=$work/rootfs
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$root" "$mirror" > "$work/debootstrap.log"
  # as the slim images: no documentation, no translations; pip comes with each virtual environment
  rm -rf "$root"/usr/share/{doc,man,locale,info,lintian}/* "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
  ln -s /usr/bin/python3 "$root/usr/local/bin/python"
  # what this machine trusts, its network may need
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' > "$root/etc/pip.conf"
  tar -C "$root" --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' -c . |
    docker import -c 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' -c 'CMD ["python3"]' - python:3.11-slim > /dev/null
  rm -rf "$root"
  say "base image made: $(docker image inspect -f '{{.Size}}' python:3.11-slim) bytes"
fi
rc=0
"$@" || rc=$?
exit $rc
