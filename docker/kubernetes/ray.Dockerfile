# The trainer's image with Ray, for rayjob.yaml.
FROM blackbox-distill/trainer:0.1.0-cuda
USER 0
# KubeRay's probes call wget
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
# `default` is what takes jobs; compiled, since KubeRay's own init container has a fifth of a core to import Ray in
RUN pip --python /opt/distill/bin/python install --no-cache-dir "ray[data,default,train]==2.60.0"
USER 10001:0
