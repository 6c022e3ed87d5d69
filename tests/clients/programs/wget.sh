# wget --spider, as monitors use it: HEAD, and GET if that is refused.
. ./calls.sh

spider() { wget -q --spider --tries=1 --timeout=60 "$URL$1"; }

health() { spider /healthz && spider /health && spider /readyz; }
metrics() { spider /metrics; }
models() { spider /v1/models; }
generate() {
  wget -q -O out.png --header='Content-Type: application/json' --post-data='{"prompt": "a red ball"}' "$URL/generate" \
    && is_png out.png
}

for call in health metrics models generate; do run "$call" "$call"; done
