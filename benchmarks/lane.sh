#!/bin/sh
# One benchmark of several that run side by side on a host with several GPUs: a GPU, cores for the engine, others
# for its stores, and compile caches of its own. What is measured: the command that follows.
#
#   benchmarks/lane.sh 0 0-15 16-21 python -m benchmarks.ttft --machine 64-core-4xh100 --out a.jsonl &
#   benchmarks/lane.sh 1 22-37 38-43 python -m benchmarks.admission --machine 64-core-4xh100 --out b.jsonl &
#   wait
#
# Over loopback the kernel's rule of congestion decides much of what short prefixes take; results name it:
#   sysctl -w net.ipv4.tcp_congestion_control=cubic
set -eu
gpu=$1 engine_cores=$2 server_cores=$3
shift 3
caches=${OBJECTCACHE_LANE_CACHES:-${TMPDIR:-/tmp}/objectcache-lanes}/$gpu
mkdir -p "$caches"
export CUDA_VISIBLE_DEVICES="$gpu" OBJECTCACHE_SERVER_CORES="$server_cores" VLLM_CACHE_ROOT="$caches"
export TRITON_CACHE_DIR="$caches/triton" TORCHINDUCTOR_CACHE_DIR="$caches/inductor"
exec taskset -c "$engine_cores" "$@"
