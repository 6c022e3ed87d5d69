# HTTPie.
. ./calls.sh

ask() { http --ignore-stdin --check-status --timeout=60 "$@"; }

models() { ask GET "$URL/v1/models" | grep -q '"data"'; }
# HTTPie prefers JSON unless it is told otherwise.
generate() {
  ask --download --output out.png POST "$URL/generate" Accept:image/png prompt='a red ball' seed:=7 && is_png out.png
}
several() { ask POST "$URL/generate" prompt='a red ball' n:=2 | grep -q b64_json; }
edit() {
  ask --download --output out.png --multipart POST "$URL/edit" Accept:image/png prompt='a blue ball' image@image.png && is_png out.png
}
error() { http --ignore-stdin POST "$URL/generate" prompt='a red ball' n:=99 | grep 'from 1 to 16'; }

for call in models generate several edit error; do run "$call" "$call"; done
