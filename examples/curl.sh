#!/bin/sh
# Draws apple.png, then edits it into green.png. Usage: sh curl.sh [URL]
set -eu
url=${1:-${PAELLERA_CLIENT_URL:-http://127.0.0.1:8000}}
# curl reads the key from its standard input, where no list of processes shows it.
ask() {
    printf 'header = "Authorization: Bearer %s"\n' "${PAELLERA_CLIENT_KEY:-none needed}" |
        curl --fail-with-body --silent --show-error --config - "$@"
}

ask "$url/generate" \
    --header 'Content-Type: application/json' \
    --data '{"prompt": "a red apple on a white background", "seed": 7}' \
    --output apple.png

ask "$url/edit" \
    --form image=@apple.png --form prompt='a green apple on a white background' --form seed=7 \
    --output green.png

echo apple.png green.png
