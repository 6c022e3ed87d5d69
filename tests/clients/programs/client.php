<?php
// PHP's curl extension, and its streams.
$address = getenv("CLIENT_TEST_URL");

function checked($curl) {
    curl_setopt($curl, CURLOPT_RETURNTRANSFER, true);
    $content = curl_exec($curl);
    $status = curl_getinfo($curl, CURLINFO_RESPONSE_CODE);
    if ($status !== 200) throw new Exception("$status $content");
    return $content;
}

function post($path, $fields) {
    global $address;
    $curl = curl_init($address . $path);
    curl_setopt($curl, CURLOPT_POSTFIELDS, json_encode($fields));
    curl_setopt($curl, CURLOPT_HTTPHEADER, ["Content-Type: application/json"]);
    return checked($curl);
}

function png($content) {
    if (!str_starts_with($content, "\x89PNG")) throw new Exception("no PNG: " . substr($content, 0, 80));
    return strlen($content) . " bytes";
}

function generations($fields) {
    return json_decode(post("/v1/images/generations", $fields), true)["data"];
}

function edit($fields) {
    global $address;
    $content = base64_decode(generations(["prompt" => "a red ball"])[0]["b64_json"]);
    $curl = curl_init("$address/edit");
    $file = new CURLStringFile($content, "ball.png", "image/png");
    curl_setopt($curl, CURLOPT_POSTFIELDS, ["prompt" => "a blue ball", "image" => $file] + $fields);
    return checked($curl);
}

$calls = [
    "models" => fn() => json_decode(checked(curl_init("$address/v1/models")), true)["data"][0]["id"],
    "generate" => fn() => png(post("/generate", ["prompt" => "a red ball"])),
    // HTTP/1.0 by default in old versions, with Connection: close.
    "streams" => fn() => png(file_get_contents("$address/generate", false, stream_context_create(["http" => [
        "method" => "POST",
        "protocol_version" => 1.0,
        "header" => "Content-Type: application/json",
        "content" => json_encode(["prompt" => "a red ball", "response_format" => "png"]),
    ]]))),
    "several" => fn() => count(generations(["prompt" => "a red ball", "n" => 2])) . " images",
    "url" => fn() => png(file_get_contents(generations(["prompt" => "a ball", "model" => "dall-e-3"])[0]["url"])),
    "edit" => fn() => png(edit(["strength" => "0.5", "seed" => "", "negative_prompt" => ""])),
    "error" => function () {
        try {
            generations(["prompt" => "a", "n" => 99]);
        } catch (Exception $error) {
            if (str_contains($error->getMessage(), '"param":"n"')) return "400";
            throw $error;
        }
        throw new Exception("accepted");
    },
];
foreach ($calls as $call => $make) {
    try {
        [$ok, $note] = [true, $make()];
    } catch (Throwable $error) {
        [$ok, $note] = [false, substr($error->getMessage(), 0, 300)];
    }
    echo '{"call": ', json_encode($call), ", ", substr(json_encode(["ok" => $ok, "note" => $note]), 1), "\n";
}
