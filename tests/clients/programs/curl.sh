# curl, which asks for HTTP/2 over plain text (h2c) with --http2.
. ./calls.sh

get() { curl --http2 -sSf --max-time 50 "$@"; }

models() { get "$URL/v1/models" | grep -q '"data"'; }
generate() {
  get -o out.png -w 'HTTP/%{http_version}' --json '{"prompt": "a red ball"}' -H 'Accept: image/png' "$URL/generate" \
    && is_png out.png
}
several() { get --json '{"prompt": "a red ball", "n": 2}' "$URL/generate" | grep -q b64_json; }
edit() { get -o out.png -F image=@image.png -F prompt='a blue ball' "$URL/edit" && is_png out.png; }
mask() {
  get -o out.png -F image=@image.png -F mask=@mask.png -F prompt='a blue ball' "$URL/inpaint" && is_png out.png
}
# Without the interim answer it would wait for a minute.
expect() {
  get -H 'Expect: 100-continue' --expect100-timeout 60 -o out.png -F image=@image.png -F prompt='a blue ball' "$URL/edit" \
    && is_png out.png
}
stream() { get -N -F prompt='show a red ball' -F stream=true -F partial_images=2 "$URL/generate" | grep -q 'event: completed'; }
named() {
  rm -rf named && mkdir named && (cd named && get -OJ -F prompt='a red ball' "$URL/generate" && ls) | grep '\.png$'
}
error() { curl --http2 -s --json '{"prompt": "a red ball", "n": 99}' "$URL/generate" | grep 'from 1 to 16'; }

for call in models generate several edit mask expect stream named error; do run "$call" "$call"; done
