// The JDK's HTTP client with its default settings, which ask for HTTP/2 over plain text (h2c).
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.util.concurrent.Callable;

public class Client {
    static final String ADDRESS = System.getenv("CLIENT_TEST_URL");
    static final HttpClient CLIENT = HttpClient.newHttpClient();

    static HttpRequest post(String path, String type, String body) {
        return HttpRequest.newBuilder(URI.create(ADDRESS + path))
                .header("Content-Type", type)
                .POST(BodyPublishers.ofString(body))
                .build();
    }

    static String image(HttpResponse<byte[]> answer) {
        byte[] content = answer.body();
        if (answer.statusCode() != 200 || content.length < 8 || content[1] != 'P') {
            throw new IllegalStateException(answer.statusCode() + " " + new String(content, StandardCharsets.UTF_8));
        }
        return content.length + " bytes, " + answer.version();
    }

    static String text(HttpRequest request, int status, String mention) throws Exception {
        HttpResponse<String> answer = CLIENT.send(request, BodyHandlers.ofString());
        if (answer.statusCode() != status || !answer.body().contains(mention)) {
            throw new IllegalStateException(answer.statusCode() + " " + answer.body());
        }
        return answer.version().toString();
    }

    static void run(String call, Callable<String> make) {
        boolean ok = true;
        String note;
        try {
            note = make.call();
        } catch (Exception error) {
            ok = false;
            note = error.toString();
        }
        note = note.replaceAll("[^ -~]", " ").replace("\\", "/").replace("\"", "'");
        System.out.println("{\"call\": \"" + call + "\", \"ok\": " + ok + ", \"note\": \"" + note + "\"}");
    }

    public static void main(String[] arguments) {
        String json = "application/json";
        run("models", () -> text(HttpRequest.newBuilder(URI.create(ADDRESS + "/v1/models")).build(), 200, "\"data\""));
        run("generate", () -> image(CLIENT.send(
                post("/generate", json, "{\"prompt\": \"a red ball\"}"), BodyHandlers.ofByteArray())));
        run("several", () -> text(
                post("/v1/images/generations", json, "{\"prompt\": \"a red ball\", \"n\": 2}"), 200, "b64_json"));
        run("form", () -> image(CLIENT.send(
                post("/generate", "multipart/form-data; boundary=b",
                        "--b\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\na red ball\r\n--b--\r\n"),
                BodyHandlers.ofByteArray())));
        run("error", () -> text(
                post("/v1/images/generations", json, "{\"prompt\": \"a\", \"n\": 99}"), 400, "\"param\":\"n\""));
    }
}
