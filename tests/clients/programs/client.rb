# Ruby's Net::HTTP.
require "json"
require "net/http"
require "tempfile"

ADDRESS = URI(ENV.fetch("CLIENT_TEST_URL"))

def checked(answer)
  raise "#{answer.code} #{answer.body}" unless answer.is_a?(Net::HTTPSuccess)

  answer.body
end

def post(path, fields)
  checked(Net::HTTP.post(ADDRESS + path, JSON.dump(fields), "Content-Type" => "application/json"))
end

def png(content)
  raise "no PNG: #{content[0, 80]}" unless content.b.start_with?("\x89PNG".b)

  "#{content.bytesize} bytes"
end

def generations(**fields)
  JSON.parse(post("/v1/images/generations", fields))["data"]
end

CALLS = {
  models: -> { JSON.parse(checked(Net::HTTP.get_response(ADDRESS + "/v1/models")))["data"][0]["id"] },
  generate: -> { png(post("/generate", { prompt: "a red ball" })) },
  several: -> { "#{generations(prompt: "a red ball", n: 2).length} images" },
  url: -> { png(Net::HTTP.get(URI(generations(prompt: "a red ball", model: "dall-e-2")[0]["url"]))) },
  edit: lambda do
    file = Tempfile.new(["ball", ".png"], binmode: true)
    file.write(generations(prompt: "a red ball")[0]["b64_json"].unpack1("m"))
    file.rewind
    request = Net::HTTP::Post.new(ADDRESS + "/edit")
    request.set_form([["prompt", "a blue ball"], ["image", file]], "multipart/form-data")
    png(checked(Net::HTTP.start(ADDRESS.host, ADDRESS.port) { |http| http.request(request) }))
  end,
  error: lambda do
    generations(prompt: "a", n: 99)
    raise "accepted"
  rescue RuntimeError => e
    raise unless e.message.include?('"param":"n"')

    "400"
  end
}.freeze

CALLS.each do |call, make|
  puts JSON.dump({ call: call, ok: true, note: make.call.to_s }).sub('":', '": ')
rescue StandardError => e
  puts JSON.dump({ call: call, ok: false, note: e.message[0, 300] }).sub('":', '": ')
end
