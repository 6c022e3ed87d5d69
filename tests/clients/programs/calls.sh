# For the programs in shell: one line of JSON per call.
URL=$CLIENT_TEST_URL
# A red square on white, 64 x 64, and black with a transparent square.
base64 -d > image.png <<'END'
iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEX6+vrIKCgNZfwnAAAAGklEQVR42mNgGJKA////DwwMTDDu
8GAMRQAAxtQDLKllrNgAAAAASUVORK5CYII=
END
base64 -d > mask.png <<'END'
iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAQAAAAAYLlVAAAATklEQVR42u3ZMQoAIAwDwFT8/5f1CQ4OFbzMhRx0TGWlNSMBAAAA
AAAA6M08XtRlw/ICAAAAAAAAAAAAAAAAAIDHAWUvAAAAAAAA+B6wAU68A3/6aluKAAAAAElFTkSuQmCC
END

is_png() { # file
  [ "$(head -c 4 "$1" | tail -c 3)" = PNG ] || { head -c 200 "$1"; return 1; }
}

run() { # name, command…; its last line is the note
  local name=$1 ok=true output
  shift
  output=$("$@" 2>&1) || ok=false
  printf '{"call": "%s", "ok": %s, "note": "%s"}\n' "$name" "$ok" \
    "$(printf '%s' "$output" | tail -n 1 | tr -cd ' -~' | tr -d '"\\' | cut -c 1-200)"
}
