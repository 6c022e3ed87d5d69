// Go's net/http.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"os"
	"strings"
)

var address = os.Getenv("CLIENT_TEST_URL")

func body(answer *http.Response, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != 200 {
		err = fmt.Errorf("%s: %s", answer.Status, content)
	}
	return content, err
}

func post(path string, fields map[string]any) ([]byte, error) {
	sent, _ := json.Marshal(fields)
	return body(http.Post(address+path, "application/json", bytes.NewReader(sent)))
}

func image(content []byte, err error) (string, error) {
	if err == nil && !bytes.HasPrefix(content, []byte("\x89PNG")) {
		err = fmt.Errorf("no PNG: %.80s", content)
	}
	return fmt.Sprint(len(content), " bytes"), err
}

type Answer struct {
	Data []struct {
		B64 []byte `json:"b64_json"`
		URL string `json:"url"`
	} `json:"data"`
}

func generations(fields map[string]any) (answer Answer, err error) {
	content, err := post("/v1/images/generations", fields)
	if err == nil {
		err = json.Unmarshal(content, &answer)
	}
	if err == nil && len(answer.Data) == 0 {
		err = errors.New("no images")
	}
	return answer, err
}

func picture() []byte {
	answer, err := generations(map[string]any{"prompt": "a red ball"})
	if err != nil {
		panic(err)
	}
	return answer.Data[0].B64
}

var calls = []struct {
	name string
	make func() (string, error)
}{
	{"models", func() (string, error) {
		content, err := body(http.Get(address + "/v1/models"))
		if err == nil && !bytes.Contains(content, []byte(`"data"`)) {
			err = errors.New("no models")
		}
		return "", err
	}},
	{"generate", func() (string, error) { return image(post("/generate", map[string]any{"prompt": "a red ball", "response_format": "png"})) }},
	{"several", func() (string, error) {
		answer, err := generations(map[string]any{"prompt": "a red ball", "n": 2})
		return fmt.Sprint(len(answer.Data), " images"), err
	}},
	{"url", func() (string, error) {
		answer, err := generations(map[string]any{"prompt": "a red ball", "model": "dall-e-3"})
		if err != nil {
			return "", err
		}
		return image(body(http.Get(answer.Data[0].URL)))
	}},
	// A form of unknown length, which goes in chunks.
	{"edit", func() (string, error) {
		reader, writer := io.Pipe()
		form := multipart.NewWriter(writer)
		go func() {
			form.WriteField("prompt", "a blue ball")
			file, _ := form.CreateFormFile("image", "ball.png")
			file.Write(picture())
			writer.CloseWithError(form.Close())
		}()
		return image(body(http.Post(address+"/edit", form.FormDataContentType(), reader)))
	}},
	{"sdapi", func() (string, error) {
		init := base64.StdEncoding.EncodeToString(picture())
		fields := map[string]any{"prompt": "a blue ball", "init_images": []string{init}, "denoising_strength": 0.5}
		content, err := post("/sdapi/v1/img2img", fields)
		var answer struct{ Images [][]byte }
		if err == nil {
			err = json.Unmarshal(content, &answer)
		}
		if err != nil {
			return "", err
		}
		return image(answer.Images[0], nil)
	}},
	{"error", func() (string, error) {
		_, err := post("/v1/images/generations", map[string]any{"prompt": "a", "n": 99})
		if err == nil || !strings.Contains(err.Error(), `"param":"n"`) {
			return "", fmt.Errorf("unexpected: %v", err)
		}
		return "", nil
	}},
}

func main() {
	for _, call := range calls {
		note, err := call.make()
		if err != nil {
			note = err.Error()
		}
		line, _ := json.Marshal(map[string]any{"ok": err == nil, "note": note})
		fmt.Printf("{\"call\": %q, %s\n", call.name, line[1:])
	}
}
